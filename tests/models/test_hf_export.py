"""Files of a Hugging Face directory that are written for models that have come as GGUF."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from phalanx.errors import ModelError
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.hf_config import decoder_config, read_hf_config
from phalanx.models.hf_export import hf_config_values, write_model_files
from phalanx.models.hf_tokenizer import hf_tokenizer
from phalanx.models.resolve import ModelSource
from phalanx.parallel.shape import ModelShape

SHAPE = ModelShape(
    hidden_size=96, num_layers=2, num_query_heads=6, num_kv_heads=3, head_dim=24, ffn_size=160, vocab_size=90
)
LLAMA = DecoderConfig("llama", SHAPE, 64, 1e-5, RopeConfig(500.0), bos_token_id=1, eos_token_ids=(2,))
QWEN2 = replace(LLAMA, family="qwen2", qkv_bias=True, bos_token_id=None)
CONFIGS = {
    "llama": LLAMA,
    "llama, biased and tied": replace(LLAMA, qkv_bias=True, o_bias=True, ffn_bias=True, tie_embeddings=True),
    "llama-3.1": replace(LLAMA, rope=RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 32), eos_token_ids=(2, 5)),
    "linear": replace(LLAMA, rope=RopeConfig(1e4, "linear", 4.0)),
    "qwen2, windowed": replace(QWEN2, sliding_window=14, dtype="float16"),
    "qwen3": replace(LLAMA, family="qwen3", qk_norm=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_is_read_as_it_was_written(config: DecoderConfig) -> None:
    values = json.loads(json.dumps(hf_config_values(config, "model.gguf")))
    assert decoder_config(values) == config


def test_transformers_reads_it_alike() -> None:
    from transformers import AutoConfig

    config = CONFIGS["llama-3.1"]
    values = hf_config_values(config, "model.gguf")
    found = AutoConfig.for_model(**values)
    assert (found.head_dim, found.num_key_value_heads, found.rms_norm_eps) == (24, 3, 1e-5)
    assert found.rope_parameters["rope_type"] == "llama3"
    assert found.rope_parameters["rope_theta"] == 5e5
    assert found.rope_parameters["original_max_position_embeddings"] == 32


def test_what_a_configuration_cannot_say_is_refused() -> None:
    """A window, which GGUF files of Mistral carry under Llama's name."""
    with pytest.raises(ModelError, match=r"model\.gguf: this llama model has a variation"):
        hf_config_values(replace(LLAMA, sliding_window=8), "model.gguf")


def test_a_tokenizer_of_a_gguf_file_is_read_as_it_was_written(smollm2: ModelSource, tmp_path: Path) -> None:
    before = smollm2.tokenizer()
    write_model_files(smollm2, before, tmp_path, {"quant_method": "fp8"})
    config = read_hf_config(tmp_path / "config.json")
    assert replace(config, quantization=None) == smollm2.config
    after = hf_tokenizer(tmp_path, config)
    text = "Why is 12 345 blue?\n\tdéjà vu <|im_start|>user"
    assert after.encode(text) == before.encode(text)
    for name in ("bos_token", "eos_token", "bos_token_id", "eos_token_ids", "chat_template"):
        assert getattr(after, name) == getattr(before, name), name
