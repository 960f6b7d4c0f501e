"""Reading streamed completions cheaply: server-sent events by lines, and of each chunk only what is measured."""

from __future__ import annotations

import msgspec

DONE = b"[DONE]"


class EventLines:
    """Cuts a stream of bytes into the data of its events. Each `data:` line is taken as an event of its own: servers of
    this protocol send JSON on one line.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the lines that end in these bytes, however the stream is cut."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: object = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct, gc=False):
    """Tokens as the server counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    """An event of a streamed completion, of text or of a chat. error: what a server says that fails in mid-stream."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: object = None

    @property
    def finish_reason(self) -> str | None:
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason is not None), None)

    @property
    def has_token(self) -> bool:
        """Whether it brings output. A token may have no text, such as the first half of a character; then it counts
        unless the chunk only opens a chat or ends the stream.
        """
        return any(_has_token(choice) for choice in self.choices)


def _has_token(choice: _Choice) -> bool:
    delta = choice.delta
    if choice.text or (delta and (delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls)):
        return True
    return choice.finish_reason is None and (delta is None or delta.role is None)


class _Message(msgspec.Struct):
    message: str | None = None


class _Refusal(msgspec.Struct):
    error: _Message | str | None = None
    message: str | None = None


_DECODER = msgspec.json.Decoder(Chunk)
_REFUSAL_DECODER = msgspec.json.Decoder(_Refusal)


def read_chunk(data: bytes) -> Chunk:
    """The chunk in an event's data. Raises msgspec.DecodeError for data that is not of this protocol."""
    return _DECODER.decode(data)


def error_message(body: bytes) -> str:
    """What a server says in the body of an error, on one line: in OpenAI's shape, or else as it stands."""
    try:
        refusal = _REFUSAL_DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        refusal = _Refusal()
    said = refusal.error.message if isinstance(refusal.error, _Message) else refusal.error
    words = said or refusal.message or body.decode(errors="replace")
    return " ".join(words.split())[:300]
