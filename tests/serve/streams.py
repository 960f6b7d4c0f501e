"""Requests over HTTP and what they are answered, as a whole or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import msgspec

DONE = b"[DONE]"


class Choice(NamedTuple):
    """One completion, as it was answered."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None


class Asked(NamedTuple):
    """A request. body: without `stream`."""

    path: str
    body: Mapping[str, Any]


class WrongAnswerError(Exception):
    """An answer that is not the one that must come."""


class BusyError(Exception):
    """The server has no room for now."""


@dataclass
class Heard:
    """What has come of one completion in a stream."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        self.token_ids += chunk.get("token_ids") or ()
        self.text += (chunk["delta"].get("content") or "") if "delta" in chunk else chunk["text"]
        self.finish_reason = chunk["finish_reason"] or self.finish_reason


async def ask(session: aiohttp.ClientSession, asked: Asked) -> tuple[Choice, ...]:
    """The answer as a whole. Raises BusyError, and WrongAnswerError for what is none."""
    async with session.post(asked.path, json=asked.body) as response:
        await check_status(response)
        return choices_of(await response.json(loads=msgspec.json.decode))


async def stream(session: aiohttp.ClientSession, asked: Asked) -> tuple[Choice, ...]:
    """The same, as it comes in a stream."""
    async with open_stream(session, asked) as response:
        return choices_in([data async for data in events(response)])


@asynccontextmanager
async def open_stream(session: aiohttp.ClientSession, asked: Asked) -> AsyncIterator[aiohttp.ClientResponse]:
    """A stream that has begun."""
    async with session.post(asked.path, json={**asked.body, "stream": True}) as response:
        await check_status(response)
        yield response


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each event of a stream."""
    async for line in response.content:
        for data in data_of([line]):
            yield data


def data_of(lines: Iterable[bytes]) -> list[bytes]:
    """The data in lines of a stream; comments are left out."""
    return [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]


def choices_of(answer: Mapping[str, Any]) -> tuple[Choice, ...]:
    """Of an answer that came as a whole."""
    return tuple(
        Choice(
            tuple(each["token_ids"]),
            each["text"] if "text" in each else each["message"]["content"],
            each["finish_reason"],
        )
        for each in sorted(answer["choices"], key=lambda each: int(each["index"]))
    )


def choices_in(found: Sequence[bytes]) -> tuple[Choice, ...]:
    """Of a stream that has ended."""
    if not found or found[-1] != DONE:
        raise WrongAnswerError(f"a stream ended with {found[-1:]}, not with {DONE!r}")
    heard = heard_in(found)
    return tuple(Choice(tuple(each.token_ids), each.text, each.finish_reason) for _, each in sorted(heard.items()))


def heard_in(found: Iterable[bytes]) -> dict[int, Heard]:
    """What the events of a stream come to so far, by the index of the choice."""
    heard: dict[int, Heard] = {}
    for data in found:
        if data == DONE:
            continue
        event = msgspec.json.decode(data)
        if "error" in event:
            raise WrongAnswerError(f"a stream was broken off: {event['error']}")
        for each in event["choices"]:
            heard.setdefault(each["index"], Heard()).add(each)
    return heard


async def check_status(response: aiohttp.ClientResponse) -> None:
    if response.status == 429:
        raise BusyError
    if response.status != 200:
        raise WrongAnswerError(f"HTTP {response.status}: {(await response.text())[:200]}")


def bytes_of(asked: Asked) -> bytes:
    """The request as it goes over a connection."""
    body = msgspec.json.encode(asked.body)
    head = (
        f"POST {asked.path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    return head.encode() + b"\r\n" + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next answer on a connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    [length] = [int(line.removeprefix("content-length:")) for line in lines if line.startswith("content-length:")]
    return int(lines[0].split()[1]), await reader.readexactly(length)
