"""The NCCL backend on a real GPU: alone in its group, and with a second rank where this NCCL lets ranks share a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from tests.gpu.two_ranks import run_two, spin

from phalanx.comm import Communicator, GroupBrokenError, WaitTimeoutError, create_communicator
from phalanx.comm.nccl import NcclCommunicator
from phalanx.comm.nccl_binding import DATA_TYPES, NcclBinding
from phalanx.errors import CommError
from phalanx.kernels import CudaGraphs

NUM = 1 << 20


@pytest.fixture
def alone(binding: NcclBinding) -> Iterator[Communicator]:
    comm = create_communicator("nccl", rank=0, size=1, device="cuda", timeout_s=5.0)
    try:
        yield comm
    finally:
        comm.close()


def test_the_reason_tells_the_nccl_that_is_loaded(alone: Communicator, binding: NcclBinding) -> None:
    assert binding.told in alone.reason
    assert "NCCL 2." in binding.told


@pytest.mark.parametrize("dtype", DATA_TYPES)
def test_a_group_of_one_gives_back_what_it_got(alone: Communicator, dtype: torch.dtype) -> None:
    x = torch.arange(96, device="cuda").to(dtype).reshape(12, 8)
    assert torch.equal(alone.all_reduce(x.clone()), x)
    assert torch.equal(alone.all_reduce(x.clone(), op="max", async_op=True).wait(), x)
    assert torch.equal(alone.all_gather(x), x)
    assert torch.equal(alone.all_gather(x, sizes=[12]), x)
    assert torch.equal(alone.reduce_scatter(x), x)
    assert torch.equal(alone.broadcast(x.clone(), 0, async_op=True).wait(), x)
    alone.barrier()
    alone.check()


def test_fp8_moves(alone: Communicator) -> None:
    x = torch.randn(64, device="cuda").to(torch.float8_e4m3fn)
    assert torch.equal(alone.all_gather(x).view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("async_op", [False, True])
def test_a_transfer_waits_for_compute_and_compute_for_it(alone: Communicator, async_op: bool) -> None:
    for value in (1.0, 2.0, 3.0):
        x = torch.zeros(NUM, device="cuda")
        spin(0.02)
        x.fill_(value)
        if async_op:
            alone.all_reduce(x, async_op=True).wait()
        else:
            alone.all_reduce(x)
        y = x * 2
        x.zero_()
        assert bool((y == 2 * value).all())


def test_memory_of_an_asynchronous_transfer_is_not_given_out_again_before_it_ends(alone: Communicator) -> None:
    for turn in range(20):
        x = torch.full((NUM,), float(turn), device="cuda")
        spin(0.002)
        handle = alone.reduce_scatter(x, async_op=True)
        del x
        torch.full((NUM,), -1.0, device="cuda")  # would take its place
        assert bool((handle.wait() == turn).all())


def test_captured_operations_run_with_the_graph_while_the_watchdog_looks(alone: Communicator) -> None:
    x, y, z = (torch.ones(NUM, device="cuda") for _ in range(3))
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with create_communicator("nccl", rank=0, size=1, group="other", device="cuda", timeout_s=5.0) as other:
        for comm in (alone, other):
            comm.all_reduce(x)
            comm.all_reduce(y, async_op=True).wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x.add_(1)
            handle = alone.all_reduce(x, async_op=True)
            y.mul_(2)
            handle.wait()
            alone.all_reduce(y)
            y.add_(x)
            with torch.cuda.stream(side):  # under way during the capture, so that the watchdog asks for events
                spin(1.5)
                other.all_reduce(z)
            time.sleep(1.2)  # longer than its tick
            with pytest.raises(CommError, match="cannot be captured"):
                alone.barrier()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        alone.check()
        other.check()
        assert x[0].item() == 4
        assert y[0].item() == ((1 * 2 + 2) * 2 + 3) * 2 + 4
        assert [entry.seq for entry in alone.ledger.entries()] == [1, 2], "only what ran outside of the graph"
        assert [entry.seq for entry in other.ledger.entries()] == [1, 2, 3]
        graph.reset()


def test_replays_are_in_the_ledger_with_the_times_that_marks_in_the_graph_tell(alone: Communicator) -> None:
    x, graphs = torch.ones(16 * NUM, device="cuda"), CudaGraphs()

    def step() -> None:
        alone.ledger.layer = 2
        alone.all_reduce(x)
        spin(0.01)
        alone.ledger.layer = 3
        alone.all_reduce(x, async_op=True).wait()

    step()
    graph = alone.captured(graphs, step)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    alone.check()
    entries = alone.ledger.entries()
    assert [(entry.seq, entry.layer) for entry in entries] == [
        (1, 2),
        (2, 3),
        (3, 2),
        (4, 3),
        (5, 2),
        (6, 3),
        (7, 2),
        (8, 3),
    ]
    for first, second in zip(entries[2::2], entries[3::2], strict=True):
        assert 0 < first.total_us < 10_000 < second.started_us - first.started_us
    graphs.reset()


def test_the_ledger_tells_hidden_from_exposed(alone: Communicator) -> None:
    x = torch.ones(16 * NUM, device="cuda")
    alone.all_reduce(x)
    torch.cuda.synchronize()
    alone.ledger.take()
    handle = alone.all_reduce(x, async_op=True)
    spin(0.05)
    handle.wait()
    assert alone.ledger.take().totals == (), "nothing is told before the GPU has done it"
    torch.cuda.synchronize()
    (total,) = alone.ledger.take().totals
    assert total.op == "all_reduce"
    assert total.hidden_us > 10 * total.exposed_us


def test_the_ledger_never_blocks_the_thread(alone: Communicator) -> None:
    x = torch.ones(16, device="cuda")
    alone.all_reduce(x)
    torch.cuda.synchronize()
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    spin(1.0)
    for _ in range(20):
        alone.all_reduce(x)
        alone.ledger.take()
    done.record()
    assert not cast(Any, done).query(), "the calls have waited for the GPU"


def test_a_split_of_one_works_beside_its_parent(alone: Communicator) -> None:
    assert isinstance(alone, NcclCommunicator)
    with alone.split([0], "same") or pytest.fail("no part") as part:
        assert part.all_reduce(torch.ones(4, device="cuda")).tolist() == [1.0] * 4
    assert alone.split([-1], "none") is None
    assert alone.all_reduce(torch.ones(4, device="cuda")).tolist() == [1.0] * 4


def test_abort_returns_within_a_second(alone: Communicator) -> None:
    alone.all_reduce(torch.ones(NUM, device="cuda"))
    began_s = time.monotonic()
    alone.abort()
    assert time.monotonic() - began_s < 1.0
    with pytest.raises(GroupBrokenError, match="it was aborted on rank 0"):
        alone.all_reduce(torch.ones(4, device="cuda"))


@pytest.mark.parametrize("dtype", DATA_TYPES)
def test_two_ranks_get_the_right_result_of_every_operation(binding: NcclBinding, dtype: torch.dtype) -> None:
    def use(comm: NcclCommunicator) -> None:
        rank, other = comm.rank, 1 - comm.rank
        x = (torch.arange(48, device="cuda") % 7).to(dtype).reshape(6, 8)
        assert torch.equal(comm.all_reduce(x + rank), x + x + 1)
        assert torch.equal(comm.all_reduce(x + rank, op="max", async_op=True).wait(), x + 1)
        assert torch.equal(comm.all_gather(x + rank), torch.cat([x, x + 1]))
        assert torch.equal(comm.all_gather(x[: 2 + rank] + rank, sizes=[2, 3]), torch.cat([x[:2], x[:3] + 1]))
        assert torch.equal(comm.reduce_scatter(x.clone()), (x + x)[3 * rank : 3 * rank + 3])
        assert torch.equal(comm.reduce_scatter(x.clone(), sizes=[2, 4]), (x + x)[2 * rank : 2 + 4 * rank])
        assert torch.equal(comm.broadcast(x + rank, 1), x + 1)
        into = torch.zeros_like(x)
        posted = comm.recv(into, other, async_op=True)  # posted ahead: holds up neither the collective nor the send
        comm.barrier()
        sent = comm.send(x + rank, other, async_op=True)
        posted.wait()
        sent.wait()
        assert torch.equal(into, x + other)
        torch.cuda.current_stream().synchronize()
        comm.check()

    run_two(binding, use)


def test_two_ranks_in_cuda_graphs(binding: NcclBinding) -> None:
    turns = threading.Lock()

    def use(comm: NcclCommunicator) -> float:
        x, into = torch.full((1024,), comm.rank + 1.0, device="cuda"), torch.zeros(1024, device="cuda")
        move = comm.send if comm.rank == 0 else comm.recv
        comm.all_reduce(into)
        move(into, 1 - comm.rank)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        # One rank after the other: torch allows one capture at a time in a process.
        with turns, torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            comm.all_reduce(x)
            move(x, 1 - comm.rank)
        for _ in range(2):
            graph.replay()
        torch.cuda.current_stream().synchronize()
        found = float(x[0])
        graph.reset()
        return found

    assert run_two(binding, use) == [6.0, 6.0]  # 1 + 2 = 3, then 3 + 3


def test_a_rank_that_never_comes_ends_the_others_wait_on_the_gpu(binding: NcclBinding) -> None:
    def use(comm: NcclCommunicator) -> float:
        comm.all_reduce(torch.ones(4, device="cuda"))
        comm.barrier()
        if comm.rank == 1:
            time.sleep(6)
            return 0.0
        began_s = time.monotonic()
        x = comm.all_reduce(torch.ones(4, device="cuda"))
        called_s = time.monotonic() - began_s
        x.cpu()  # comes back because the watchdog ends the transfer
        with pytest.raises(WaitTimeoutError, match=r"all_reduce #3 .* not arrived: rank 1"):
            comm.check()
        return called_s

    assert run_two(binding, use, timeout_s=2.0)[0] < 1.0, "the call itself must not wait"


def test_two_ranks_split(binding: NcclBinding) -> None:
    def use(comm: NcclCommunicator) -> object:
        with comm.split([0, 0], "same") or pytest.fail("no part") as part:
            return part.all_reduce(torch.full((4,), comm.rank + 1.0, device="cuda")).tolist()

    assert run_two(binding, use) == [[3.0] * 4] * 2
