"""`AsyncEngine`: a model served to the coroutines of this program."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

from phalanx.engine.request import Delta, Event, RequestOutput
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.stats import EngineStats
from phalanx.launcher.served import Prompt, Served

EVENTS_A_ROUND = 16  # each keeps a coroutine busy for a tenth of a millisecond or two


class _LoopMailbox:
    """The mailbox of all calls from one event loop: a step of the engine wakes it once, whoever it concerns.

    What a step brings is dealt out over rounds of the loop: hundreds of coroutines that went on together would keep it
    from everything else.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._pending: deque[Event] = deque()

    def open(self, name: str) -> asyncio.Queue[Event]:
        """The events of the requests of this name."""
        return self._queues.setdefault(name, asyncio.Queue())

    def close(self, name: str) -> None:
        self._queues.pop(name, None)

    def put(self, events: list[Event]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
            self.loop.call_soon_threadsafe(self._take, events)

    def _take(self, events: list[Event]) -> None:
        dealing = bool(self._pending)
        self._pending.extend(events)
        if not dealing:
            self._deal()

    def _deal(self) -> None:
        pending = self._pending
        for _ in range(min(len(pending), EVENTS_A_ROUND)):
            event = pending.popleft()
            if event.request.name in self._queues:
                self._queues[event.request.name].put_nowait(event)
        if pending:
            self.loop.call_soon(self._deal)


class AsyncEngine(Served):
    """The same as `LLM`, with the same arguments and results, for programs that run an event loop.

    Making one takes seconds and blocks; where the loop must go on: `await asyncio.to_thread(AsyncEngine.from_yaml, f)`.

    >>> async with AsyncEngine.from_yaml("configs/demo.yaml") as engine:
    ...     async for event in engine.stream("Once upon a time", SamplingParams(max_tokens=32)):
    ...         ...
    """

    _mailbox: _LoopMailbox | None = None

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """As `LLM.generate`."""
        async with aclosing(self.stream(prompts, params, request_id=request_id, priority=priority)) as events:
            outputs = [event async for event in events if isinstance(event, RequestOutput)]
        return sorted(outputs, key=lambda output: output.request)

    async def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta | RequestOutput, None]:
        """As `LLM.stream`. Closing the iterator, or cancelling the task that follows it, aborts the rest."""
        mailbox = self._mailbox_of(asyncio.get_running_loop())
        call = self._call(prompts, params, mailbox, request_id=request_id, priority=priority)
        events = mailbox.open(call.key)
        try:
            num_open = call.num_requests
            while num_open:
                _, what = await events.get()
                if isinstance(what, Exception):
                    raise what.with_traceback(None)
                num_open -= isinstance(what, RequestOutput)
                yield what
        finally:
            mailbox.close(call.key)
            self._close_call(call)

    async def abort(self, request_id: str) -> None:
        """As `LLM.abort`."""
        self.end_calls(request_id)

    async def stats(self) -> EngineStats:
        """As `LLM.stats`."""
        return EngineStats.together(self.replica_stats())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def _mailbox_of(self, loop: asyncio.AbstractEventLoop) -> _LoopMailbox:
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = _LoopMailbox(loop)
        return self._mailbox
