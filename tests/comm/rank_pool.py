"""A pool of rank processes, started once: importing torch takes seconds, a test case milliseconds."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.comm.rank_nursery import ForkedWorker, Nursery

WORKER = Path(__file__).with_name("rank_worker.py")
ANSWER_LIMIT_S = 40.0
DIED = {"error": {"type": "died"}}

Popen = Callable[..., "subprocess.Popen[str]"]


class RankPool:
    """Runs a function of a test file on ranks 0 to size - 1, as `function(communicator, store, **arguments)`."""

    def __init__(self, rendezvous: str, popen: Popen | None = None) -> None:
        """popen: starts the process of a worker; given its number, its command, and options of subprocess.Popen. None
        for processes forked here.
        """
        self._rendezvous = rendezvous
        self._popen = popen
        self._nursery: Nursery | None = None
        self._workers: dict[int, subprocess.Popen[str] | ForkedWorker] = {}
        self._generation = 0
        self._numbers = count()

    def run(self, function: Callable[..., object], size: int, **options: Any) -> list[Any]:
        """What each rank returned. Fails the test where a rank raised."""
        answers = self.outcomes(function, size, **options)
        for rank, answer in enumerate(answers):
            if "error" in answer:
                pytest.fail(f"rank {rank}: {answer['error'].get('traceback', answer['error'])}")
        return [answer["ok"] for answer in answers]

    def outcomes(
        self,
        function: Callable[..., object],
        size: int,
        *,
        fresh: bool = False,
        timeout_s: float = 30.0,
        backend: str = "auto",
        workers: Sequence[int] | None = None,
        machines: Sequence[str] | None = None,
        **arguments: object,
    ) -> list[dict[str, Any]]:
        """{"ok": value}, {"error": {"type", "message", ...}} or DIED of each rank.

        fresh: with a group of its own. workers: the processes that are the ranks, by number; None for the first `size`.
        machines: what each rank takes for its machine; None for the real one.
        """
        chosen = list(range(size)) if workers is None else list(workers)
        self.start(max(chosen) + 1)
        named = f"{self._generation}-{backend}-{'-'.join(map(str, chosen))}-{'-'.join(machines or ())}"
        group = f"fresh-{next(self._numbers)}" if fresh else f"shared-{named}"
        request = {
            "file": function.__code__.co_filename,
            "function": function.__name__,
            "group": group,
            "size": size,
            "backend": backend,
            "fresh": fresh,
            "timeout_s": timeout_s,
            "arguments": arguments,
        }
        for rank, worker in enumerate(chosen):
            stream = self._workers[worker].stdin
            assert stream is not None
            stream.write(json.dumps({**request, "rank": rank, "machine": machines and machines[rank]}) + "\n")
            stream.flush()
        return [self._answer(worker) for worker in chosen]

    def start(self, size: int) -> None:
        """Starts the processes of ranks below `size` that are not running."""
        started = [rank for rank in range(size) if rank not in self._workers]
        if started and self._workers:
            self._generation += 1  # a new process knows nothing of the groups that the others hold
        for rank in started:
            self._workers[rank] = self._open(rank)
        for rank in started:
            assert self._answer(rank) == "ready"

    def _open(self, rank: int) -> subprocess.Popen[str] | ForkedWorker:
        if self._popen is None:
            self._nursery = self._nursery or Nursery()
            return self._nursery.start(self._rendezvous)
        return self._popen(
            rank,
            [sys.executable, str(WORKER), self._rendezvous],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def _answer(self, rank: int) -> Any:
        worker = self._workers[rank]
        assert worker.stdout is not None
        if not select.select([worker.stdout], [], [], ANSWER_LIMIT_S)[0]:
            self.close()
            pytest.fail(f"rank {rank} gave no answer within {ANSWER_LIMIT_S:g} s")
        line = worker.stdout.readline()
        if not line:
            worker.wait(10)
            self._forget(rank)
            return DIED
        return json.loads(line)

    def _forget(self, rank: int) -> None:
        worker = self._workers.pop(rank)
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                stream.close()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.kill()
        for rank in list(self._workers):
            self._workers[rank].wait(10)
            self._forget(rank)
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None
