"""When each stage worked on which step: how busy the stages are, and where bubbles are."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from phalanx.engine.messages import StageReport, StageStep


class Timeline:
    """The last steps of every stage, on the engine's clock. May be read from any thread."""

    def __init__(self, num_stages: int, capacity: int = 8192) -> None:
        """capacity: steps a stage."""
        self._steps: list[deque[StageStep]] = [deque(maxlen=capacity) for _ in range(num_stages)]
        self._lock = threading.Lock()

    def add(self, report: StageReport) -> None:
        with self._lock:
            self._steps[report.stage].extend(step.shifted(report.clock.offset_s) for step in report.steps)

    def steps(self, since_s: float = float("-inf")) -> list[list[StageStep]]:
        """What each stage did since then, oldest first."""
        with self._lock:
            return [[step for step in steps if step.ended_s > since_s] for steps in self._steps]

    def busy(self, from_s: float, until_s: float) -> tuple[float, ...]:
        """The share of this time that each stage worked."""
        return tuple(busy_share(steps, from_s, until_s) for steps in self.steps(from_s))


def busy_share(steps: Iterable[StageStep], from_s: float, until_s: float) -> float:
    """The share of this time that lies within the steps of a stage."""
    within_s = sum(max(0.0, min(step.ended_s, until_s) - max(step.started_s, from_s)) for step in steps)
    return within_s / (until_s - from_s)
