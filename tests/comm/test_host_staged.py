"""The channel through host memory, over a GPU made of threads and a real gloo."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.comm.fake_gpu import FakeGpu
from torch._C._distributed_c10d import HashStore

from phalanx.comm import GroupSpec, PeerLostError, WaitTimeoutError
from phalanx.comm.host_staged import StagedCommunicator
from phalanx.comm.torch_backend import PIECE_BYTES, GlooCommunicator

NUM_LONG = (3 * PIECE_BYTES + 1000) // 4  # floats of three pieces and a bit


def run(function: Callable[[Any, FakeGpu], object], timeout_s: float = 20.0, plain: int | None = None) -> list[Any]:
    """What each of two ranks returned. plain: the rank that is on a CPU."""
    store = HashStore()

    def one(rank: int) -> object:
        gpu = FakeGpu()
        spec = GroupSpec(rank, 2, "border", "cpu", timeout_s, store, "127.0.0.1")
        comm = GlooCommunicator(spec) if rank == plain else StagedCommunicator(spec, gpu)
        try:
            return function(comm, gpu)
        finally:
            comm.close()

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(2)]]


@pytest.mark.parametrize("plain", [None, 0, 1])
def test_tensors_of_any_length_arrive_in_the_order_of_the_calls(plain: int | None) -> None:
    lengths = [5, NUM_LONG, 1, PIECE_BYTES // 4, NUM_LONG]

    def use(comm: Any, gpu: FakeGpu) -> None:
        values = [torch.arange(length, dtype=torch.float32) + index for index, length in enumerate(lengths)]
        if comm.rank == 0:
            for handle in [comm.send(value, 1, async_op=True) for value in values]:
                handle.wait()
            return
        into = [torch.zeros(length) for length in lengths]
        for handle in [comm.recv(each, 0, async_op=True) for each in into]:
            handle.wait()
        gpu.synchronize()
        assert all(torch.equal(*pair) for pair in zip(into, values, strict=True))

    run(use, plain=plain)


def test_a_send_reads_its_tensor_behind_the_kernel_that_makes_it_and_before_the_one_that_changes_it() -> None:
    def use(comm: Any, gpu: FakeGpu) -> None:
        x = torch.zeros(NUM_LONG)
        if comm.rank == 0:
            gpu.run(lambda: x.fill_(1), takes_s=0.05)
            comm.send(x, 1)
            gpu.run(lambda: x.fill_(2))
            return
        seen = torch.zeros(NUM_LONG)
        comm.recv(x, 0)
        gpu.run(lambda: seen.copy_(x))
        gpu.synchronize()
        assert bool((seen == 1).all())

    run(use)


def test_tensors_of_inference_mode_are_carried_too() -> None:
    def use(comm: Any, gpu: FakeGpu) -> None:
        with torch.inference_mode():
            x = torch.full((NUM_LONG,), 3.0 * (comm.rank == 0))
            if comm.rank == 0:
                comm.send(x, 1)
            else:
                comm.recv(x, 0)
                gpu.synchronize()
                assert bool((x == 3).all())

    run(use)


def test_both_ways_at_once() -> None:
    def use(comm: Any, gpu: FakeGpu) -> None:
        x, into = torch.full((NUM_LONG,), float(comm.rank)), torch.zeros(NUM_LONG)
        posted = comm.recv(into, 1 - comm.rank, async_op=True)
        sent = comm.send(x, 1 - comm.rank, async_op=True)
        posted.wait()
        sent.wait()
        gpu.synchronize()
        assert bool((into == 1 - comm.rank).all())

    run(use)


def test_what_was_sent_goes_out_when_the_sender_closes_at_once() -> None:
    def use(comm: Any, gpu: FakeGpu) -> None:
        x = torch.full((NUM_LONG,), 4.0 * (comm.rank == 0))
        if comm.rank == 0:
            comm.send(x, 1)
            return
        time.sleep(0.3)
        comm.recv(x, 0)
        gpu.synchronize()
        assert bool((x == 4).all())

    run(use)


def test_a_receive_past_its_limit_names_the_sender() -> None:
    def use(comm: Any, gpu: FakeGpu) -> None:
        if comm.rank == 0:
            time.sleep(1.5)
            return
        with pytest.raises(WaitTimeoutError, match=r"recv #1 from rank 0 .* not arrived: rank 0"):
            comm.recv(torch.zeros(4), 0)

    run(use, timeout_s=0.5)


def test_a_rank_that_has_given_up_is_noticed_by_a_receive_posted_ahead() -> None:
    def use(comm: Any, gpu: FakeGpu) -> None:
        posted = comm.recv(torch.zeros(4), 1 - comm.rank, async_op=True)
        if comm.rank == 0:
            comm.abort()
            return
        with pytest.raises(PeerLostError, match="the connection to rank 0 was lost"):
            posted.wait()

    run(use)
