"""A tiny model that takes long prompts, with a tokenizer that has work to do on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.serve.live import sections
from tests.tiny_models import VOCAB

MAX_POSITION = 16384
LONG_TEXT = 2**20 - 2**12  # characters that are just not too many to be encoded
SAMPLE = "the quick brown fox jumps over the lazy dog; a heron counted boats under the old stone bridge "


def soak_sections(folder: Path, *, max_sequences: int, kv_cache: str, **serve: Any) -> dict[str, Any]:
    """A configuration in which texts of `LONG_TEXT` characters are encoded before they are refused."""
    made = sections(folder, **serve)
    model = Path(made["model"]["path"])
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": MAX_POSITION}))
    _save_tokenizer(model / "tokenizer.json")
    made["engine"] = {"max_sequences": max_sequences, "kv_cache": kv_cache, "page_size": 16}
    return made


def _save_tokenizer(path: Path) -> None:
    """Bytes and what is frequent; the longest token has 32 of them, which is what bounds a text that may fit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SAMPLE * 20, "=" * 640], trainer)
    tokenizer.save(str(path))
