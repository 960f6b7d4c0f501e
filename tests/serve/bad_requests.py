"""Requests that a server must refuse, or that are a lot of work to read, and what it must answer to each."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


class BadRequest(NamedTuple):
    """statuses: one of them it must be answered with."""

    name: str
    path: str
    body: bytes
    statuses: tuple[int, ...] = (400,)


def bad_requests(*, long_text: int, max_body: int) -> list[BadRequest]:
    """long_text: characters of a text that is encoded before it is known to be too long. max_body: bytes of a body that
    are taken.
    """

    def completion(name: str, status: int = 400, **fields: Any) -> BadRequest:
        return BadRequest(name, COMPLETIONS, json.dumps({"prompt": "a", "max_tokens": 4, **fields}).encode(), (status,))

    text = "the quick brown fox jumps over the lazy dog; " * (long_text // 45)
    message = {"role": "user", "content": text[:100]}
    return [
        BadRequest("broken JSON", COMPLETIONS, b'{"prompt": "a", "max_tokens"'),
        BadRequest("no JSON", COMPLETIONS, b"\xff\xfe\x00"),
        BadRequest("no object", CHATS, b"[1, 2, 3]"),
        BadRequest("nothing", COMPLETIONS, b""),
        BadRequest("deep nesting", COMPLETIONS, b'{"prompt": ' + b"[" * 100_000),
        BadRequest("too large", COMPLETIONS, b"x" * (max_body + 1), (413,)),
        completion("a type that is wrong", max_tokens="many"),
        completion("a range that is wrong", temperature=-1),
        completion("an unknown field", max_token=4),
        completion("an unknown model", 404, model="none-of-ours"),
        completion("a token that is not there", prompt=[1, 2**31 - 1]),
        completion("a token below zero", prompt=[1, -1]),
        completion("an answer that is too long", max_tokens=10**6),
        completion("a regular expression that is broken", guided_regex="(a"),
        completion("a schema that nothing fits", guided_json={"type": "string", "minLength": 9, "maxLength": 2}),
        completion("two forms at once", guided_regex="a", guided_choice=["b"]),
        completion("a very long text", prompt=text),
        completion("very many tokens", prompt=[1] * 100_000),
        BadRequest("a chat without messages", CHATS, b'{"messages": []}'),
        BadRequest("a role that is unknown", CHATS, b'{"messages": [{"role": "king", "content": "a"}]}'),
        BadRequest("too many messages", CHATS, json.dumps({"messages": [message] * 3000}).encode()),
        BadRequest("a chat that is too long", CHATS, json.dumps({"messages": [message] * 2000}).encode()),
        BadRequest(
            "a long text for its tokens", "/tokenize", json.dumps({"prompt": text[:200_000]}).encode(), (200, 400)
        ),
        BadRequest(
            "a long chat for its tokens", "/tokenize", json.dumps({"messages": [message] * 2000}).encode(), (200, 400)
        ),
        BadRequest("a path that is not there", "/v1/nothing", b"{}", (404,)),
    ]
