"""The table of model families: what each is called, and which of the known variations it has.

Canonical tensor names, used everywhere past the reading of files, are those of Hugging Face's Llama, and of experts
those of its Qwen3-MoE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from phalanx.models.config import DecoderConfig
from phalanx.parallel.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Mixture:
    """A family's mixtures of experts.

    ffn_size: key in config.json of an expert's columns. renormalise: whether the weights of a token's experts add up to
    1, or whether `norm_topk_prob` says so. stored_names: pairs of a part of a canonical name and what stands for it in
    safetensors files.
    """

    ffn_size: str
    renormalise: Literal["always", "by-config"]
    stored_names: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """One family of decoders.

    name: as in `DecoderConfig.family`. architecture: in the `architectures` of a Hugging Face config.json.
    gguf_arch: `general.architecture` of its GGUF files, or None where those carry another family's.
    config_defaults: values of keys that a config.json may leave out, as transformers' configuration class has them.
    attention_bias: which projections have biases: `never`, `qkv`, or `by-config` (`attention_bias`: query, key, value
    and output). ffn_bias: whether the feed-forward has biases where `mlp_bias` says so. qk_norm: RMSNorm on query and
    key heads.
    window: which layers attend through `sliding_window`: none, all, or (where `use_sliding_window`) all or those from
    `max_window_layers` on. mixture: in place of the feed-forward, or None. gguf_interleaved: whether its GGUF files
    carry query and key rows in interleaved order.
    """

    name: str
    architecture: str
    gguf_arch: str | None
    config_defaults: Mapping[str, object] = field(default_factory=dict)
    attention_bias: Literal["never", "qkv", "by-config"] = "never"
    ffn_bias: bool = False
    qk_norm: bool = False
    window: Literal["none", "all", "flagged", "upper-layers"] = "none"
    mixture: Mixture | None = None
    gguf_interleaved: bool = False


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        gguf_arch="llama",
        config_defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        attention_bias="by-config",
        ffn_bias=True,
        gguf_interleaved=True,
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        gguf_arch=None,  # written as `llama`
        config_defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        window="all",
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        gguf_arch="qwen2",
        config_defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        attention_bias="qkv",
        window="upper-layers",
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        gguf_arch="qwen3",
        config_defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        attention_bias="by-config",
        qk_norm=True,
        window="upper-layers",
    ),
    Family(
        name="qwen3-moe",
        architecture="Qwen3MoeForCausalLM",
        gguf_arch=None,
        config_defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        attention_bias="by-config",
        qk_norm=True,
        window="flagged",
        mixture=Mixture("moe_intermediate_size", "by-config"),
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        gguf_arch=None,  # written as `llama`
        config_defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        window="all",
        mixture=Mixture(
            "intermediate_size",
            "always",
            (
                (".mlp.", ".block_sparse_moe."),
                (".gate_proj.", ".w1."),
                (".up_proj.", ".w3."),
                (".down_proj.", ".w2."),
            ),
        ),
    ),
)


def family_of(*, architecture: str | None = None, gguf_arch: str | None = None) -> Family | None:
    """The family with this Hugging Face architecture, or this GGUF architecture; None where there is none."""
    for family in FAMILIES:
        if architecture is not None and family.architecture == architecture:
            return family
        if gguf_arch is not None and family.gguf_arch == gguf_arch:
            return family
    return None


def ffn_names(shape: ModelShape, mlp: str) -> list[str]:
    """What the names of a layer's feed-forward begin with, or those of each of its experts. mlp: of the block."""
    return [f"{mlp}.experts.{expert}" for expert in range(shape.num_experts)] or [mlp]


def stored_name(family: str, name: str) -> str:
    """What a tensor of this canonical name is called in a family's safetensors files."""
    mixture = next(row.mixture for row in FAMILIES if row.name == family)
    for canonical, stored in mixture.stored_names if mixture is not None else ():
        name = name.replace(canonical, stored)
    return name


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape (outermost dimension first) of every tensor that a checkpoint of this model must hold.

    A tied head is not among them.
    """
    shape = config.shape
    hidden, ffn = shape.hidden_size, shape.ffn_size
    queries, keys = shape.num_query_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        expected[prefix + "input_layernorm.weight"] = (hidden,)
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            expected[f"{prefix}self_attn.{name}_proj.weight"] = (size, hidden)
            if config.qkv_bias:
                expected[f"{prefix}self_attn.{name}_proj.bias"] = (size,)
        expected[prefix + "self_attn.o_proj.weight"] = (hidden, queries)
        if config.o_bias:
            expected[prefix + "self_attn.o_proj.bias"] = (hidden,)
        if config.qk_norm:
            expected[prefix + "self_attn.q_norm.weight"] = (shape.head_dim,)
            expected[prefix + "self_attn.k_norm.weight"] = (shape.head_dim,)
        expected[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if shape.num_experts:
            expected[prefix + "mlp.gate.weight"] = (shape.num_experts, hidden)
        for ffn_name in ffn_names(shape, prefix + "mlp"):
            for name, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
                expected[f"{ffn_name}.{name}_proj.weight"] = (rows, columns)
                if config.ffn_bias:
                    expected[f"{ffn_name}.{name}_proj.bias"] = (rows,)
    expected["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        expected["lm_head.weight"] = (shape.vocab_size, hidden)
    return expected
