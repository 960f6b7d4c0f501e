"""Text that activations are measured on before weights are quantised."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import torch

from phalanx.errors import ModelError
from phalanx.models.tokenizer import Tokenizer

# Prose, code and tables, of packages that this one is installed with.
_PACKAGES = ("torch", "fastapi", "pydantic", "rich", "huggingface_hub", "typer", "llguidance", "tokenizers", "numpy")
_PACKAGE_CHARACTERS = 12_000

WINDOW_TOKENS = 256
NUM_WINDOWS = 8


def default_text() -> str:
    """What the packages that Phalanx needs say of themselves (the descriptions on their pages of the package index)."""
    return "\n\n".join(_description(name)[:_PACKAGE_CHARACTERS] for name in _PACKAGES)


def _description(package: str) -> str:
    try:
        message = metadata(package)
    except PackageNotFoundError:  # by another name, as builds of torch for some devices are
        return ""
    return str(message.get("Description") or message.get_payload() or "")  # type: ignore[attr-defined]


def read_text(file: Path) -> str:
    """Raises ModelError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read as a calibration text in UTF-8: {error}") from error


def calibration_windows(text: str, tokenizer: Tokenizer, max_position: int) -> torch.Tensor:
    """Pieces of a text from its start to its end, [windows, tokens] int64. Raises ModelError where it is too short."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    size = min(WINDOW_TOKENS, max_position)
    if len(tokens) < size:
        raise ModelError(
            f"the calibration text has {len(tokens)} tokens, but a sequence of {size} is needed; give a longer one"
            f" ({size * NUM_WINDOWS} tokens and more are best) with --calibration"
        )
    count = min(NUM_WINDOWS, len(tokens) // size)
    starts = [window * (len(tokens) - size) // max(1, count - 1) for window in range(count)]
    return torch.tensor([tokens[start : start + size] for start in starts])
