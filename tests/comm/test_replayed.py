"""Sums within a recording: the results, numbers, ledger and errors of those outside."""

from __future__ import annotations

import time

import pytest
import torch
from tests.native_library import excuse_for_no_library
from tests.rank_threads import Join, run_ranks

from phalanx.comm import Communicator
from phalanx.comm.work import PeerLostError, WaitTimeoutError
from phalanx.errors import CommError
from phalanx.kernels import Arena, Recording
from phalanx.native import find_native

pytestmark = pytest.mark.skipif(
    find_native().library is None and bool(excuse_for_no_library()), reason=f"the library: {excuse_for_no_library()}"
)
EPS = 1e-5
LAYERS = range(4, 7)
BACKENDS = ["shm", "gloo"]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


class Summed:
    """Sums of three layers of one rank, recorded, and the same outside of a recording."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.norm = random(24).fill_(0.5)
        self.x = [random(3, 24) for _ in LAYERS]
        self.residual = random(3, 24)
        self.recording = Recording(Arena())
        self.given = [x.clone() for x in self.x]  # a sum overwrites what it is given
        with self.recording.record():
            total = self.residual
            for layer, x in zip(LAYERS, self.given, strict=True):
                comm.ledger.layer = layer
                self.normed, total = comm.record_fused_all_reduce_rms_norm(self.recording, x, total, self.norm, EPS)
        self.total = total
        comm.ledger.layer = -1

    def replay(self) -> tuple[torch.Tensor, torch.Tensor]:
        for place, x in zip(self.given, self.x, strict=True):
            place.copy_(x)
        self.recording.replay()
        return self.normed.clone(), self.total.clone()

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.residual
        for x in self.x:
            normed, total = self.comm.fused_all_reduce_rms_norm(x.clone(), total, self.norm, EPS)
        return normed, total


def same_residual(comm: Communicator, summed: Summed) -> None:
    comm.broadcast(summed.residual, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 3])
def test_replayed_sums_have_the_bits_of_others(backend: str, size: int) -> None:
    def rank(number: int, join: Join) -> None:
        comm = join("sums", number, size)
        summed = Summed(comm)
        same_residual(comm, summed)
        for _ in range(3):
            for x in summed.x:
                x.copy_(random(3, 24))
            expected = summed.expected()
            for found, wanted in zip(summed.replay(), expected, strict=True):
                assert torch.equal(found, wanted)

    run_ranks(size, rank, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ledger_has_each_of_them(backend: str) -> None:
    def rank(number: int, join: Join) -> None:
        comm = join("sums", number, 2)
        summed = Summed(comm)
        before = comm.ledger.num_recorded
        began_us = time.perf_counter() * 1e6
        for step in (7, 8):
            comm.ledger.begin_step(step)
            summed.replay()
        ended_us = time.perf_counter() * 1e6
        comm.ledger.layer = -1
        comm.barrier()
        *entries, barrier = comm.ledger.entries()[before:]
        assert [(entry.step, entry.layer) for entry in entries] == [
            (step, layer) for step in (7, 8) for layer in LAYERS
        ]
        assert {(entry.op, entry.group, entry.num_bytes) for entry in entries} == {
            ("fused_all_reduce_rms_norm", "sums", 3 * 24 * 2)
        }
        first = entries[0].seq
        assert [entry.seq for entry in (*entries, barrier)] == list(range(first, first + 7))
        times = [began_us]
        for entry in entries:
            times += [entry.started_us, entry.started_us + entry.total_us]
        times.append(ended_us)
        assert times == sorted(times)

    run_ranks(2, rank, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_by_itself(backend: str) -> None:
    def rank(number: int, join: Join) -> None:
        comm = join("sums", number, 3)
        x = torch.zeros(7, dtype=torch.bfloat16)
        recording = Recording(Arena())
        with recording.record():
            comm.ledger.layer = 2
            comm.record_all_reduce(recording, x)
        assert not x.any()
        for step in (1, 2):
            x.copy_(torch.arange(7) * step + number)
            recording.replay()
            assert x.tolist() == [3 * at * step + 3 for at in range(7)]
        assert [(each.op, each.layer) for each in comm.ledger.entries()[-2:]] == [("all_reduce", 2)] * 2

    run_ranks(3, rank, backend=backend)


def test_a_late_rank_is_named_with_the_layer() -> None:
    """The second replay is one that the other rank does not make."""

    def rank(number: int, join: Join) -> str:
        comm = join("sums", number, 2)
        summed = Summed(comm)
        comm.barrier()
        summed.replay()
        if number == 1:
            time.sleep(1.5)
            return ""
        comm.timeout_s = 0.3
        other = Summed(comm)  # the limit is that of the recording
        with pytest.raises(WaitTimeoutError) as caught:
            other.replay()
        assert tuple(caught.value.missing_ranks) == (1,)
        with pytest.raises(CommError):
            other.replay()
        return str(caught.value)

    told, _ = run_ranks(2, rank, backend="shm")
    assert "fused_all_reduce_rms_norm #5" in told  # behind a barrier and three sums
    assert "in layer 4" in told
    assert "rank 1" in told


def test_a_rank_that_leaves_ends_the_replay() -> None:
    def rank(number: int, join: Join) -> None:
        comm = join("sums", number, 2)
        summed = Summed(comm)
        summed.replay()
        if number == 1:
            comm.close()
            return
        with pytest.raises(PeerLostError):
            summed.replay()

    run_ranks(2, rank, backend="shm")


def test_a_rank_within_a_replay_is_seen_to_wait() -> None:
    """By the rank that everybody waits for, in another operation, once it gives up."""

    def rank(number: int, join: Join) -> str:
        comm = join("sums", number, 3)
        if number == 0:
            comm.timeout_s = 1.0
        summed = Summed(comm)
        comm.barrier()
        if number == 2:
            time.sleep(3)
            return ""
        if number == 1:
            with pytest.raises(CommError):
                summed.replay()
            return ""
        with pytest.raises(WaitTimeoutError) as caught:
            summed.replay()
        assert tuple(caught.value.guilty_ranks) == (2,)
        return str(caught.value)

    told, *_ = run_ranks(3, rank, backend="shm")
    assert "not arrived: rank 2" in told


def test_a_replay_comes_behind_transfers_under_way() -> None:
    def rank(number: int, join: Join) -> None:
        comm = join("sums", number, 2)
        summed = Summed(comm)
        same_residual(comm, summed)
        expected = summed.expected()
        ones = [torch.ones(5) for _ in range(3)]
        handles = [comm.all_reduce(one, async_op=True) for one in ones]
        if number == 0:
            time.sleep(0.2)
        for found, wanted in zip(summed.replay(), expected, strict=True):
            assert torch.equal(found, wanted)
        for handle, one in zip(handles, ones, strict=True):
            assert handle.wait() is one
            assert one.tolist() == [2] * 5

    run_ranks(2, rank, backend="shm")
