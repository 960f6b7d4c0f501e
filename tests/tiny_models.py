"""Small random models of every family, made and computed by transformers: what the decoder is checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MAX_POSITION = 256
VOCAB = 320  # wider than the 256 bytes of the tokenizer: checkpoints pad theirs too


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A row for `make`: a class of transformers and its configuration.

    dtype: as stored. shard_bytes: of a file, small enough for several files and an index, or None for one file.
    """

    kind: str
    config: Mapping[str, Any]
    seed: int = 0
    dtype: torch.dtype = torch.float32
    shard_bytes: int | None = None


def _shape(hidden: int, heads: int, kv_heads: int, ffn: int, layers: int = 4) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
    }


# Shapes are chosen so that cuts over 2, 3 and 4 ranks are uneven, and KV heads lie on borders.
TINY_MODELS: Mapping[str, TinyModel] = {
    "llama-3.1": TinyModel(
        "Llama",
        {
            **_shape(72, 6, 2, 160),
            "rms_norm_eps": 1e-5,
            # Wavelengths of these 6 pairs are 6 to 1,100 positions: some are kept, some blended, some scaled.
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        shard_bytes=200_000,
    ),
    "llama-biased": TinyModel("Llama", {**_shape(80, 5, 5, 104), "attention_bias": True, "mlp_bias": True}),
    "mistral": TinyModel("Mistral", {**_shape(64, 4, 2, 120), "head_dim": 24, "sliding_window": 10}),
    "qwen2": TinyModel("Qwen2", {**_shape(56, 7, 1, 136), "tie_word_embeddings": True}, dtype=torch.bfloat16),
    "qwen3": TinyModel("Qwen3", {**_shape(60, 6, 3, 100), "head_dim": 20}, seed=1),
    "qwen3-windowed": TinyModel(
        "Qwen3",
        {
            **_shape(60, 4, 2, 100),
            "head_dim": 20,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 14,
            "max_window_layers": 0,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "qwen3-moe": TinyModel(
        "Qwen3Moe",
        {
            **_shape(60, 6, 3, 100),
            "head_dim": 20,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 36,
            "norm_topk_prob": False,
        },
    ),
    "mixtral": TinyModel("Mixtral", {**_shape(64, 4, 2, 52), "num_local_experts": 4, "num_experts_per_tok": 2}, seed=1),
    "smollm2": TinyModel("Llama", {**_shape(72, 9, 3, 144), "tie_word_embeddings": True}),
}


def make(model: TinyModel, directory: Path) -> Path:
    """Saves the model and a byte-level tokenizer as a Hugging Face directory.

    Every parameter is random, those too that transformers starts at 0 or 1, such as biases and norms; and a number of
    bfloat16, so that the error of bfloat16 is that of computing and not of storing.
    """
    import transformers

    config = getattr(transformers, f"{model.kind}Config")(
        vocab_size=VOCAB, max_position_embeddings=MAX_POSITION, bos_token_id=None, eos_token_id=None, **model.config
    )
    network = getattr(transformers, f"{model.kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(model.seed)
    for name, values in network.named_parameters():
        random = torch.randn(values.shape, generator=generator)
        if "norm" in name:
            random = 1 + 0.3 * random
        elif "embed" in name or values.dim() == 1:
            random = 0.5 * random
        else:
            # What layers write outweighs the embedding: else the likeliest token is the one before, again and again.
            random = (2.0 if "o_proj" in name or "down_proj" in name else 1.5) * random / values.shape[-1] ** 0.5
        values.data = random.bfloat16().float()
    network.to(model.dtype).save_pretrained(directory, max_shard_size=model.shard_bytes or "1GB")
    _save_byte_tokenizer(directory / "tokenizer.json")
    return directory


def _save_byte_tokenizer(path: Path) -> None:
    """A token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


class Reference:
    """The model of a directory as transformers computes it."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        # Experts one by one: products of all at once want rows of 16 bytes.
        self._network = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager")

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens), VOCAB] float32."""
        logits: torch.Tensor = self._network(torch.tensor([list(tokens)])).logits[0].float()
        return logits
