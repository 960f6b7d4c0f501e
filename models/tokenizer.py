"""Text to tokens and back, whole or token by token."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from phalanx.errors import ModelError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    import tokenizers

_SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
_LONG_TEXT = 4096  # characters, encoded in about a millisecond


class Tokenizer:
    """A tokenizer over `tokenizers.Tokenizer`, made by `hf_tokenizer` or `gguf_tokenizer`.

    bos_token, eos_token: their text, as chat templates want it; empty where there is none. bos_token_id: or None.
    eos_token_ids: the tokens that end a text. chat_template: Jinja source, or None. source: file, for messages.

    Decoding is done here, by bytes, so that a stream of tokens decodes to the same text as all of them at once: bytes
    that are not UTF-8 become U+FFFD, one for each longest prefix of a character (as in the WHATWG encoding standard).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        source: str,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        bos_token: str = "",
        eos_token: str = "",
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.source = source
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        self._special = frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)
        self._to_bytes, self.strips_leading_space = _byte_decoder(backend, source)
        self._bytes: dict[int, bytes] = {}  # of tokens, as far as they have been asked for

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that stand for no text, such as those that begin and end one."""
        return self._special

    @property
    def special_texts(self) -> frozenset[str]:
        """The texts of the control tokens, which are left out of what is decoded."""
        return frozenset(self._backend.id_to_token(token) or "" for token in self._special) - {""}

    def save(self, path: Path) -> None:
        """As a `tokenizer.json`."""
        self._backend.save(str(path))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it are taken as such.

        add_special_tokens: whether to add what the model wants around a text, such as a first token; False for text
        that a chat template has rendered, which has it already. Raises RequestError for text that is not valid Unicode.
        """
        try:
            if len(text) < _LONG_TEXT:
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            # Of its ways only those for several texts leave the interpreter to other threads meanwhile.
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:  # the library's word for a str that UTF-8 cannot express
            lone = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            if lone is None:
                raise
            raise RequestError(f"the text is not valid Unicode: a lone surrogate at character {lone}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids outside of the vocabulary, as of padding rows, have no text."""
        data = b"".join(self.token_bytes(token, skip_special_tokens) for token in ids)
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes that one token stands for: part of a character, or several. Empty for a token without text."""
        if skip_special_tokens and token in self._special:
            return b""
        known = self._bytes.get(token)
        if known is None:
            content = self._backend.id_to_token(token)
            known = self._bytes[token] = b"" if content is None else self._to_bytes(content)
        return known

    def stream(self, skip_special_tokens: bool = True, continuation: bool = False) -> TextStream:
        """A new `TextStream`."""
        return TextStream(self, skip_special_tokens, continuation)


class TextStream:
    """Decodes tokens as they come. Each costs the same, however many came before.

    continuation: whether the text goes on from one already shown (a prompt), so that a SentencePiece model's leading
    space is kept; without it the pieces join to exactly `Tokenizer.decode` of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = tokenizer.strips_leading_space and not continuation

    def push(self, token: int) -> str:
        """The text that is final with this token; a character whose bytes have not all come is held back."""
        data = self._tokenizer.token_bytes(token, self._skip_special_tokens)
        if self._strip_next and data:
            data, self._strip_next = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that stayed incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def _byte_decoder(backend: tokenizers.Tokenizer, source: str) -> tuple[Callable[[str], bytes], bool]:
    """From a token's content to its bytes; and whether the decoder strips one leading space from a text."""
    state: dict[str, Any] = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    steps = state.get("decoders", []) if state.get("type") == "Sequence" else [state]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_bytes, False
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
        replaces_mark = steps[0].get("pattern") == {"String": _SPACE_MARK} and steps[0].get("content") == " "
        strip = steps[3:]
        strips_one = len(strip) == 1 and strip[0] == {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if replaces_mark and (strips_one or not strip):
            return _sentencepiece_bytes, strips_one
    found = " + ".join(str(kind) for kind in kinds)
    raise ModelError(
        f"{source}: the decoder {found} is not supported; supported: ByteLevel (GPT-2, Llama 3, Qwen), and "
        "Replace + ByteFallback + Fuse (+ Strip), as of SentencePiece models"
    )


def byte_alphabet() -> dict[int, str]:
    """How GPT-2's byte-level vocabularies write each byte: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(0x100 + len(alphabet) - len(printable))
    return alphabet


_BYTE_OF_CHARACTER = {character: byte for byte, character in byte_alphabet().items()}


def _byte_level_bytes(content: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in content])
    except KeyError:  # an added token, written as it is
        return content.encode()


def _sentencepiece_bytes(content: str) -> bytes:
    if len(content) == 6 and content.startswith("<0x") and content.endswith(">"):
        try:
            return bytes([int(content[3:5], 16)])
        except ValueError:
            pass
    return content.replace(_SPACE_MARK, " ").encode()
