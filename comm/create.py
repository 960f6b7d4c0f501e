"""The one door to a communicator: the table of backends, the choice among them, and the meeting of the ranks."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from phalanx.comm.group import GroupSpec
from phalanx.comm.ledger import Ledger
from phalanx.comm.machine import exchange_seats, find_obstacle, machines_of, own_seat, sharing_machines, why_apart
from phalanx.comm.rendezvous import connect_store, host_store_at, local_address, parse_rendezvous
from phalanx.errors import CommError
from phalanx.native import find_native

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from phalanx.comm.communicator import Communicator


class Probe(NamedTuple):
    """Whether a backend can serve a group here, and why (not). reason: half a sentence, such as `no GPU is seen`."""

    usable: bool
    reason: str


class Choice(NamedTuple):
    """The backend taken, and why."""

    name: str
    reason: str


class _Backend(NamedTuple):
    factory: Callable[[GroupSpec], Communicator]
    probe: Callable[[str, int], Probe]
    priority: int
    shares_memory: bool
    joins_machines: bool


_backends: dict[str, _Backend] = {}
_GPUS = "NCCL between GPUs, one a rank"
_SHARED = "memory that processes of one machine share"


def register_backend(
    name: str,
    factory: Callable[[GroupSpec], Communicator],
    probe: Callable[[str, int], Probe],
    *,
    priority: int = 0,
    shares_memory: bool = False,
    joins_machines: bool = False,
) -> None:
    """Adds a backend, or replaces the one of that name.

    factory: builds one rank's end of a group; called on every rank at once. probe: given the device (`cpu`, `cuda`,
    ...) and the size of the group, says whether the backend can serve it on this machine, without starting anything.
    priority: among usable backends `auto` takes the one with the highest. shares_memory: it serves only ranks that can
    share memory, on the CPU. joins_machines: `auto` takes it only for ranks on several machines, on each of which those
    that it has share memory.
    """
    _backends[name] = _Backend(factory, probe, priority, shares_memory, joins_machines)


def choose_backend(name: str, device: str, size: int, *, apart: str = "", machines: Sequence[int] = ()) -> Choice:
    """The backend for a group of `size` ranks on `device`: the one named, or for `auto` the best usable here.

    apart: why the ranks share no memory, such as `ranks on several machines`; empty where they do. machines: the number
    of each rank's machine, within which ranks share memory; empty where that is not known, or they do not. The reason
    says what was passed over and why. Raises CommError for a name that is not registered, or a backend that cannot
    serve the group.
    """
    names = ", ".join(sorted(_backends))
    if name != "auto":
        if name not in _backends:
            close = get_close_matches(name, [*_backends, "auto"], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise CommError(f"there is no communicator backend {name!r}{hint} Registered: auto, {names}")
        probe = _probe(name, device, size, apart, None)
        if not probe.usable:
            raise CommError(
                f"the communicator backend {name!r} cannot serve {size} ranks on {device!r}: {probe.reason}. "
                f"Use auto, or another of {names}"
            )
        return Choice(name, f"asked for; {probe.reason}")
    passed_over: list[str] = []
    for candidate in sorted(_backends, key=lambda key: -_backends[key].priority):
        probe = _probe(candidate, device, size, apart, machines)
        if probe.usable:
            return Choice(candidate, "; ".join([probe.reason, *passed_over]))
        if candidate != "single":  # that several ranks are not one needs no saying
            passed_over.append(f"not {candidate}: {probe.reason}")
    raise CommError(f"no communicator backend can serve {size} ranks on {device!r}: {'; '.join(passed_over)}")


def usable_backends(device: str, size: int, *, apart: str = "", machines: Sequence[int] = ()) -> list[Choice]:
    """Every backend that `auto` could take for such a group here, each with what it is; first the one that it takes."""
    by_priority = sorted(_backends, key=lambda key: -_backends[key].priority)
    probes = [(name, _probe(name, device, size, apart, machines)) for name in by_priority]
    return [Choice(name, probe.reason) for name, probe in probes if probe.usable]


def _probe(name: str, device: str, size: int, apart: str, machines: Sequence[int] | None) -> Probe:
    """machines: None for a backend that was asked for by name, and serves wherever the ranks are."""
    backend = _backends[name]
    probe = backend.probe(device, size)
    if probe.usable and backend.shares_memory and apart:
        return Probe(False, apart)
    if probe.usable and backend.joins_machines and machines is not None:
        num_machines = len(set(machines))
        if num_machines < 2:
            return Probe(False, "it joins machines on which ranks share memory, and several such are not known")
        counts = " + ".join(str(machines.count(number)) for number in range(num_machines))
        return Probe(True, f"{probe.reason}: {counts} ranks")
    return probe


def create_communicator(
    backend: str = "auto",
    *,
    rank: int,
    size: int,
    rendezvous: str | Store | None = None,
    group: str = "world",
    device: str = "cpu",
    interface: str | None = None,
    timeout_s: float = 60.0,
    ledger: Ledger | None = None,
    member: str | None = None,
) -> Communicator:
    """Joins a group of ranks and returns this rank's end of it, once all have come.

    backend: `auto` or a registered name. rank: 0 to `size` - 1. rendezvous: where the ranks meet; not needed in a group
    of one. `file:///path` is a new file that all ranks see; `tcp://host:port` a port of rank 0's machine, where rank 0
    opens a store if none is open there; `host:port` a store that is open already; or such a store itself (several
    groups share it best). group: a name of its own on that store. device: `cpu`, `cuda` or `cuda:N`, where the tensors
    live. interface: network interface to be reached at; None for the one that leads to the store. timeout_s: longest
    wait for the other ranks, now and in each operation. ledger: where operations are written; None for a new one,
    `communicator.ledger`. member: what this rank is beside its number, told in messages of all; None for its host.

    Raises CommError where the backend cannot serve, the store cannot be reached, or ranks are missing.
    """
    if size < 1 or not 0 <= rank < size:
        raise CommError(f"group {group!r}: rank must be from 0 to size - 1, found rank {rank} of size {size}")
    if not timeout_s > 0:
        raise CommError(f"group {group!r}: timeout_s must be above 0, found {timeout_s}")
    choice = choose_backend(backend, device, size)
    ledger = Ledger() if ledger is None else ledger
    if size == 1 and rendezvous is None:
        return _backends[choice.name].factory(
            GroupSpec(
                rank=rank,
                size=size,
                name=group,
                device=device,
                timeout_s=timeout_s,
                ledger=ledger,
                reason=choice.reason,
            )
        )
    if rendezvous is None:
        raise CommError(f"group {group!r} of {size} ranks needs a rendezvous: host:port, file:///path or an open store")
    from torch._C._distributed_c10d import PrefixStore

    if isinstance(rendezvous, str):
        may_host = rank == 0 and rendezvous.startswith("tcp://")
        store = (host_store_at(rendezvous) if may_host else None) or connect_store(rendezvous, timeout_s)
    else:
        store = rendezvous
    towards = parse_rendezvous(rendezvous).host if isinstance(rendezvous, str) else _host_of(rendezvous)
    address = local_address(towards, interface)
    prefix = f"phalanx/{group}"
    seats = [own_seat(find_obstacle(device) if device == "cpu" else "")]
    if size > 1:
        seats = exchange_seats(PrefixStore(f"{prefix}/seats", store), group, seats[0], rank, size, timeout_s)
        choice = choose_backend(backend, device, size, apart=why_apart(seats), machines=sharing_machines(seats))
    return _backends[choice.name].factory(
        GroupSpec(
            rank=rank,
            size=size,
            name=group,
            device=device,
            timeout_s=timeout_s,
            store=PrefixStore(prefix, store),
            address=address,
            ledger=ledger,
            reason=choice.reason,
            member=f"on {socket.gethostname()}" if member is None else member,
            machines=machines_of(seats),
        )
    )


def _host_of(store: Store) -> str | None:
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store.host if isinstance(store, TCPStore) else None


def _create_single(spec: GroupSpec) -> Communicator:
    from phalanx.comm.single import SingleCommunicator

    return SingleCommunicator(spec)


def _create_gloo(spec: GroupSpec) -> Communicator:
    if spec.device == "cpu":
        from phalanx.comm.torch_backend import GlooCommunicator

        return GlooCommunicator(spec)
    from phalanx.comm.host_staged import StagedCommunicator

    return StagedCommunicator(spec)


def _create_hierarchical(spec: GroupSpec) -> Communicator:
    from phalanx.comm.hierarchical import HierarchicalCommunicator

    return HierarchicalCommunicator(spec)


def _create_nccl(spec: GroupSpec) -> Communicator:
    from phalanx.comm.nccl_create import create_nccl

    return create_nccl(spec)


def _create_nccl_torch(spec: GroupSpec) -> Communicator:
    from phalanx.comm.torch_backend import TorchNcclCommunicator

    return TorchNcclCommunicator(spec)


def _create_shm(spec: GroupSpec) -> Communicator:
    from phalanx.comm.shm_native import create_shm

    return create_shm(spec)


def _create_shm_torch(spec: GroupSpec) -> Communicator:
    from phalanx.comm.shm_native import create_shm

    return create_shm(spec, forced_torch=True)


def _probe_single(device: str, size: int) -> Probe:
    return (
        Probe(True, "a group of one") if size == 1 else Probe(False, f"it serves a group of one, this has {size} ranks")
    )


def _probe_gloo(device: str, size: int) -> Probe:
    if find_spec("torch") is None:
        return Probe(False, "torch is not installed")
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Probe(False, "this torch was built without gloo")
    return Probe(True, "TCP between CPUs" if device == "cpu" else "TCP, through host memory")


def _probe_hierarchical(device: str, size: int) -> Probe:
    if obstacle := find_obstacle(device):
        return Probe(False, obstacle)
    gloo = _probe_gloo(device, size)
    return Probe(True, "shared memory in a machine, TCP between machines") if gloo.usable else gloo


def _probe_nccl(device: str, size: int) -> Probe:
    probe = _probe_nccl_torch(device, size)
    if not probe.usable:
        return probe
    from phalanx.comm.nccl_cupy import find_cupy

    found = find_cupy()
    if found.binding is None and size == 1:
        return Probe(False, f"for a group of one it needs CuPy: {found.told}")
    how = found.told if found.binding is not None else f"by torch.distributed, since {found.told}"
    return Probe(True, f"{_GPUS} ({how})")


def _probe_nccl_torch(device: str, size: int) -> Probe:
    if not device.startswith("cuda"):
        return Probe(False, f"it needs GPUs, the device is {device!r}")
    if find_spec("torch") is None:
        return Probe(False, "torch is not installed")
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_nccl_available():
        return Probe(False, "this torch was built without NCCL")
    if not torch.cuda.is_available():
        return Probe(False, "no GPU is seen")
    return Probe(True, _GPUS)


def _probe_shm(device: str, size: int) -> Probe:
    probe = _probe_shm_torch(device, size)
    if not probe.usable:
        return probe
    native = find_native()
    how = native.told if native.library is not None else f"pure torch: {native.told}"
    return Probe(True, f"{_SHARED} ({how})")


def _probe_shm_torch(device: str, size: int) -> Probe:
    if find_spec("torch") is None:
        return Probe(False, "torch is not installed")
    obstacle = find_obstacle(device)
    return Probe(False, obstacle) if obstacle else Probe(True, f"{_SHARED} (pure torch)")


register_backend("single", _create_single, _probe_single, priority=100)
register_backend("shm", _create_shm, _probe_shm, priority=30, shares_memory=True)
register_backend("shm-torch", _create_shm_torch, _probe_shm_torch, priority=5, shares_memory=True)
register_backend("nccl", _create_nccl, _probe_nccl, priority=20)
register_backend("hierarchical", _create_hierarchical, _probe_hierarchical, priority=15, joins_machines=True)
register_backend("nccl-torch", _create_nccl_torch, _probe_nccl_torch, priority=16)
register_backend("gloo", _create_gloo, _probe_gloo, priority=10)
