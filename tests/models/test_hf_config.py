"""config.json against transformers' own configuration classes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from phalanx.errors import ModelError
from phalanx.models.config import RopeConfig
from phalanx.models.families import FAMILIES, expected_tensors
from phalanx.models.hf_config import decoder_config, read_hf_config

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3-moe": transformers.Qwen3MoeConfig,
    "mixtral": transformers.MixtralConfig,
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 32}),
    ("mistral", {}),
    ("mistral", {"head_dim": 32, "sliding_window": None}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"attention_bias": True}),
]


def values(family: str, **settings: Any) -> dict[str, Any]:
    """What `save_pretrained` writes for this configuration."""
    architecture = next(row.architecture for row in FAMILIES if row.name == family)
    config = CONFIGS[family](**{**SIZES, **settings}, architectures=[architecture])
    written: dict[str, Any] = json.loads(config.to_json_string())
    return written


def llama(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], **SIZES, **changes}


@pytest.mark.parametrize(("family", "settings"), VARIATIONS)
def test_the_tensors_expected_are_those_of_transformers(family: str, settings: dict[str, Any]) -> None:
    architecture = next(row.architecture for row in FAMILIES if row.name == family)
    model = getattr(transformers, architecture)(CONFIGS[family](**{**SIZES, **settings}))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if settings.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    assert expected_tensors(decoder_config(values(family, **settings))) == state


@pytest.mark.parametrize("family", CONFIGS)
def test_absent_keys_take_the_defaults_of_transformers(family: str) -> None:
    sizes = {**SIZES, "num_attention_heads": 32}
    del sizes["num_key_value_heads"]
    config = CONFIGS[family](**sizes)
    architecture = next(row.architecture for row in FAMILIES if row.name == family)
    ours = decoder_config({"architectures": [architecture], **sizes})
    assert ours.shape.num_kv_heads == config.num_key_value_heads
    assert ours.max_position == config.max_position_embeddings
    assert ours.norm_eps == config.rms_norm_eps
    assert ours.rope == RopeConfig(theta=config.rope_parameters["rope_theta"])
    assert ours.tie_embeddings == config.tie_word_embeddings
    assert ours.sliding_window == getattr(config, "sliding_window", None)
    assert ours.bos_token_id == config.bos_token_id
    assert ours.eos_token_ids == (() if config.eos_token_id is None else (config.eos_token_id,))
    if getattr(config, "head_dim", None) is not None:
        assert ours.shape.head_dim == config.head_dim


@pytest.mark.parametrize("family", CONFIGS)
def test_what_transformers_writes_is_read_back(family: str, tmp_path: Path) -> None:
    settings = {"max_position_embeddings": 99, "rms_norm_eps": 3e-5, "bos_token_id": 5, "eos_token_id": [6, 7]}
    config = CONFIGS[family](**SIZES, **settings, dtype="bfloat16", architectures=["x"])
    config.architectures = [next(row.architecture for row in FAMILIES if row.name == family)]
    config.save_pretrained(tmp_path)
    ours = read_hf_config(tmp_path / "config.json")
    assert (ours.max_position, ours.norm_eps, ours.bos_token_id) == (99, 3e-5, 5)
    assert ours.eos_token_ids == (6, 7)
    assert ours.dtype == "bfloat16"
    assert ours.family == family


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_llama3_scaling_is_read_as_transformers_4_and_5_write_it(rope: dict[str, Any]) -> None:
    assert decoder_config(llama(**rope)).rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    "rope",
    [{"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_parameters": {"rope_type": "linear", "factor": 2}}],
)
def test_linear_scaling_is_read(rope: dict[str, Any]) -> None:
    assert decoder_config(llama(**rope)).rope == RopeConfig(10000.0, "linear", 2.0)


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("llama", {"sliding_window": 8}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 8}, 8),
        ("qwen2", {"sliding_window": 8}, None),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 8),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_the_sliding_window_follows_the_familys_rules(
    family: str, settings: dict[str, Any], window: int | None
) -> None:
    architecture = next(row.architecture for row in FAMILIES if row.name == family)
    assert decoder_config({"architectures": [architecture], **SIZES, **settings}).sliding_window == window


def test_a_window_in_some_layers_only_is_refused() -> None:
    mixed = values("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ModelError, match="1 of 2 layers a sliding window of 8; supported: all layers or none"):
        decoder_config(mixed)


def test_the_end_tokens_of_generation_config_come_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama(eos_token_id=2)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert read_hf_config(tmp_path / "config.json").eos_token_ids == (7, 8)


@pytest.mark.parametrize(("key", "name"), [("dtype", "float16"), ("torch_dtype", "bfloat16"), ("x", "float32")])
def test_the_data_type_is_read_under_both_names(key: str, name: str) -> None:
    assert decoder_config(llama(**{key: name})).dtype == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GptOssForCausalLM"]}, "architecture GptOssForCausalLM is unknown; supported: LlamaForCau"),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: .*'silu'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn'; supported: default, linear, lla",
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; supported: 1"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        (
            {"quantization_config": {"quant_method": "bnb"}},
            "quantization_config: quant_method is 'bnb'; supported: awq, gptq",
        ),
        ({"quantization_config": 4}, "quantization_config is 4; supported: an object"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'; supported: float32, float16, bfloat16"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'; supported: a whole number"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 KV heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; supported: a token id"),
        ({"attention_bias": 1}, "attention_bias is 1; supported: true or false"),
    ],
)
def test_what_would_change_the_results_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"^dir/config.json.*{message}"):
        decoder_config(llama(**changes), "dir/config.json")


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])  # of transformers 4, and of 5
def test_a_mixtures_sizes_are_those_of_its_experts(key: str) -> None:
    sizes = {**SIZES, key: 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
    config = decoder_config({"architectures": ["Qwen3MoeForCausalLM"], **sizes})
    assert (config.shape.num_experts, config.shape.experts_per_token, config.shape.ffn_size) == (6, 3, 40)
    assert config.renormalise_experts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: absent or 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; supported: absent or \[\]"),
        ({"num_experts": 0}, "num_experts is 0; supported: at least 1"),
        ({"num_experts": 6, "num_local_experts": 8}, "num_experts is 6; supported: 8, as num_local_experts"),
        ({"num_experts": 6}, "8 experts a token are more than the 6"),
    ],
)
def test_mixtures_that_cannot_be_run_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decoder_config({"architectures": ["Qwen3MoeForCausalLM"], **SIZES, **changes})


def test_a_model_without_experts_must_not_speak_of_them() -> None:
    with pytest.raises(ModelError, match="num_experts is 8; supported: absent or 0"):
        decoder_config(llama(num_experts=8))


@pytest.mark.parametrize("content", ["{", "[]", "\ufeff{}"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_hf_config(path)
