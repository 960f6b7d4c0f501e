"""A rank's share of a model by itself: the steps it would run beside the others, without waiting for any of them.

In a process of its own, forked before torch has started a thread. Its communicators move nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from phalanx.comm.communicator import Communicator, ReduceOp
from phalanx.comm.create import Probe, register_backend
from phalanx.comm.work import FINISHED, Work
from phalanx.engine.messages import RankSpec, Sampling, StepPlan, StepResult
from phalanx.engine.rank import Rank
from phalanx.engine.scheduler import Limits, Scheduler
from phalanx.launcher.bench.workloads import RequestShape


class SilentCommunicator(Communicator):
    """Every operation is done at once; what would have come from others is zeros."""

    backend = "silent"

    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Work:
        return FINISHED

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        output.zero_()
        return FINISHED

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        output.zero_()
        return FINISHED

    def _start_broadcast(self, x: torch.Tensor, root: int) -> Work:
        return FINISHED

    def _start_send(self, x: torch.Tensor, to: int) -> Work:
        return FINISHED

    def _start_recv(self, x: torch.Tensor, source: int) -> Work:
        x.zero_()
        return FINISHED

    def _start_barrier(self) -> Work:
        return FINISHED

    def _abort(self) -> None:
        """There is nothing to end."""

    def _close(self) -> None:
        """There is nothing to release."""


def planned_steps(requests: Sequence[RequestShape], limits: Limits) -> list[StepPlan]:
    """The steps that the scheduler makes of requests that come all at once."""
    scheduler = Scheduler(limits)
    for name, shape in enumerate(requests):
        scheduler.add(name, shape.prompt, shape.max_tokens, Sampling())
    plans: list[StepPlan] = []
    num_done = 0
    while scheduler.num_unfinished or scheduler.num_in_flight:
        while (plan := scheduler.schedule()) is not None:
            plans.append(plan)
        done = plans[num_done]
        num_done += 1
        scheduler.complete(StepResult(done.step, (1,) * len(done.drawn_slots)))
    return plans


class Share:
    """One rank's process. store: a new file where all of them meet. core: that it is kept on, None for any."""

    def __init__(self, store: Path, core: int | None = None) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, store, core), daemon=True)
        self._process.start()

    def load(self, spec: RankSpec) -> None:
        self._pipe.send(spec)

    def start(self, plans: Sequence[StepPlan]) -> None:
        """Lets it run the steps; `finish` waits for it."""
        self._pipe.send(plans)

    def finish(self) -> float:
        """Seconds that the steps took."""
        taken_s: float = self._pipe.recv()
        return taken_s

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def run_shares(shares: Sequence[Share], plans: Sequence[StepPlan]) -> list[float]:
    """Seconds that the steps took on each rank, all at once: as many compute side by side as this machine has cores."""
    for share in shares:
        share.start(plans)
    return [share.finish() for share in shares]


def _serve(pipe: Connection, store: Path, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    register_backend("silent", SilentCommunicator, lambda device, size: Probe(True, "moves nothing"), priority=-1)
    spec: RankSpec = pipe.recv()
    comm = replace(spec.comm, backend="silent", store=f"file://{store}", overlap="none")
    rank = Rank(replace(spec, comm=comm, num_threads=1), lambda _: None)
    while True:
        plans: list[StepPlan] = pipe.recv()
        began_s = time.perf_counter()
        for plan in plans:
            rank.run(plan)
        pipe.send(time.perf_counter() - began_s)
