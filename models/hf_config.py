"""A decoder's configuration from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phalanx.errors import ModelError
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.families import FAMILIES, Family, family_of
from phalanx.models.fields import Fields, checked_shape
from phalanx.models.stored_quantization import StoredQuantization, stored_quantization
from phalanx.parallel.shape import ModelShape

_MAX_JSON_BYTES = 64 << 20

# Settings of related models that would change what this decoder computes, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "partial_rotary_factor": (None, 1),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "decoder_sparse_step": (None, 1),
    "mlp_only_layers": (None, []),
}
_EXPERT_KEYS = ("num_experts", "num_local_experts")

_DTYPES = ("float32", "float16", "bfloat16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError where there is none or it is not one."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(
                f"{path}: {path.stat().st_size} bytes is too long for a file of settings (at most {_MAX_JSON_BYTES})"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_hf_config(path: Path) -> DecoderConfig:
    """The configuration in a config.json, with the end-of-sequence tokens of a generation_config.json beside it."""
    generation = path.with_name("generation_config.json")
    return decoder_config(read_json(path), str(path), read_json(generation) if generation.is_file() else None)


def decoder_config(
    values: Mapping[str, Any], source: str = "config.json", generation: Mapping[str, Any] | None = None
) -> DecoderConfig:
    """A DecoderConfig from the contents of config.json, as written by transformers 4 or 5, and of
    generation_config.json.

    source: path for messages. The data type defaults to float32, as in transformers.
    Raises ModelError, naming file, key, value and what is supported, for whatever would change the results and is not
    understood.
    """
    family = _family(values, source)
    fields = Fields(values, source, family.config_defaults)
    mixture = family.mixture
    for key, neutral in _NEUTRAL.items():
        if values.get(key) not in neutral and not (mixture is not None and key in _EXPERT_KEYS):
            wanted = " or ".join("absent" if value is None else repr(value) for value in neutral)
            raise fields.refusal(key, wanted)
    num_query_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if num_query_heads < 1:
        raise fields.refusal("num_attention_heads", "at least 1")
    shape = ModelShape(
        hidden_size=hidden_size,
        num_layers=fields.integer("num_hidden_layers"),
        num_query_heads=num_query_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_query_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_query_heads),
        ffn_size=fields.integer("intermediate_size" if mixture is None else mixture.ffn_size),
        vocab_size=fields.integer("vocab_size"),
        num_experts=0 if mixture is None else _num_experts(fields),
        experts_per_token=0 if mixture is None else fields.integer("num_experts_per_tok"),
    )
    max_position = fields.integer("max_position_embeddings")
    by_config = family.attention_bias == "by-config" and fields.flag("attention_bias")
    generated = Fields(generation or {}, source.replace("config.json", "generation_config.json"))
    return DecoderConfig(
        family=family.name,
        shape=checked_shape(shape, source),
        max_position=max_position,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, max_position),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=by_config or family.attention_bias == "qkv",
        o_bias=by_config,
        ffn_bias=family.ffn_bias and fields.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        renormalise_experts=mixture is not None and (mixture.renormalise == "always" or fields.flag("norm_topk_prob")),
        sliding_window=_window(fields, family, shape.num_layers),
        dtype=_dtype(fields),
        bos_token_id=fields.token_id("bos_token_id"),
        eos_token_ids=generated.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
        quantization=_quantization(fields),
    )


def _quantization(fields: Fields) -> StoredQuantization | None:
    found = fields.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise fields.refusal("quantization_config", "an object")
    return stored_quantization(Fields(found, f"{fields.source}: quantization_config"))


def _family(values: Mapping[str, Any], source: str) -> Family:
    found = values.get("architectures")
    names = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    for name in names:
        family = family_of(architecture=name)
        if family is not None:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    if not names:
        raise ModelError(f"{source}: architectures is {found!r}, which names no model; supported: {supported}")
    raise ModelError(f"{source}: the architecture {', '.join(names)} is unknown; supported: {supported}")


def _rope(fields: Fields, max_position: int) -> RopeConfig:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of transformers 4."""
    key = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    parameters = fields.get(key) or {}
    if not isinstance(parameters, dict):
        raise fields.refusal(key, "an object")
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    if nested:  # one set a type of layer; all layers of this decoder share one
        if any(value != nested[0] for value in nested):
            raise fields.refusal(key, "the same parameters for every layer")
        parameters = nested[0]
    rope = Fields(parameters, f"{fields.source}: {key}", {"rope_theta": fields.get("rope_theta")})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise rope.refusal("partial_rotary_factor", "1")
    theta = rope.number("rope_theta", 10000.0)
    match kind:
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig(theta=theta, scaling="linear", factor=rope.number("factor"))
        case "llama3":
            return RopeConfig(
                theta=theta,
                scaling="llama3",
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_position=rope.integer("original_max_position_embeddings", max_position),
            )
    raise ModelError(f"{rope.source}: rope_type is {kind!r}; supported: default, linear, llama3")


def _num_experts(fields: Fields) -> int:
    """As transformers 4 and 5 write it."""
    found = [key for key in _EXPERT_KEYS if fields.values.get(key) is not None] or [_EXPERT_KEYS[0]]
    counts = [fields.integer(key) for key in found]
    if counts[0] < 1 or counts[0] != counts[-1]:
        raise fields.refusal(found[0], "at least 1" if counts[0] < 1 else f"{counts[-1]}, as {found[-1]} has it")
    return counts[0]


def _window(fields: Fields, family: Family, num_layers: int) -> int | None:
    """The sliding window that all layers share, or None. Null means none; an absent key takes the family's default."""
    if family.window == "none" or (
        family.window in ("flagged", "upper-layers") and not fields.flag("use_sliding_window")
    ):
        return None
    if fields.values.get("sliding_window", fields.get("sliding_window")) is None:
        return None
    window = fields.integer("sliding_window")
    if window < 1:
        raise fields.refusal("sliding_window", "at least 1, or null")
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers") if family.window == "upper-layers" else 0
        with_window = max(0, num_layers - max(0, first))
        key = "max_window_layers"
    elif isinstance(layer_types, list) and set(layer_types) <= {"full_attention", "sliding_attention"}:
        with_window, key = layer_types.count("sliding_attention"), "layer_types"
    else:
        raise fields.refusal("layer_types", "full_attention and sliding_attention")
    if with_window not in (0, num_layers):
        raise ModelError(
            f"{fields.source}: {key} gives {with_window} of {num_layers} layers a sliding window of {window}; "
            "supported: all layers or none"
        )
    return window if with_window else None


def _dtype(fields: Fields) -> str:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(key)
    name = str(value or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise fields.refusal(key, ", ".join(_DTYPES))
    return name
