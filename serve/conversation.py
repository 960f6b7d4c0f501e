"""Messages as clients send them, made ready for a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from phalanx.serve.errors import ApiError
from phalanx.serve.protocol import ChatRequest, Message, TextPart, TokenizeRequest, Tool


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given. settings: its other variables."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, wanted: ChatRequest | TokenizeRequest, tools: Sequence[Tool] | None) -> Self:
        """Raises ApiError for messages that cannot be told in a template."""
        settings = dict(wanted.chat_template_kwargs or {})
        if isinstance(wanted, ChatRequest) and wanted.reasoning_effort is not None:
            settings["reasoning_effort"] = wanted.reasoning_effort
        for name in settings:
            if name in RESERVED:
                raise ApiError(
                    400,
                    f"chat_template_kwargs sets {name}, which is the request's to say",
                    param="chat_template_kwargs",
                )
        return cls(
            [_plain(message) for message in wanted.messages or ()],
            [tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
            wanted.add_generation_prompt is not False,
            settings,
        )

    @property
    def num_characters(self) -> int:
        """What a template may write at least: of a number it is not known how long it comes out."""
        return _size([self.messages, self.tools, self.settings])


RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "template", "self")


def _plain(message: Message) -> dict[str, Any]:
    """As templates know it: text in one piece, arguments of calls as data."""
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content if isinstance(part, TextPart))
    plain["content"] = content
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
        plain["content"] = content or ""
    plain.update({name: value for name, value in (message.model_extra or {}).items() if value is not None})
    if content is None and not message.tool_calls:
        raise ApiError(400, f"a message of role {message.role} has no content; give it text", param="messages")
    return plain


def _arguments(text: str) -> Any:
    """Data where it is JSON, else the text: a call that was cut off may be part of a conversation too."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _size(value: Any) -> int:
    """Characters of all texts in nested data, one for anything else. Without recursion: a client chooses its depth."""
    size, left = 0, [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, dict):
            left.extend(each.values())
            size += sum(map(len, each))
        elif isinstance(each, list):
            left.extend(each)
        else:
            size += 1
    return size
