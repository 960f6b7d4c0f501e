"""A decoder's configuration from the metadata of a GGUF file."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from phalanx.errors import ModelError
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.encodings import ENCODINGS
from phalanx.models.families import FAMILIES, family_of
from phalanx.models.fields import Fields, checked_shape
from phalanx.models.gguf_file import GgufArray, GgufFile
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.shape import ModelShape

# ggml's numbers of the encodings that are read (enum ggml_type in ggml.h).
ENCODING_OF_TYPE_ID = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}

ROPE_FACTORS = "rope_freqs.weight"

# Every key under the architecture's name is a setting of the model, so an unknown one is refused, not passed over.
_KNOWN_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "expert_count",
        "expert_used_count",
    }
)


def gguf_encoding(file: GgufFile, name: str) -> str:
    """The encoding of a tensor. Raises ModelError where it is not one that can be read."""
    type_id = file.tensors[name].type_id
    encoding = ENCODING_OF_TYPE_ID.get(type_id)
    if encoding is None:
        supported = ", ".join(ENCODINGS)
        raise ModelError(
            f"{file.path}: tensor {name} has ggml type {type_id}, which is not supported; supported: {supported}"
        )
    return encoding


def gguf_decoder_config(file: GgufFile) -> DecoderConfig:
    """A DecoderConfig from a GGUF file.

    Whether projections have biases, and whether the head is tied, is read from which tensors there are: the metadata do
    not say. dtype: that of most matrices; `bfloat16` for quantised ones, as the one whose range holds all they can
    mean. Raises ModelError, naming file, key, value and what is supported, for whatever would change the results and is
    not understood.
    """
    source, metadata = str(file.path), file.metadata
    arch = metadata.get("general.architecture")
    family = family_of(gguf_arch=arch) if isinstance(arch, str) else None
    if family is None or not isinstance(arch, str):
        supported = ", ".join(family.gguf_arch for family in FAMILIES if family.gguf_arch)
        raise ModelError(f"{source}: general.architecture is {arch!r}; supported: {supported}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(
            f"{source}: one of {metadata['split.count']} parts of a split GGUF; join them with `llama-gguf-split"
            " --merge`"
        )
    fields = Fields(metadata, source)
    unknown = [
        key for key in metadata if key.startswith(f"{arch}.") and key.removeprefix(f"{arch}.") not in _KNOWN_KEYS
    ]
    if unknown:
        raise ModelError(
            f"{source}: {unknown[0]} is {_shown(metadata[unknown[0]])}; supported: absent, as its meaning is not known"
        )
    if fields.get(f"{arch}.expert_count") not in (None, 0):
        raise fields.refusal(f"{arch}.expert_count", "0: mixtures of experts are read from safetensors only")

    hidden_size = fields.integer(f"{arch}.embedding_length")
    num_query_heads = fields.integer(f"{arch}.attention.head_count")
    if num_query_heads < 1:
        raise fields.refusal(f"{arch}.attention.head_count", "at least 1")
    head_dim = fields.integer(f"{arch}.attention.key_length", hidden_size // num_query_heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise fields.refusal(key, f"{head_dim}, the width of a head")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{source}: tensor token_embd.weight is missing or not a matrix")
    shape = ModelShape(
        hidden_size=hidden_size,
        num_layers=fields.integer(f"{arch}.block_count"),
        num_query_heads=num_query_heads,
        num_kv_heads=fields.integer(f"{arch}.attention.head_count_kv", num_query_heads),
        head_dim=head_dim,
        ffn_size=fields.integer(f"{arch}.feed_forward_length"),
        vocab_size=embedding.shape[0],
    )
    window = fields.integer(f"{arch}.attention.sliding_window", 0)
    ends = (fields.token_id(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return DecoderConfig(
        family=family.name,
        shape=checked_shape(shape, source),
        max_position=fields.integer(f"{arch}.context_length"),
        norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope=_rope(file, fields, arch, head_dim),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias=family.attention_bias == "qkv" or "blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        ffn_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=family.qk_norm,
        sliding_window=window or None,
        dtype=_dtype(file),
        bos_token_id=fields.token_id("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
    )


def _shown(value: Any) -> str:
    return f"an array of {value.count}" if isinstance(value, GgufArray) else repr(value)


def _rope(file: GgufFile, fields: Fields, arch: str, head_dim: int) -> RopeConfig:
    theta = fields.number(f"{arch}.rope.freq_base", 10000.0)
    kind = fields.get(f"{arch}.rope.scaling.type") or "none"
    factor = fields.number(f"{arch}.rope.scaling.factor", fields.number(f"{arch}.rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise fields.refusal(f"{arch}.rope.scaling.type", "none, linear, or Llama 3.1's factors in rope_freqs.weight")
    if kind == "none" and fields.get(f"{arch}.rope.scaling.type") is None and factor != 1.0:
        kind = "linear"  # files from before `rope.scaling.type` give the factor alone
    scaled = kind == "linear" and factor != 1.0
    if ROPE_FACTORS in file.tensors:
        rope = _llama3_rope(file, theta, head_dim, fields.integer(f"{arch}.rope.scaling.original_context_length", 8192))
        if scaled and rope.scaling != "none":
            raise ModelError(
                f"{file.path}: {ROPE_FACTORS} and linear scaling by {factor} cannot be combined; supported: one of them"
            )
        if rope.scaling != "none":
            return rope
    return RopeConfig(theta=theta, scaling="linear", factor=factor) if scaled else RopeConfig(theta=theta)


def _llama3_rope(file: GgufFile, theta: float, head_dim: int, original_max_position: int) -> RopeConfig:
    """Llama 3.1's scaling, recovered from the factors by which a GGUF file divides the frequencies.

    The converter writes the factors (float32, one a frequency) in place of the four numbers they come from. The last,
    of the longest wavelength, is the scaling factor itself; all others then follow, and are compared.
    """
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.shape != (head_dim // 2,) or gguf_encoding(file, ROPE_FACTORS) != "F32":
        raise ModelError(
            f"{file.path}: tensor {ROPE_FACTORS} has shape {tensor.shape}; expected ({head_dim // 2},) of F32"
        )
    entry = TensorEntry(str(file.path), tensor.offset, 4 * (head_dim // 2), tensor.shape, "F32")
    from phalanx.models.checkpoint import Checkpoint

    with Checkpoint({ROPE_FACTORS: entry}) as checkpoint:
        factors = checkpoint.read(ROPE_FACTORS).numpy().astype(np.float64)
    if np.all(factors == 1.0):
        return RopeConfig(theta=theta)
    rope = RopeConfig(theta, "llama3", float(factors[-1]), 1.0, 4.0, original_max_position)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original_max_position / wavelengths - 1.0) / 3.0, 0.0, 1.0)
    if not np.allclose(factors, 1.0 / ((1.0 - smooth) / rope.factor + smooth), rtol=1e-4):
        raise ModelError(
            f"{file.path}: tensor {ROPE_FACTORS} holds factors up to {factors.max():g} that are not Llama 3.1's for a"
            f" context of {original_max_position} (low_freq_factor 1, high_freq_factor 4); supported: those, or a"
            " safetensors checkpoint"
        )
    return rope


def _dtype(file: GgufFile) -> str:
    sizes: Counter[int] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) == 2:
            sizes[tensor.type_id] += math.prod(tensor.shape)
    most = ENCODING_OF_TYPE_ID.get(sizes.most_common(1)[0][0])
    return {"F32": "float32", "F16": "float16"}.get(most or "", "bfloat16")
