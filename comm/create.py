"""The one door to a communicator: the table of backends, the choice among them, and the meeting of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from phalanx.comm.group import GroupSpec
from phalanx.comm.ledger import Ledger
from phalanx.comm.machine import find_apart, find_obstacle, own_seat
from phalanx.comm.native import find_native
from phalanx.comm.rendezvous import connect_store, host_store_at, local_address, parse_rendezvous
from phalanx.errors import CommError

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
) -> None:
    """Adds a backend, or replaces the one of that name.

    factory: builds one rank's end of a group; called on every rank at once. probe: given the device (`cpu`, `cuda`,
    ...) and the size of the group, says whether the backend can serve it on this machine, without starting anything.
    priority: among usable backends `auto` takes the one with the highest. shares_memory: it serves only ranks that can
    share memory, on the CPU.
    """
    _backends[name] = _Backend(factory, probe, priority, shares_memory)


def choose_backend(name: str, device: str, size: int, *, apart: str = "") -> Choice:
    """The backend for a group of `size` ranks on `device`: the one named, or for `auto` the best usable here.

    apart: why the ranks share no memory, such as `ranks on several machines`; empty where they do. The reason says what
    was passed over and why. Raises CommError for a name that is not registered, or a backend that
    cannot serve the group.
    """
    names = ", ".join(sorted(_backends))
    if name != "auto":
        if name not in _backends:
            close = get_close_matches(name, [*_backends, "auto"], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise CommError(f"there is no communicator backend {name!r}{hint} Registered: auto, {names}")
        probe = _probe(name, device, size, apart)
        if not probe.usable:
            raise CommError(
                f"the communicator backend {name!r} cannot serve {size} ranks on {device!r}: {probe.reason}. "
                f"Use auto, or another of {names}"
            )
        return Choice(name, f"asked for; {probe.reason}")
    passed_over: list[str] = []
    for candidate in sorted(_backends, key=lambda key: -_backends[key].priority):
        probe = _probe(candidate, device, size, apart)
        if probe.usable:
            return Choice(candidate, "; ".join([probe.reason, *passed_over]))
        if candidate != "single":  # that several ranks are not one needs no saying
            passed_over.append(f"not {candidate}: {probe.reason}")
    raise CommError(f"no communicator backend can serve {size} ranks on {device!r}: {'; '.join(passed_over)}")


def usable_backends(device: str, size: int, *, apart: str = "") -> list[Choice]:
    """Every backend that can serve such a group here, each with what it is; first the one that `auto` takes."""
    by_priority = sorted(_backends, key=lambda key: -_backends[key].priority)
    probes = [(name, _probe(name, device, size, apart)) for name in by_priority]
    return [Choice(name, probe.reason) for name, probe in probes if probe.usable]


def _probe(name: str, device: str, size: int, apart: str) -> Probe:
    backend = _backends[name]
    probe = backend.probe(device, size)
    return Probe(False, apart) if probe.usable and backend.shares_memory and apart else probe


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
) -> Communicator:
    """Joins a group of ranks and returns this rank's end of it, once all have come.

    backend: `auto` or a registered name. rank: 0 to `size` - 1. rendezvous: where the ranks meet; not needed in a group
    of one. `file:///path` is a new file that all ranks see; `tcp://host:port` a port of rank 0's machine, where rank 0
    opens a store if none is open there; `host:port` a store that is open already; or such a store itself (several
    groups share it best). group: a name of its own on that store. device: `cpu`, `cuda` or `cuda:N`, where the tensors
    live. interface: network interface to be reached at; None for the one that leads to the store. timeout_s: longest
    wait for the other ranks, now and in each operation. ledger: where operations are written; None for a new one,
    `communicator.ledger`.

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
            GroupSpec(rank, size, group, device, timeout_s, ledger=ledger, reason=choice.reason)
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
    sharing = [_backends[name] for name in ([backend] if backend != "auto" else _backends)]
    if size > 1 and device == "cpu" and any(each.shares_memory for each in sharing):
        obstacle = next(
            (probe.reason for each in sharing if each.shares_memory and not (probe := each.probe(device, size)).usable),
            "",
        )
        apart = find_apart(PrefixStore(f"{prefix}/seats", store), group, own_seat(obstacle), rank, size, timeout_s)
        choice = choose_backend(backend, device, size, apart=apart)
    return _backends[choice.name].factory(
        GroupSpec(rank, size, group, device, timeout_s, PrefixStore(prefix, store), address, ledger, choice.reason)
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
register_backend("nccl-torch", _create_nccl_torch, _probe_nccl_torch, priority=15)
register_backend("gloo", _create_gloo, _probe_gloo, priority=10)
