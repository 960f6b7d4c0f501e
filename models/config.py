"""What defines a decoder beside its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.models.stored_quantization import StoredQuantization
from phalanx.parallel.shape import ModelShape


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    theta: base of the frequencies. scaling: `none`, `linear` (positions divided by `factor`) or `llama3` (long
    wavelengths divided by `factor`, short ones kept, those between blended; as published with Llama 3.1).
    original_max_position: context length the model was trained on before scaling, for `llama3`.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder: its family, its shape, and which of the known variations it has.

    family: row of the table in `models/families.py`. shape: its dimensions. max_position: positions it can address.
    norm_eps: epsilon of every RMSNorm. tie_embeddings: the head is the embedding. qkv_bias: biases on the query, key
    and value projections. o_bias, ffn_bias: on the output projection, on the feed-forward. qk_norm: RMSNorm on each
    query and key head before rotation. renormalise_experts: whether the weights that a mixture's routing gives to a
    token's experts are made to add up to 1. sliding_window: positions a token sees back, itself included, or None for
    all.
    dtype: as stored, one of `float32`, `float16`, `bfloat16`. bos_token_id, eos_token_ids: from the model's own
    files. quantization: how a safetensors checkpoint has its matrices quantised, or None.
    """

    family: str
    shape: ModelShape
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    renormalise_experts: bool = False
    sliding_window: int | None = None
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: StoredQuantization | None = None
