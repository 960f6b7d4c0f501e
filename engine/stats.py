"""What an engine says of itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

WINDOW_S = 5.0  # what "now" means for rates and shares


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Of one replica, or of several together.

    Now: running and waiting sequences; pages of the KV cache, those that running sequences use, and those that hold
    prefixes which nobody uses; tokens_per_s drawn; stage_busy, the share of time that each stage works.
    Since the start: requests, those finished and aborted; prompt tokens, those found in the prefix cache, output
    tokens; preemptions; steps.
    """

    running: int
    waiting: int
    pages: int
    pages_used: int
    pages_kept: int
    tokens_per_s: float
    stage_busy: tuple[float, ...]
    requests: int
    finished: int
    aborted: int
    prompt_tokens: int
    prompt_tokens_cached: int
    output_tokens: int
    preemptions: int
    steps: int

    @classmethod
    def together(cls, parts: Sequence[EngineStats]) -> EngineStats:
        """Sums over replicas; `stage_busy` is the mean of the replicas' stages."""
        sums = {
            field.name: sum(getattr(part, field.name) for part in parts)
            for field in fields(cls)
            if field.name != "stage_busy"
        }
        busy = tuple(sum(shares) / len(parts) for shares in zip(*(part.stage_busy for part in parts), strict=True))
        return cls(stage_busy=busy, **sums)


class Rate:
    """Events a second over the last `WINDOW_S`. Counted by one thread, read by any."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._counts: deque[tuple[float, int]] = deque()

    def count(self, number: int) -> None:
        now_s = self._clock_s()
        counts = self._counts
        counts.append((now_s, number))
        while counts[0][0] < now_s - 2 * WINDOW_S:
            counts.popleft()

    def per_s(self) -> float:
        since_s = self._clock_s() - WINDOW_S
        return sum(number for when_s, number in self._counts.copy() if when_s > since_s) / WINDOW_S
