"""`LLM`: a model served to this program, from a configuration to text."""

from __future__ import annotations

import queue
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Self

from phalanx.engine.request import Delta, Event, RequestOutput
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.stats import EngineStats
from phalanx.launcher.served import Prompt, Served


class _Inbox:
    """A mailbox that a thread waits at. deltas: whether it waits for them, too; else they do not wake it."""

    def __init__(self, deltas: bool) -> None:
        self._deltas = deltas
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()

    def put(self, events: list[Event]) -> None:
        if not self._deltas:
            events = [event for event in events if not isinstance(event.what, Delta)]
        if events:
            self._events.put(events)

    def get(self) -> list[Event]:
        return self._events.get()


class LLM(Served):
    """A model cut over ranks as a configuration says, ready for prompts. Close it, or use it in a `with` block.

    Several threads may use it at once; what they ask for runs together.

    >>> with LLM(model={"path": "smollm2-135m"}, parallel={"tensor": 2}) as llm:
    ...     print(llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))[0].text)
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Completes prompts, texts or token ids, and returns an output for each, in order.

        params: one for all, or one a prompt. request_id: what `abort` knows them by. priority: lower comes first.
        Raises RequestError, before anything runs, where a prompt cannot be served, QueueFullError where
        engine.max_waiting is reached, and RankFailedError within seconds where a rank dies meanwhile.
        """
        events = self._follow(_Inbox(deltas=False), prompts, params, request_id, priority)
        outputs = [event for event in events if isinstance(event, RequestOutput)]
        return sorted(outputs, key=lambda output: output.request)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Generator[Delta | RequestOutput, None, None]:
        """Completes prompts and yields what is new as it comes; `request` is the prompt's place in `prompts`.

        A prompt's last Delta is followed by its RequestOutput. Closing the iterator aborts the rest. Raises as
        `generate` does.
        """
        return self._follow(_Inbox(deltas=True), prompts, params, request_id, priority)

    def _follow(
        self,
        inbox: _Inbox,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        request_id: str | None,
        priority: int,
    ) -> Generator[Delta | RequestOutput, None, None]:
        call = self._call(prompts, params, inbox, request_id=request_id, priority=priority)
        try:
            num_open = call.num_requests
            while num_open:
                for _, what in inbox.get():
                    if isinstance(what, Exception):
                        raise what.with_traceback(None)
                    num_open -= isinstance(what, RequestOutput)
                    yield what
        finally:
            self._close_call(call)

    def abort(self, request_id: str) -> None:
        """Ends the prompts of a call, from any thread; whoever follows them gets what there is, with the finish reason
        `abort`. Nothing where there is no such call.
        """
        self.end_calls(request_id)

    def stats(self) -> EngineStats:
        """What is going on, of all replicas together; `replica_stats` has each."""
        return EngineStats.together(self.replica_stats())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
