"""A world of one: the rank as a thread of this process, which imports torch if it has not yet."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from phalanx.engine.held_cores import HeldCores
from phalanx.engine.messages import RankSpec
from phalanx.errors import PlacementError
from phalanx.launcher.hosts import DEFAULT_TARGET, EXIT_GRACE_S, ClusterSettings, RankExit
from phalanx.launcher.pinning import even_threads
from phalanx.launcher.placement import plan_placement
from phalanx.launcher.process_host import LOOPBACK, this_machine
from phalanx.launcher.rank_main import RankReport, failure_report, load_target
from phalanx.launcher.topology import read_topology

logger = logging.getLogger(__name__)


class ThreadHost:
    """Runs the only rank of a replica without a process of its own. A thread cannot be killed: it ends when asked."""

    def __init__(self, settings: ClusterSettings, target: str = DEFAULT_TARGET) -> None:
        self._settings = settings
        self._target = target
        self._thread: threading.Thread | None = None
        self._report: RankReport | None = None
        self._rank = 0
        self._node = ""

    @property
    def address(self) -> str:
        return LOOPBACK

    @property
    def startup_s(self) -> Mapping[str, float]:
        return {"ray": 0.0}

    def start(self, specs: Sequence[RankSpec]) -> None:
        if len(specs) != 1:
            raise PlacementError(f"{len(specs)} ranks cannot share this process; a replica of one rank can")
        node = this_machine(self._settings)
        plan_placement(specs[0].layout, self._settings.rank_needs, [node])
        [spec] = specs
        num_threads = spec.num_threads or even_threads(self._settings.share_here(spec), read_topology())
        # The cores of a process that is the caller's own are the caller's to choose.
        spec = replace(spec, num_threads=num_threads, cores=HeldCores(reason="the rank is a thread of this program"))
        self._rank, self._node = spec.rank, node.hostname
        # A daemon, lest a rank stuck in a computation keep an interrupted program from ending.
        self._thread = threading.Thread(target=self._run, args=(spec,), name="phalanx-rank", daemon=True)
        self._thread.start()

    def _run(self, spec: RankSpec) -> None:
        report = RankReport()
        try:
            load_target(self._target)(spec)
        except BaseException as error:
            report = failure_report(error)
        self._report = report

    def nodes(self) -> dict[int, str]:
        return {self._rank: self._node} if self._thread else {}

    def exits(self) -> list[RankExit]:
        report, self._report = self._report, None
        if report is None:
            return []
        if report.message is None:
            return [RankExit(self._rank, self._node, "ended", "returned")]
        return [RankExit(self._rank, self._node, "failed", report.message, report.traceback, report.symptom)]

    def stop(self, timeout_s: float) -> None:
        if self._thread is None:
            return
        self._thread.join(max(timeout_s, EXIT_GRACE_S))  # it must not run into the interpreter's end
        if self._thread.is_alive():
            logger.warning(
                "the rank in this process did not end within %.1f s; it goes on until the program ends", timeout_s
            )
