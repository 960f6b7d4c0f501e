"""Results of steps that a GPU is still computing: copied behind the step, and read when somebody needs them.

The thread enqueues the next step before it reads the last one's tokens, which that step finds on the device:

    thread   step 1 ─┬─ step 2 ─┬─ read 1 ─ step 3 ─┬─ read 2 ...
    GPU              └── step 1 ─ copy ─ step 2 ─ copy ─ step 3 ...
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from phalanx.comm.gpu import Gpu
from phalanx.engine.logprobs import LogprobRows
from phalanx.engine.messages import StepResult, TokenLogprobs


class Drawn(NamedTuple):
    """What a step has found, on its device or brought to the host.

    tokens: [B] int64. rows: those whose log-probabilities are in `logprobs`. prompts: by the place of its chunk, those
    of a prompt's tokens, in order.
    """

    tokens: torch.Tensor
    rows: tuple[int, ...] = ()
    logprobs: LogprobRows | None = None
    prompts: tuple[tuple[int, tuple[LogprobRows, ...]], ...] = ()

    def result(self, step: int) -> StepResult:
        """Waits for the device, where the tensors are on one."""
        logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
        if self.logprobs is not None:
            logprobs = tuple(zip(self.rows, self.logprobs.read(), strict=True))
        prompts = tuple((place, tuple(each for part in parts for each in part.read())) for place, parts in self.prompts)
        return StepResult(step, tuple(self.tokens.tolist()), logprobs, prompts)


class LateResult:
    """Of a step that a GPU computes; the copies are enqueued behind what the current stream has to do."""

    def __init__(self, step: int, drawn: Drawn, gpu: Gpu) -> None:
        self._step = step
        self._gpu = gpu
        logprobs = None if drawn.logprobs is None else self._copied(drawn.logprobs)
        prompts = tuple((place, tuple(map(self._copied, parts))) for place, parts in drawn.prompts)
        self._drawn = Drawn(self._copy(drawn.tokens), drawn.rows, logprobs, prompts)
        self._copies_done = gpu.new_event(timed=False, sleeps=True)
        self._copies_done.record(gpu.current_stream())

    def done(self) -> bool:
        """Whether `read` would not wait."""
        return self._copies_done.query()

    def read(self) -> StepResult:
        """Waits for it. Whether it is good the communicators say from then on (`Communicator.check`)."""
        self._copies_done.synchronize()
        return self._drawn.result(self._step)

    def _copied(self, rows: LogprobRows) -> LogprobRows:
        tokens, logprobs, top_tokens, top_logprobs = map(self._copy, rows[:4])
        return LogprobRows(tokens, logprobs, top_tokens, top_logprobs, rows.num_top)

    def _copy(self, x: torch.Tensor) -> torch.Tensor:
        host = self._gpu.pinned(x.nbytes).view(x.dtype).view(x.shape)
        self._gpu.copy(host, x, self._gpu.current_stream())
        return host
