"""Whether a token could be produced now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import PhalanxError, QueueFullError
from phalanx.launcher.async_engine import AsyncEngine
from phalanx.serve.errors import first_line

FRESH_S = 10.0  # a step that was done so lately proves that the ranks work
STALLED_S = 30.0  # a step that takes longer is taken for stuck
PROBE_S = 5.0  # how long an idle engine has for a token
MOST_URGENT = -(2**31)


class Health:
    """Answers from what the engine has done of late; where it has been idle, by having it draw a token."""

    def __init__(self, engine: AsyncEngine, *, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self._engine = engine
        self._clock_s = clock_s
        self._probe: asyncio.Task[str | None] | None = None

    async def problem(self) -> str | None:
        """Why no token could be produced now, or None where one could."""
        engine = self._engine
        if engine.failure is not None:
            return first_line(engine.failure)
        now_s, stalled = self._clock_s(), []
        idle = False
        for stats, last_s, failure in zip(engine.replica_stats(), engine.last_results_s, engine.failures, strict=True):
            if failure is not None:
                continue
            if now_s - last_s < FRESH_S:
                return None
            if not stats.running + stats.waiting:
                idle = True
            elif now_s - last_s < STALLED_S:
                return None
            else:
                stalled.append(f"{stats.running} sequences run, but no step was done for {now_s - last_s:.0f} s")
        if not idle:
            return "; ".join(stalled)
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._draw())
        return await asyncio.shield(self._probe)

    async def _draw(self) -> str | None:
        """Draws one token, for all that ask meanwhile."""
        try:
            async with asyncio.timeout(PROBE_S):
                await self._engine.generate([0], SamplingParams(max_tokens=1), priority=MOST_URGENT)
        except QueueFullError:
            return None  # it is not idle any more
        except TimeoutError:
            return f"the ranks, which were idle, did not draw a token within {PROBE_S:g} s"
        except PhalanxError as error:
            return first_line(error)
        return None
