"""A tokenizer from the files of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phalanx.errors import ModelError
from phalanx.models.config import DecoderConfig
from phalanx.models.hf_config import read_json
from phalanx.models.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


def hf_tokenizer(directory: Path, config: DecoderConfig) -> Tokenizer:
    """The tokenizer in `tokenizer.json`, with what `tokenizer_config.json` and `chat_template.jinja` say.

    The tokens that end a text are the model's own (`config.eos_token_ids`), else `eos_token` of tokenizer_config.json.
    Raises ModelError, naming the file, where it is missing or cannot be used.
    """
    import tokenizers

    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(
            f"{path}: missing; make it from the model's other tokenizer files with "
            "`AutoTokenizer.from_pretrained(directory).save_pretrained(directory)` of transformers"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise ModelError(f"{path}: not a tokenizer that can be read: {error}") from error
    about_path = directory / "tokenizer_config.json"
    about = read_json(about_path) if about_path.is_file() else {}
    bos_token, eos_token = _content(about.get("bos_token")), _content(about.get("eos_token"))
    bos_id = backend.token_to_id(bos_token) if bos_token else config.bos_token_id
    eos_id = backend.token_to_id(eos_token) if eos_token else None
    eos_ids = config.eos_token_ids or (() if eos_id is None else (eos_id,))
    return Tokenizer(
        backend,
        source=str(path),
        bos_token_id=bos_id,
        eos_token_ids=eos_ids,
        bos_token=bos_token or _token(backend.id_to_token, bos_id),
        eos_token=eos_token or _token(backend.id_to_token, eos_ids[0] if eos_ids else None),
        chat_template=_chat_template(directory, about),
    )


def _content(token: Any) -> str:
    """The text of a token that is given as text or as a description."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _token(id_to_token: Any, token: int | None) -> str:
    return "" if token is None else id_to_token(token) or ""


def _chat_template(directory: Path, about: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = about.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
