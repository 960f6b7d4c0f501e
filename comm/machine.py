"""Whether the ranks of a group run on one machine, asked through their store, with the same answer on every rank."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from phalanx.comm.rendezvous import meet

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class Seat(NamedTuple):
    """Where a rank runs. obstacle: why it can share no memory wherever the others are, or empty.

    boot: identity of the running kernel. processes, network: of the namespaces that say which processes and interfaces
    it sees; hosts that are played by namespaces of one machine are apart, as real ones would be. user: effective id.
    """

    host: str
    boot: str
    processes: str
    network: str
    user: str
    obstacle: str = ""


def find_obstacle(device: str) -> str:
    """Why the backend `shm` cannot serve this process for tensors on `device`, or empty."""
    if device != "cpu":
        return f"it serves the CPU, the device is {device!r}"
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"it needs the store order of x86-64, this is {platform.machine()}"
    if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
        return "this Python was built without memfd_create or pidfd_open"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"pidfd_open fails ({error.strerror}): it needs Linux 5.3 or newer"
    return ""


def own_seat(obstacle: str = "") -> Seat:
    """This process's seat. An identity that cannot be read is one that nobody else has."""
    return Seat(
        host=socket.gethostname(),
        boot=_identity(lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip()),
        processes=_identity(lambda: str(Path("/proc/self/ns/pid").readlink())),
        network=_identity(lambda: str(Path("/proc/self/ns/net").readlink())),
        user=str(os.geteuid()) if hasattr(os, "geteuid") else "unknown",
        obstacle=obstacle,
    )


def exchange_seats(store: Store, group: str, seat: Seat, rank: int, size: int, timeout_s: float) -> list[Seat]:
    """The seats of all ranks of a group, in their order; the same on every rank, each of which calls this.

    store: a prefix of this question's own. Raises CommError for ranks that do not come within `timeout_s` seconds.
    """
    store.set(f"seat/{rank}", json.dumps(seat))
    meet(store, group, rank, size, timeout_s)
    return [Seat(*json.loads(store.get(f"seat/{other}"))) for other in range(size)]


def machines_of(seats: Sequence[Seat]) -> tuple[int, ...]:
    """The number of each rank's machine, counted from 0 in the order of ranks. Hosts played by namespaces count."""
    places = [(seat.boot, seat.processes, seat.network) for seat in seats]
    found = list(dict.fromkeys(places))
    return tuple(found.index(place) for place in places)


def sharing_machines(seats: Sequence[Seat]) -> tuple[int, ...]:
    """The same; empty where ranks of one machine cannot share memory."""
    machines = machines_of(seats)
    on_each = [[seat for seat, at in zip(seats, machines, strict=True) if at == number] for number in set(machines)]
    return () if any(why_apart(together) for together in on_each) else machines


def why_apart(seats: Sequence[Seat]) -> str:
    """Why ranks cannot share memory, such as `ranks on several machines: 0, 1 on a; 2 on b`; else empty."""
    for name, what in (
        ("boot", "on several machines"),
        ("processes", "in several process namespaces (containers)"),
        ("network", "in several network namespaces"),
        ("user", "of several users"),
    ):
        ranks: dict[str, list[str]] = {}
        hosts: dict[str, str] = {}
        for rank, seat in enumerate(seats):
            ranks.setdefault(getattr(seat, name), []).append(str(rank))
            hosts[getattr(seat, name)] = seat.host
        if len(ranks) > 1:
            places = "; ".join(f"{', '.join(numbers)} on {hosts[key]}" for key, numbers in ranks.items())
            return f"ranks {what}: {places}"
    return next((f"rank {rank}: {seat.obstacle}" for rank, seat in enumerate(seats) if seat.obstacle), "")


def _identity(read: Callable[[], str]) -> str:
    try:
        return read()
    except OSError:
        return f"unknown, process {os.getpid()} of {socket.gethostname()}"
