from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import cast

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from phalanx.comm import (
    Communicator,
    GroupSpec,
    choose_backend,
    create,
    create_communicator,
    nccl_cupy,
    register_backend,
)
from phalanx.comm.create import Probe
from phalanx.comm.machine import find_obstacle
from phalanx.comm.nccl_binding import NcclBinding
from phalanx.comm.nccl_create import _agree
from phalanx.comm.nccl_cupy import Found
from phalanx.comm.single import SingleCommunicator
from phalanx.errors import CommError
from phalanx.native import Native

needs_shm = pytest.mark.skipif(bool(find_obstacle("cpu")), reason=f"shared memory: {find_obstacle('cpu')}")


class ToyCommunicator(SingleCommunicator):
    backend = "toy"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(create, "_backends", dict(create._backends))
    yield


def test_a_group_of_one_needs_no_transport() -> None:
    assert choose_backend("auto", "cpu", 1).name == "single"
    assert choose_backend("auto", "cuda", 1).name == "single"


@needs_shm
def test_cpus_of_one_machine_talk_through_shared_memory() -> None:
    choice = choose_backend("auto", "cpu", 4)
    assert choice.name == "shm"
    assert choice.reason.startswith("memory that processes of one machine share (")


@needs_shm
def test_the_reason_says_whether_the_native_library_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "find_native", lambda: Native(ModuleType("library"), "native library, avx2"))
    assert choose_backend("shm", "cpu", 2).reason.endswith("share (native library, avx2)")
    monkeypatch.setattr(create, "find_native", lambda: Native(None, "the native library is not built; install it"))
    assert choose_backend("shm", "cpu", 2).reason.endswith("(pure torch: the native library is not built; install it)")
    assert choose_backend("shm-torch", "cpu", 2).reason.endswith("share (pure torch)")


def test_cpus_of_several_machines_talk_through_gloo_and_the_reason_says_what_was_passed_over() -> None:
    choice = choose_backend("auto", "cpu", 4, apart="ranks on several machines: 0, 1 on a; 2, 3 on b")
    assert choice.name == "gloo"
    assert "TCP between CPUs" in choice.reason
    assert "not nccl: it needs GPUs" in choice.reason
    if not find_obstacle("cpu"):
        assert "not shm: ranks on several machines: 0, 1 on a; 2, 3 on b" in choice.reason


@needs_shm
def test_shared_memory_between_machines_is_refused_with_the_ranks_of_each() -> None:
    with pytest.raises(
        CommError, match=r"'shm' cannot serve 3 ranks on 'cpu': ranks on several machines: 0, 2 on a; 1 on b\. Use auto"
    ):
        choose_backend("shm", "cpu", 3, apart="ranks on several machines: 0, 2 on a; 1 on b")


def test_shared_memory_is_refused_for_gpus_and_processors_that_reorder_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommError, match="it serves the CPU, the device is 'cuda:1'"):
        choose_backend("shm", "cuda:1", 2)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    if sys.platform == "linux":
        assert "not shm: it needs the store order of x86-64, this is aarch64" in choose_backend("auto", "cpu", 2).reason


def test_gpus_talk_through_nccl_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert choose_backend("auto", "cuda", 2).name == "nccl"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    choice = choose_backend("auto", "cuda:1", 2)
    assert choice.name == "gloo"
    assert "not nccl: this torch was built without NCCL" in choice.reason


def test_an_unknown_backend_is_refused_with_the_registered_names() -> None:
    with pytest.raises(
        CommError,
        match=r"'glo'; did you mean 'gloo'\? .*auto, gloo, hierarchical, nccl, nccl-torch, shm, shm-torch, single",
    ):
        choose_backend("glo", "cpu", 2)


def test_a_backend_that_cannot_serve_the_group_is_refused_with_the_reason() -> None:
    with pytest.raises(CommError, match="'single' cannot serve 2 ranks on 'cpu': it serves a group of one, this has 2"):
        choose_backend("single", "cpu", 2)
    with pytest.raises(CommError, match="'nccl' cannot serve 2 ranks on 'cpu': it needs GPUs"):
        create_communicator("nccl", rank=0, size=2)


@pytest.mark.usefixtures("registry")
def test_a_registered_backend_of_higher_priority_is_taken() -> None:
    built: list[GroupSpec] = []

    def build(spec: GroupSpec) -> Communicator:
        built.append(spec)
        return ToyCommunicator(spec)

    register_backend("toy", build, lambda device, size: Probe(size == 1, "for toys"), priority=200)
    comm = create_communicator(rank=0, size=1, group="play", timeout_s=5)
    assert comm.backend == "toy"
    assert (built[0].name, built[0].timeout_s) == ("play", 5)
    assert "not toy: for toys" in choose_backend("auto", "cpu", 2).reason


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_group_is_refused(rank: int, size: int) -> None:
    with pytest.raises(CommError, match="rank must be from 0 to size - 1"):
        create_communicator(rank=rank, size=size)


def test_a_group_of_several_needs_a_rendezvous() -> None:
    with pytest.raises(CommError, match="group 'tp' of 2 ranks needs a rendezvous"):
        create_communicator(rank=0, size=2, group="tp")


def test_importing_the_room_does_not_import_torch() -> None:
    code = (
        "import sys, phalanx.comm as c; c.create_communicator, c.Ledger, c.host_store; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_nccl_says_by_what_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    told = "NCCL 2.28.9 through CuPy 14.2.0, built for NCCL 2.27.7"
    monkeypatch.setattr(nccl_cupy, "find_cupy", lambda: Found(cast(NcclBinding, object()), told))
    assert choose_backend("nccl", "cuda", 2).reason == f"asked for; NCCL between GPUs, one a rank ({told})"
    assert choose_backend("nccl", "cuda", 1).name == "nccl"
    monkeypatch.setattr(nccl_cupy, "find_cupy", lambda: Found(None, "CuPy is not installed"))
    assert "(by torch.distributed, since CuPy is not installed)" in choose_backend("auto", "cuda", 2).reason
    with pytest.raises(CommError, match="'nccl' cannot serve 1 ranks on 'cuda': for a group of one it needs CuPy"):
        choose_backend("nccl", "cuda", 1)


def test_one_rank_without_cupy_makes_all_use_torchs_nccl() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        specs = [GroupSpec(rank, 2, "tp", "cuda", 10.0, store) for rank in range(2)]
        assert list(pool.map(_agree, specs, ["", "CuPy is not installed"])) == ["on rank 1 CuPy is not installed"] * 2
