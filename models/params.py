"""Which slices of a checkpoint each rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from phalanx.models.config import DecoderConfig
from phalanx.models.families import ffn_names
from phalanx.parallel.layout import Layout, RankPlace, Stage
from phalanx.parallel.split import Interval

KV_SCALE_BYTES = 2  # of a head of a token in 8 bits, beside a byte a number; see `kernels/kv_format.py`


class TensorSlice(NamedTuple):
    """Part of a checkpoint's tensor, by canonical name. shape: of the part. rows, columns: None for all of them.
    width: columns of the tensor, of which `columns` are some.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: Interval | None = None
    columns: Interval | None = None
    width: int = 0


@dataclass(frozen=True, slots=True)
class Param:
    """A tensor that a rank holds: slices of the checkpoint, stacked along the first dimension.

    multiplied: whether it is a matrix of a product; of a tied embedding, whether on this rank or another. num_experts:
    whose matrices it is, [experts, rows, columns], of as many slices each; 0 where it is none of a mixture's. exact:
    whether schemes of quantization leave it as it is, as they do a router's. unit: inputs that every cut leaves
    together, as those of a head; 0 where nothing is known.
    """

    name: str
    slices: tuple[TensorSlice, ...]
    multiplied: bool = False
    num_experts: int = 0
    exact: bool = False
    unit: int = 0

    @property
    def quantisable(self) -> bool:
        return self.multiplied and not self.exact

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(piece.shape[0] for piece in self.matrices[0])
        matrix = (rows, *self.slices[0].shape[1:])
        return (self.num_experts, *matrix) if self.num_experts else matrix

    @property
    def matrices(self) -> list[tuple[TensorSlice, ...]]:
        """The slices of each expert's matrix, or all of them as one."""
        each = len(self.slices) // (self.num_experts or 1)
        return [self.slices[first : first + each] for first in range(0, len(self.slices), each)]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def rank_params(config: DecoderConfig, layout: Layout, place: RankPlace) -> list[Param]:
    """Everything the rank at `place` holds. A tied head beside its embedding is held once and not listed twice."""
    stage = layout.stages[place.stage]
    return list(_params(config, stage, place.tensor_rank))


def kv_bytes_per_token(
    config: DecoderConfig, layout: Layout, place: RankPlace, dtype_bytes: int, kv_cache_dtype: str = "auto"
) -> int:
    """Bytes that one token takes in the rank's KV cache, over all of its layers.

    dtype_bytes: of a number of the model. kv_cache_dtype: as `engine.kv_cache_dtype`.
    """
    stage = layout.stages[place.stage]
    head_bytes = config.shape.head_dim * dtype_bytes
    if kv_cache_dtype != "auto":
        head_bytes = config.shape.head_dim + KV_SCALE_BYTES
    return 2 * stage.layers.size * stage.kv_heads[place.tensor_rank].size * head_bytes


def _params(config: DecoderConfig, stage: Stage, tensor_rank: int) -> Iterator[Param]:
    hidden = config.shape.hidden_size
    vocab = stage.vocab[tensor_rank]
    if stage.first:
        embed = _rows("embed", ("model.embed_tokens.weight", vocab, hidden))
        yield replace(embed, multiplied=config.tie_embeddings)
    for layer in range(stage.layers.start, stage.layers.stop):
        yield from _layer_params(config, stage, tensor_rank, layer)
    if stage.last:
        yield _vector("norm", "model.norm.weight", hidden)
    if stage.head and not (stage.first and config.tie_embeddings):
        source = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
        yield _rows("head", (source, stage.head[tensor_rank], hidden))


def _layer_params(config: DecoderConfig, stage: Stage, tensor_rank: int, layer: int) -> Iterator[Param]:
    hidden, head_dim = config.shape.hidden_size, config.shape.head_dim
    queries = stage.query_heads[tensor_rank].scaled(head_dim)
    keys = stage.kv_heads[tensor_rank].scaled(head_dim)
    ffn = stage.ffn[tensor_rank]
    source = f"model.layers.{layer}"
    attention, mlp = f"{source}.self_attn", f"{source}.mlp"
    name = f"layers.{layer}"
    yield _vector(f"{name}.attention_norm", f"{source}.input_layernorm.weight", hidden)
    qkv = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
    yield _rows(f"{name}.qkv", *((f"{attention}.{part}.weight", rows, hidden) for part, rows in qkv))
    if config.qkv_bias:
        yield _rows(f"{name}.qkv_bias", *((f"{attention}.{part}.bias", rows, None) for part, rows in qkv))
    if config.qk_norm:
        yield _vector(f"{name}.q_norm", f"{attention}.q_norm.weight", head_dim)
        yield _vector(f"{name}.k_norm", f"{attention}.k_norm.weight", head_dim)
    width = config.shape.num_query_heads * head_dim
    yield replace(_columns(f"{name}.o", hidden, queries, width, f"{attention}.o_proj.weight"), unit=head_dim)
    if config.o_bias:
        yield _vector(f"{name}.o_bias", f"{attention}.o_proj.bias", hidden)
    yield _vector(f"{name}.ffn_norm", f"{source}.post_attention_layernorm.weight", hidden)
    num_experts = config.shape.num_experts
    if num_experts:
        router = _rows(f"{name}.router", (f"{mlp}.gate.weight", Interval(0, num_experts), hidden))
        yield replace(router, exact=True)
    names = ffn_names(config.shape, mlp)
    gate_up = ((f"{ffn_name}.{part}_proj.weight", ffn, hidden) for ffn_name in names for part in ("gate", "up"))
    yield replace(_rows(f"{name}.gate_up", *gate_up), num_experts=num_experts)
    down = (f"{ffn_name}.down_proj.weight" for ffn_name in names)
    yield replace(_columns(f"{name}.down", hidden, ffn, config.shape.ffn_size, *down), num_experts=num_experts)
    if config.ffn_bias:
        yield _rows(f"{name}.gate_up_bias", *((f"{mlp}.{part}_proj.bias", ffn, None) for part in ("gate", "up")))
        yield _vector(f"{name}.down_bias", f"{mlp}.down_proj.bias", hidden)


def _rows(name: str, *pieces: tuple[str, Interval, int | None]) -> Param:
    """Rows of matrices [., width], or with width None elements of vectors, stacked."""
    slices = (TensorSlice(t, (rows.size,) if width is None else (rows.size, width), rows) for t, rows, width in pieces)
    return Param(name, tuple(slices), multiplied=pieces[0][2] is not None)


def _columns(name: str, num_rows: int, columns: Interval, width: int, *tensors: str) -> Param:
    """The same columns of matrices [num_rows, width], stacked."""
    slices = (TensorSlice(tensor, (num_rows, columns.size), None, columns, width) for tensor in tensors)
    return Param(name, tuple(slices), multiplied=True)


def _vector(name: str, tensor: str, size: int) -> Param:
    return Param(name, (TensorSlice(tensor, (size,)),))
