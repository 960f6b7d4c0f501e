"""The ranks of one replica, from their start to their end: placed, watched, and gone without a trace."""

from __future__ import annotations

import atexit
import contextlib
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from phalanx.comm.rendezvous import listen_for_store, local_address, store_on
from phalanx.engine.channel import EngineChannel
from phalanx.engine.messages import (
    Progress,
    RankFailed,
    RankReady,
    RankSpec,
    Report,
    Shutdown,
    StageReport,
    StepPlan,
    StepResult,
    ToEngine,
    ToRank,
)
from phalanx.errors import PhalanxError, RankFailedError
from phalanx.launcher.failures import FailureLog
from phalanx.launcher.hosts import DEFAULT_TARGET, ClusterSettings, RankHost
from phalanx.launcher.process_host import ProcessHost
from phalanx.launcher.ray_host import RayHost
from phalanx.launcher.step_watch import StepWatch, stuck_error
from phalanx.launcher.thread_host import ThreadHost
from phalanx.parallel.layout import RankPlace

WATCH_S = 0.1  # between two looks at the ranks' processes; a look costs some tens of microseconds
GRACE_S = 1.0  # for the others to say what happened, when only symptoms are known yet
CAUSE_GRACE_S = 0.3  # the same once something is known that nobody else can have caused
SHUTDOWN_S = 10.0  # for a healthy rank to finish its step and release what it holds
FAILED_SHUTDOWN_S = 0.5  # the same beside a failed one, for whose sake it may wait until a limit of its own

OnProgress = Callable[[RankPlace, Progress], None]
OpenHost = Callable[[ClusterSettings, int], RankHost]


def open_host(settings: ClusterSettings, num_ranks: int, target: str = DEFAULT_TARGET) -> RankHost:
    """What will run the `num_ranks` ranks of a replica. Starts or joins what they run on, so it pays to do it early.

    Raises PhalanxError where that cannot be had.
    """
    if settings.ray != "none":
        return RayHost(settings, num_ranks, target)
    if num_ranks == 1 and not settings.apart:
        return ThreadHost(settings, target)
    return ProcessHost(settings, target)


class Formation:
    """The ranks of one replica, wherever they run. Made by `start`; close it, or use it in a `with` block.

    ready: what each rank reported of itself, by rank. nodes: node of each rank. startup_s: seconds by part: `ray` to
    connect to Ray or start it, `actors` from then until all ranks have been heard, their imports left out.
    Used from one thread at a time, but for `wake`.
    """

    def __init__(self, host: RankHost, specs: Sequence[RankSpec], settings: ClusterSettings) -> None:
        self._host = host
        self._settings = settings
        self._places = tuple(specs[0].layout.places(specs[0].replica))
        self._failures = FailureLog(self._places)
        self._layout = specs[0].layout
        # A rank alone waits for nobody: however long it computes, it is not stuck in a transfer.
        timeout_s = specs[0].comm.timeout_s if len(specs) > 1 else math.inf
        self._steps = StepWatch(len(self._layout.stages), timeout_s)
        self._error: RankFailedError | None = None
        self._channel: EngineChannel | None = None
        self._store: Any = None
        self._heard: dict[int, Progress | RankReady] = {}
        self._watched_s = 0.0
        self._closed = False
        self.ready: tuple[RankReady, ...] = ()
        self.startup_s: dict[str, float] = {}
        atexit.register(self.close)

    @classmethod
    def start(
        cls,
        specs: Sequence[RankSpec],
        settings: ClusterSettings,
        *,
        on_progress: OnProgress | None = None,
        host: RankHost | None = None,
    ) -> Self:
        """Starts ranks and returns when all are ready.

        specs: one a rank of a replica, in order; the store, the engine's address, the secret, and `num_threads` where
        it is 0, are filled in here. on_progress: hears how far each rank is. host: from `open_host`, where the caller
        opened one early; it is the formation's from now on.

        Raises PlacementError for ranks that cannot be placed, RankFailedError for one that fails or where not all are
        ready within `start_timeout_s`. Whatever it raises, nothing is left behind.
        """
        if host is None:
            host = open_host(settings, len(specs))
        formation = cls(host, specs, settings)
        try:
            formation._start(specs, on_progress)
        except BaseException:
            formation.close()
            raise
        return formation

    def _start(self, specs: Sequence[RankSpec], on_progress: OnProgress | None) -> None:
        started = time.monotonic()
        address = self._host.address
        if self._settings.interface is not None and self._settings.ray not in ("none", "local"):
            address = local_address(interface=self._settings.interface)
        secret = secrets.token_hex(16)
        self._channel = EngineChannel(address, secret)
        store = ""
        if len(specs) > 1:
            self._store, store = listen_for_store(address)
        self._host.start(
            [
                replace(spec, comm=replace(spec.comm, store=store), engine=self._channel.address, secret=secret)
                for spec in specs
            ]
        )
        if self._store is not None:
            self._store = store_on(self._store)  # brings torch, while the ranks import it too
        self._await_ready(started, on_progress)

    def _await_ready(self, started: float, on_progress: OnProgress | None) -> None:
        deadline = started + self._settings.start_timeout_s
        ready: dict[int, RankReady] = {}
        all_heard_s = None
        while len(ready) < len(self._places):
            message = self._next(deadline)
            if message is None:
                raise RankFailedError(self._overdue(ready))
            if not isinstance(message, Progress | RankReady):
                continue
            self._heard[message.rank] = message
            if all_heard_s is None and len(self._heard) == len(self._places):
                all_heard_s = time.monotonic() - started
            if isinstance(message, RankReady):
                ready[message.rank] = message
            elif on_progress is not None:
                on_progress(self._places[message.rank], message)
        self.ready = tuple(ready[place.rank] for place in self._places)
        imports_s = max(report.startup_s.get("imports", 0.0) for report in self.ready)
        self.startup_s = {**self._host.startup_s, "actors": max(0.0, (all_heard_s or 0.0) - imports_s)}

    @property
    def nodes(self) -> dict[int, str]:
        return self._host.nodes()

    def submit(self, plan: StepPlan) -> None:
        """Sends a step to every rank, without waiting for it."""
        data = self._require_channel().encode(plan)
        self._steps.planned(plan.step)
        for place in self._places:
            self._send(place.rank, data)

    def send(self, rank: int, message: ToRank) -> None:
        """Sends to one rank. Raises RankFailedError where a rank that failed is the reason that it cannot."""
        self._send(rank, self._require_channel().encode(message))

    def _send(self, rank: int, data: bytes) -> None:
        try:
            self._require_channel().send_bytes(rank, data)
        except PhalanxError:
            # The connection may be gone before the process is seen to be.
            self._collect(GRACE_S)
            self.check()
            raise

    def receive(self, timeout_s: float) -> StepResult | Report | None:
        """The next result or report, or None if none came in time or `wake` was called. Raises RankFailedError within
        moments of a rank's failure.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            message = self._next(deadline)
            if isinstance(message, StepResult):
                self._steps.done(message.step)
            elif isinstance(message, StageReport):
                self._steps.told(message.stage, message.steps[-1].step)
            if message is None or isinstance(message, StepResult | Report):
                return message

    def wake(self) -> None:
        """Ends a `receive` that waits, or the next one. May be called from any thread."""
        channel = self._channel
        if channel is not None:
            channel.wake()

    def check(self) -> None:
        """Raises RankFailedError, with the first cause, if a rank has failed or ended."""
        if self._error is None:
            self._watch()
            if not self._failures:
                return
            self._collect(GRACE_S)
            self._error = self._failures.error()
        raise self._error

    def close(self) -> None:
        """Ends the ranks and releases all: processes, actors, placement group, sockets, our own Ray. Idempotent."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            if self._channel is not None:
                for rank in self._heard:
                    with contextlib.suppress(PhalanxError):
                        self._channel.send(rank, Shutdown())
            healthy = bool(self.ready) and not self._failures and self._error is None
            self._host.stop(SHUTDOWN_S if healthy else FAILED_SHUTDOWN_S if self.ready else 0.0)
        finally:
            if self._channel is not None:
                self._channel.close()
            self._channel = self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_channel(self) -> EngineChannel:
        if self._channel is None:
            raise PhalanxError("the formation is closed")
        return self._channel

    def _next(self, deadline: float) -> ToEngine | None:
        """The next message that is no failure, or None at the deadline; a failure is raised."""
        while True:
            if self._error is not None:
                raise self._error
            left = deadline - time.monotonic()
            message = self._require_channel().receive(min(WATCH_S, max(0.0, left)))
            if isinstance(message, RankFailed):
                self._failures.add_message(message, self._node(message.rank, message.node))
                self.check()
            if message is None or time.monotonic() - self._watched_s > WATCH_S:
                self._watch()
                if self._failures:
                    self.check()
            if message is None and (overdue := self._steps.overdue()) is not None:
                self._error = stuck_error(overdue, self._layout, self._places, self._host.nodes())
                raise self._error
            if message is not None or left <= 0 or self._require_channel().woken:
                return message

    def _watch(self) -> None:
        self._watched_s = time.monotonic()
        for ended in self._host.exits():
            self._failures.add_exit(ended)

    def _collect(self, grace_s: float) -> None:
        """Hears the other ranks out, for the failure that is noticed first is seldom the one that happened first."""
        started = time.monotonic()
        while not self._failures.is_complete:
            limit_s = CAUSE_GRACE_S if self._failures.has_cause else grace_s
            left = started + limit_s - time.monotonic()
            if left <= 0:
                return
            message = self._require_channel().receive(min(0.02, left))
            if isinstance(message, RankFailed):
                self._failures.add_message(message, self._node(message.rank, message.node))
            self._watch()

    def _node(self, rank: int, reported: str) -> str:
        return self._host.nodes().get(rank, reported)

    def _overdue(self, ready: dict[int, RankReady]) -> str:
        lines = [
            f"{len(self._places) - len(ready)} of {len(self._places)} ranks were not ready within "
            f"{self._settings.start_timeout_s:g} s:"
        ]
        for place in self._places:
            heard = self._heard.get(place.rank)
            if isinstance(heard, RankReady):
                state = "ready"
            elif heard is None:
                state = "not heard of"
            else:
                share = f", {heard.done} of {heard.total}" if heard.total else ""
                state = f"at {heard.part}{share}"
            lines.append(f"  {place} on node {self._node(place.rank, 'unknown')}: {state}")
        lines.append("give them longer with cluster.start_timeout_s, or see whether the nodes can reach this machine")
        return "\n".join(lines)
