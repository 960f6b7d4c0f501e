"""One rank of `phalanx bench comm`: joins groups and takes readings as it is told, through the rendezvous store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple

import torch
from torch._C._distributed_c10d import Store

from phalanx.comm.communicator import Communicator
from phalanx.comm.create import choose_backend, create_communicator, usable_backends
from phalanx.comm.machine import own_seat
from phalanx.comm.rendezvous import connect_store
from phalanx.engine.messages import RankSpec
from phalanx.errors import CommError
from phalanx.launcher.bench_comm.probes import largest_cache_bytes, pass_word, stream

END = "end"
IDLE = timedelta(days=1)  # a driver that is gone takes the store with it, which ends the wait


def command_key(number: int) -> str:
    """Where command `number` stands: JSON with `do`, `ranks` and arguments."""
    return f"bench/command/{number}"


def answer_key(number: int, rank: int) -> str:
    """Where a rank that it is for answers, in JSON."""
    return f"bench/answer/{number}/{rank}"


class Reading(NamedTuple):
    """call_s: mean seconds of a call on one rank. began_s, ended_s: on the monotonic clock of its machine."""

    call_s: float
    began_s: float
    ended_s: float


def run_rank(spec: RankSpec) -> None:
    """Obeys commands until one says `end`. Takes the place of the engine's `run_rank`, and loads nothing."""
    torch.set_num_threads(spec.num_threads)
    store = connect_store(spec.comm.store, timeout_s=spec.comm.timeout_s)
    bench = _Bench(spec, store)
    try:
        for number in count():
            store.wait([command_key(number)], IDLE)
            command = json.loads(store.get(command_key(number)))
            do = command.pop("do")
            if do == END:
                return
            if spec.rank in command["ranks"]:
                store.set(answer_key(number, spec.rank), json.dumps(bench.actions[do](number, **command)))
    finally:
        bench.close()


class _Bench:
    """What a rank can be told to do; each takes the command's number and arguments and returns plain data."""

    def __init__(self, spec: RankSpec, store: Store) -> None:
        self._spec = spec
        self._store = store
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._comms: dict[str, Communicator] = {}
        self.actions: dict[str, Callable[..., Any]] = {
            "look": self._look,
            "backends": self._backends,
            "join": self._join,
            "read": self._read,
            "pass_word": self._pass_word,
            "stream": self._stream,
        }

    def close(self) -> None:
        for comm in self._comms.values():
            comm.close()

    def _look(self, number: int, ranks: list[int]) -> dict[str, Any]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        return {"seat": own_seat(), "num_cores": cores, "cache_bytes": largest_cache_bytes()}

    def _backends(self, number: int, ranks: list[int], size: int, named: str, **where: Any) -> dict[str, Any]:
        """What can serve a group of `size` here, and which of them a run would take."""
        device = self._spec.device
        chosen = choose_backend(named, device, size, **where)
        return {"usable": usable_backends(device, size, **where), "chosen": chosen.name}

    def _join(self, number: int, ranks: list[int], key: str, backend: str) -> dict[str, str]:
        """Joins group `key`. Answers with the reason of the backend, or the problem where it does not serve."""
        comm = self._spec.comm
        try:
            self._comms[key] = create_communicator(
                backend,
                rank=ranks.index(self._spec.rank),
                size=len(ranks),
                rendezvous=self._store,
                group=key,
                device=self._spec.device,
                interface=comm.interface,
                timeout_s=comm.timeout_s,
            )
        except CommError as error:
            return {"problem": str(error)}
        return {"reason": self._comms[key].reason}

    def _read(
        self, number: int, ranks: list[int], key: str, op: str, num_elements: int, calls: int, active: list[int]
    ) -> Reading:
        """The mean of `calls` after one to warm up. active: numbers in the group of those who take part; the others
        only wait until all begin.
        """
        comm = self._comms[key]
        takes_part = comm.rank in active
        call = self._call(op, comm, num_elements, active) if takes_part else None
        if call is not None:
            call(0)
        self._settle(comm)
        began_s = time.perf_counter()
        if call is not None:
            for index in range(calls):
                call(index)
        if comm.device.type == "cuda":
            torch.cuda.synchronize()
        ended_s = time.perf_counter()
        num_transfers = 2 * calls if op == "send_recv" else calls  # there and back
        return Reading((ended_s - began_s) / num_transfers, began_s, ended_s)

    @staticmethod
    def _settle(comm: Communicator) -> None:
        """Returns when all ranks are here and nothing is under way."""
        if comm.device.type == "cuda":
            torch.cuda.synchronize()
        comm.barrier()

    def _call(self, op: str, comm: Communicator, num_elements: int, active: list[int]) -> Callable[[int], object]:
        """One call of the operation, given its index among the calls."""
        x = self._full(num_elements)
        part = x[: num_elements // comm.size]
        target = self._full(num_elements) if op == "copy" else x

        def there_and_back(_: int) -> None:
            first, second = active
            if comm.rank == first:
                comm.send(x, second)
                comm.recv(x, second)
            else:
                comm.recv(x, first)
                comm.send(x, first)

        calls: dict[str, Callable[[int], object]] = {
            "all_reduce": lambda _: comm.all_reduce(x),
            "all_gather": lambda _: comm.all_gather(part),
            "reduce_scatter": lambda _: comm.reduce_scatter(x),
            # Roots take turns: one root alone would run ahead of the others.
            "broadcast": lambda index: comm.broadcast(x, index % comm.size),
            "barrier": lambda _: comm.barrier(),
            "send_recv": there_and_back,
            "copy": lambda _: target.copy_(x),
        }
        return calls[op]

    def _full(self, num_elements: int) -> torch.Tensor:
        # Written, and not `zeros`: memory that was never written to is one page of the kernel's, always in the cache.
        return torch.empty(num_elements, dtype=self._dtype, device=self._spec.device).fill_(0)

    def _pass_word(self, number: int, ranks: list[int], passes: int, cores: Sequence[int]) -> dict[str, float]:
        return pass_word(self._store, f"bench/word/{number}", ranks.index(self._spec.rank), passes, cores)

    def _stream(self, number: int, ranks: list[int], seconds: float) -> dict[str, float]:
        key, interface = f"bench/stream/{number}", self._spec.comm.interface
        towards = self._spec.comm.store
        return stream(self._store, key, ranks.index(self._spec.rank), seconds, towards, interface)
