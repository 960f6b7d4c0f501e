"""The files of a Hugging Face directory beside the weights: copied, or written for a model that has come as GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phalanx.errors import ModelError
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.families import FAMILIES
from phalanx.models.hf_config import decoder_config, read_json
from phalanx.models.hf_tokenizer import TOKENIZER_FILE
from phalanx.models.resolve import ModelSource
from phalanx.models.tokenizer import Tokenizer

_COPIED = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def write_model_files(
    source: ModelSource, tokenizer: Tokenizer, directory: Path, quantization: Mapping[str, Any]
) -> None:
    """config.json with a `quantization_config`, the tokenizer, and what else describes the model."""
    if source.kind == "gguf":
        config = hf_config_values(source.config, source.location)
        _write_json(directory / "generation_config.json", _token_ids(source.config))
        _write_tokenizer(tokenizer, directory)
    else:
        config = read_json(Path(source.location) / "config.json")
        files = source.hub.tokenizer_directory() if source.hub else Path(source.location)
        for name in (TOKENIZER_FILE, *_COPIED):
            for place in (files, Path(source.location)):
                if (place / name).is_file():
                    shutil.copyfile(place / name, directory / name)
                    break
    _write_json(directory / "config.json", config | {"quantization_config": dict(quantization)})


def hf_config_values(config: DecoderConfig, source: str) -> dict[str, Any]:
    """A config.json as transformers has it. source: for messages. Raises ModelError for what it cannot say."""
    family = next(family for family in FAMILIES if family.name == config.family)
    shape = config.shape
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_query_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
        **_token_ids(config),
    }
    if family.attention_bias == "by-config":
        values["attention_bias"] = config.qkv_bias
    if family.ffn_bias:
        values["mlp_bias"] = config.ffn_bias
    if config.sliding_window is not None:
        values |= {"sliding_window": config.sliding_window, "use_sliding_window": True, "max_window_layers": 0}
    if decoder_config(values, source) != replace(config, quantization=None):
        raise ModelError(
            f"{source}: this {config.family} model has a variation that a config.json of {family.architecture} cannot"
            " say; take its safetensors checkpoint"
        )
    return values


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    match rope.scaling:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": rope.factor}
        case "llama3":
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_position,
            }


def _token_ids(config: DecoderConfig) -> dict[str, Any]:
    ends = list(config.eos_token_ids)
    return {"bos_token_id": config.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.save(directory / TOKENIZER_FILE)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None,
        "chat_template": tokenizer.chat_template,
    }
    _write_json(directory / "tokenizer_config.json", about)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
