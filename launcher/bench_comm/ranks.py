"""The ranks of a layout, started where a run would start them, and told what to measure."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from phalanx.comm.rendezvous import connect_store, host_store, local_address
from phalanx.engine.messages import RankSpec
from phalanx.errors import RankFailedError
from phalanx.launcher.bench_comm.rank import END, IDLE, Reading, answer_key, command_key
from phalanx.launcher.failures import FailureLog
from phalanx.launcher.formation import open_host
from phalanx.launcher.hosts import ClusterSettings, RankHost

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TARGET = "phalanx.launcher.bench_comm.rank:run_rank"
WATCH_S = 0.5  # between two looks at whether the ranks are alive, while answers are awaited
CAUSE_S = 1.0  # for the others to end, when one has: the first to be seen is seldom the cause
SHUTDOWN_S = 5.0


class Ranks:
    """Processes of one thread each. Made by `start`; to be closed, or used in a `with` block."""

    def __init__(self, host: RankHost, specs: Sequence[RankSpec]) -> None:
        self._host = host
        self._failures = FailureLog(tuple(specs[0].layout.places(specs[0].replica)))
        self._store: Store | None = None
        # The wait for answers blocks a connection to the store, and a thread that no interrupt reaches: both are extra.
        self._answers: Store | None = None
        self._waiter = ThreadPoolExecutor(1, "phalanx-bench-answers")
        self._awaited: list[str] = []
        self._specs = specs
        self._number = 0
        self.all = tuple(spec.rank for spec in specs)

    @classmethod
    def start(cls, specs: Sequence[RankSpec], settings: ClusterSettings) -> Self:
        """Starts ranks and returns when all have answered.

        Raises PlacementError for ranks that cannot be placed, RankFailedError where not all come.
        """
        host = open_host(replace(settings, apart=True), len(specs), TARGET)
        ranks = cls(host, specs)
        try:
            ranks._start(settings)
        except BaseException:
            ranks.close()
            raise
        return ranks

    def _start(self, settings: ClusterSettings) -> None:
        address = self._host.address
        if settings.interface is not None and settings.ray not in ("none", "local"):
            address = local_address(interface=settings.interface)
        self._store, rendezvous = host_store(address)
        self._answers = connect_store(rendezvous)
        self._host.start(
            [replace(spec, num_threads=1, comm=replace(spec.comm, store=rendezvous)) for spec in self._specs]
        )
        self.looks: list[dict[str, Any]] = self.ask(self.all, "look", limit_s=settings.start_timeout_s)

    def nodes(self) -> dict[int, str]:
        return self._host.nodes()

    def ask(self, ranks: Sequence[int], do: str, *, limit_s: float | None = None, **arguments: object) -> list[Any]:
        """What each of `ranks` answers, in their order; the others go on to the next command at once.

        limit_s: of the wait; None to wait for as long as they live, for all that ranks do with each other has limits of
        its own. Raises RankFailedError for a rank that fails or ends.
        """
        assert self._store is not None
        assert self._answers is not None
        number, self._number = self._number, self._number + 1
        self._store.set(command_key(number), json.dumps({"do": do, "ranks": list(ranks), **arguments}))
        self._awaited = [answer_key(number, rank) for rank in ranks]
        waiting = self._waiter.submit(self._answers.wait, self._awaited, IDLE)
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        while not wait([waiting], WATCH_S).done:
            self._check()
            if deadline_s is not None and time.monotonic() > deadline_s:
                missing = [rank for rank, key in zip(ranks, self._awaited, strict=True) if not self._store.check([key])]
                where = ", ".join(f"{rank} on node {self.nodes().get(rank)}" for rank in missing)
                raise RankFailedError(
                    f"not heard of within {limit_s:g} s: rank {where}; give them longer with cluster.start_timeout_s, "
                    "or see whether the nodes can reach this machine"
                )
        waiting.result()
        answers = [json.loads(self._store.get(key)) for key in self._awaited]
        for key in self._awaited:
            self._store.delete_key(key)
        self._awaited = []
        return answers

    def read(
        self, ranks: Sequence[int], key: str, op: str, num_elements: int, calls: int, active: Sequence[int]
    ) -> list[Reading]:
        """A reading of each rank of the group `key`, all begun together. active: numbers of those taking part."""
        arguments: dict[str, Any] = {"key": key, "op": op, "num_elements": num_elements, "active": list(active)}
        return [Reading(*answer) for answer in self.ask(ranks, "read", calls=calls, **arguments)]

    def _check(self) -> None:
        ended = self._host.exits()
        if not ended:
            return
        deadline_s = time.monotonic() + CAUSE_S
        while ended or time.monotonic() < deadline_s:
            for each in ended:
                self._failures.add_exit(each)
            time.sleep(0.05)
            ended = self._host.exits()
        raise self._failures.error()

    def close(self) -> None:
        """Ends all ranks and what they ran on. Idempotent."""
        healthy = self._store is not None and not self._awaited
        if self._store is not None:
            for key in self._awaited:  # ends the wait of the thread
                self._store.set(key, "null")
            self._store.set(command_key(self._number), json.dumps({"do": END}))
        self._host.stop(SHUTDOWN_S if healthy else 0.0)
        self._waiter.shutdown()
        self._store = self._answers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
