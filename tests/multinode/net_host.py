"""A formation over the hosts of a net, without Ray: plain processes in each, told by pipes what to run.

The engine runs in one of the hosts too: `engine_command` is what starts a program there that can start the ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from tests.multinode.netlab import Net

from phalanx.engine.messages import RankSpec
from phalanx.launcher.hosts import ClusterSettings, RankExit
from phalanx.launcher.process_host import ProcessHost


@dataclass(frozen=True, slots=True)
class Seats:
    """Where ranks run. hosts: the host of each rank, in order. address: of the engine's. enter: by host, the command
    that runs another one in it.
    """

    hosts: tuple[str, ...]
    address: str
    enter: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, net: Net, hosts: Sequence[str]) -> Self:
        """The engine's host is that of the first rank."""
        return cls(tuple(hosts), net.hosts[hosts[0]].address, {host: net.command(host, []) for host in set(hosts)})

    def to_json(self) -> str:
        return json.dumps([self.hosts, self.address, self.enter])

    @classmethod
    def from_json(cls, text: str) -> Self:
        hosts, address, enter = json.loads(text)
        return cls(tuple(hosts), address, enter)

    def open(self, settings: ClusterSettings, num_ranks: int) -> NetHost:
        """For `Served.from_config(open_host=...)`."""
        assert num_ranks == len(self.hosts)
        return NetHost(self, settings)


class NetHost:
    """Starts the ranks of a replica in the hosts that `seats` says."""

    def __init__(self, seats: Seats, settings: ClusterSettings) -> None:
        self._seats = seats
        self._hosts = {name: ProcessHost(settings, prefix=seats.enter[name]) for name in dict.fromkeys(seats.hosts)}

    @property
    def address(self) -> str:
        return self._seats.address

    @property
    def startup_s(self) -> Mapping[str, float]:
        return {"ray": 0.0}

    def start(self, specs: Sequence[RankSpec]) -> None:
        for name, host in self._hosts.items():
            host.start([spec for spec in specs if self._seats.hosts[spec.rank] == name])

    def nodes(self) -> dict[int, str]:
        return dict(enumerate(self._seats.hosts))

    def exits(self) -> list[RankExit]:
        return [
            replace(ended, node=self._seats.hosts[ended.rank] if ended.rank >= 0 else name)
            for name, host in self._hosts.items()
            for ended in host.exits()
        ]

    def stop(self, timeout_s: float) -> None:
        with ExitStack() as stopping:
            for host in self._hosts.values():
                stopping.callback(host.stop, timeout_s)


def pin(pids: Iterable[int], cores: Sequence[int]) -> None:
    """Keeps each process, with all its threads, on a core of its own, as if its host had no other."""
    for pid, core in zip(pids, cores, strict=True):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
