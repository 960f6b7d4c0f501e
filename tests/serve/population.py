"""Clients of every kind, all at once: those that behave, those that leave, those that do not read, those that err.

What each request must be answered is known before. From then on every answer is compared with that, token by token, so
that one that is lost, or that another client got, is seen.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
from tests.serve.bad_requests import BadRequest
from tests.serve.streams import (
    Asked,
    BusyError,
    Choice,
    WrongAnswerError,
    ask,
    bytes_of,
    check_status,
    choices_in,
    choices_of,
    data_of,
    events,
    heard_in,
    open_stream,
    read_answer,
    stream,
)

TIMEOUT_S = 300.0  # a deed that takes longer hangs
SMALL_BUFFER = 4096  # bytes that the system keeps for a client that reads slowly


class Known(NamedTuple):
    """A request and what it must be answered."""

    asked: Asked
    choices: tuple[Choice, ...]


@dataclass
class Tally:
    """What the clients have seen. done: deeds by kind. tokens: compared, and found right. busy: refusals for now.
    problems: whatever must not be.
    """

    done: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    busy: int = 0
    problems: list[str] = field(default_factory=list)


class Population:
    """Clients of one server. To be used as a context: their connections end with it."""

    def __init__(
        self, url: str, known: Sequence[Known], bad: Sequence[BadRequest], *, patience_s: float = 5.0, seed: int = 0
    ) -> None:
        """patience_s: longest pause of one who reads slowly; others hold on for up to twice as long to what they never
        use.
        """
        self.tally = Tally()
        self._address = urlsplit(url)
        self._known = known
        self._bad = bad
        self._patience_s = patience_s
        self._chance = random.Random(seed)
        self._deeds: dict[Callable[[], Awaitable[None]], int] = {
            self.streams: 40,
            self.asks: 8,
            self.leaves_midway: 12,
            self.leaves_at_once: 6,
            self.reads_slowly: 10,
            self.never_reads: 3,
            self.errs: 14,
            self.pipelines: 3,
            self.stops_in_a_body: 2,
            self.stops_in_a_head: 2,
        }

    async def __aenter__(self) -> Self:
        url = self._address.geturl()
        self._session = aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0))
        self._slow = aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket),
            read_bufsize=SMALL_BUFFER,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._slow.close()

    async def live(self, num_clients: int, seconds: float) -> None:
        """So many clients at once, each doing one thing after another, until the time is over and all have ended. The
        first things are shared out evenly, so that each is done by someone.
        """
        until_s = time.monotonic() + seconds
        firsts = itertools.islice(itertools.cycle(self._deeds), num_clients)
        await asyncio.gather(*[self._client(first, until_s) for first in firsts])

    async def _client(self, deed: Callable[[], Awaitable[None]], until_s: float) -> None:
        while True:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await deed()
                self.tally.done[deed.__name__] += 1
            except BusyError:
                self.tally.busy += 1
                await asyncio.sleep(self._chance.uniform(0.5, 1.5))
            except Exception as error:
                self.tally.problems.append(f"{deed.__name__}: {type(error).__name__}: {error}"[:1000])
                await asyncio.sleep(0.2)  # lest a server that is gone is asked without end
            if time.monotonic() > until_s:
                return
            [deed] = self._chance.choices(list(self._deeds), list(self._deeds.values()))

    # ---- those that behave ----

    async def streams(self) -> None:
        """Follows a stream to its end."""
        known = self._any()
        self._check(known, await stream(self._session, known.asked))

    async def asks(self) -> None:
        """Waits for an answer as a whole."""
        known = self._any()
        self._check(known, await ask(self._session, known.asked))

    async def pipelines(self) -> None:
        """Sends requests one behind the other without waiting; the answers must come in their order."""
        several = [self._any() for _ in range(self._chance.randint(2, 4))]
        async with self._connection() as (reader, writer):
            writer.write(b"".join(bytes_of(known.asked) for known in several))
            if self._chance.random() < 0.3:  # and goes, with all of them open
                await asyncio.sleep(self._chance.uniform(0.0, 0.1))
                return
            for known in several:
                status, answer = await read_answer(reader)
                if status == 429:
                    raise BusyError
                if status != 200:
                    raise WrongAnswerError(f"HTTP {status} in a pipeline: {answer[:200]!r}")
                self._check(known, choices_of(msgspec.json.decode(answer)))

    # ---- those that leave ----

    async def leaves_midway(self) -> None:
        """Reads some of a stream and goes; what has come must be right."""
        known = self._any()
        left = self._chance.randint(1, 12)
        found: list[bytes] = []
        async with open_stream(self._session, known.asked) as response:
            async for data in events(response):
                found.append(data)
                if len(found) == left:
                    break
            response.close()
        for index, heard in heard_in(found).items():
            expected = known.choices[index].token_ids[: len(heard.token_ids)]
            if tuple(heard.token_ids) != expected:
                raise WrongAnswerError(f"{known.asked} began with {heard.token_ids}, not {expected}")
            self.tally.tokens += len(expected)

    async def leaves_at_once(self) -> None:
        """Goes before the first token, or soon after."""
        asked = self._any().asked
        body = {**asked.body, "stream": self._chance.random() < 0.5}
        with suppress(TimeoutError):
            async with asyncio.timeout(self._chance.uniform(0.0, 0.05)):
                async with self._session.post(asked.path, json=body) as response:
                    await check_status(response)
                    response.close()

    # ---- those that do not read, or do not write ----

    async def reads_slowly(self) -> None:
        """Reads a few bytes at a time, with pauses; all must come nevertheless."""
        known = self._any()
        parts: list[bytes] = []
        pauses = self._chance.randint(1, 4)
        async with open_stream(self._slow, known.asked) as response:
            while part := await response.content.read(self._chance.randint(1, 300)):
                parts.append(part)
                if pauses and self._chance.random() < 0.2:
                    pauses -= 1
                    await asyncio.sleep(self._chance.uniform(0.1, 1.0) * self._patience_s)
        self._check(known, choices_in(data_of(b"".join(parts).splitlines())))

    async def never_reads(self) -> None:
        """Asks for more than there is room for on the way, and reads none of it."""
        asked = self._any().asked
        logprobs = {"logprobs": True, "top_logprobs": 20} if "messages" in asked.body else {"logprobs": 20}
        many = Asked(asked.path, {**asked.body, **logprobs, "n": 4, "temperature": 1.0, "seed": 1})
        async with open_stream(self._slow, many) as response:
            await asyncio.sleep(self._chance.uniform(0.2, 2.0) * self._patience_s)
            response.close()

    async def stops_in_a_body(self) -> None:
        """Sends a part of a body, and no more."""
        request = bytes_of(self._any().asked)
        await self._hold(request[: self._chance.randrange(request.index(b"\r\n\r\n") + 4, len(request))])

    async def stops_in_a_head(self) -> None:
        """Sends a part of a head or nothing, and no more."""
        request = bytes_of(self._any().asked)
        await self._hold(request[: self._chance.randrange(request.index(b"\r\n\r\n"))])

    async def _hold(self, data: bytes) -> None:
        async with self._connection() as (reader, writer):
            writer.write(data)
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(self._chance.uniform(0.0, 2.0) * self._patience_s):
                    await reader.read()

    # ---- those that err ----

    async def errs(self) -> None:
        """Sends what cannot be served, and must be told why."""
        await self.err(self._chance.choice(self._bad))

    async def err(self, bad: BadRequest) -> None:
        try:
            async with self._session.post(bad.path, data=bad.body) as response:
                answer = await response.json()
        except (aiohttp.ClientConnectionError, ConnectionError):
            if 413 in bad.statuses:  # the answer comes, and the connection ends, while the body is still on its way
                return
            raise
        if response.status == 429:
            raise BusyError
        if response.status not in bad.statuses or (response.status != 200 and not answer["error"]["message"]):
            raise WrongAnswerError(f"{bad.name}: HTTP {response.status}, not {bad.statuses}: {str(answer)[:200]}")

    # ---- what they have in common ----

    def _any(self) -> Known:
        return self._chance.choice(self._known)

    def _check(self, known: Known, found: tuple[Choice, ...]) -> None:
        if found != known.choices:
            raise WrongAnswerError(f"{known.asked} was answered {found}, not {known.choices}")
        self.tally.tokens += sum(len(choice.token_ids) for choice in found)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        try:
            yield reader, writer
        finally:
            if self._chance.random() < 0.5:
                writer.transport.abort()  # the other side hears of an error, not of an end
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def _small_socket(address: Any) -> socket.socket:
    """One of which the other side soon finds that nobody reads."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    return made
