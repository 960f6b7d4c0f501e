"""The NCCL backend's own logic over a GPU and an NCCL made of threads. `tests/gpu/` holds it against real ones."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from tests.comm.fake_gpu import FakeGpu, FakeNccl
from torch._C._distributed_c10d import HashStore

from phalanx.comm import GroupBrokenError, GroupSpec, Handle, Ledger, WaitTimeoutError, captured
from phalanx.comm.nccl import NcclCommunicator
from phalanx.comm.nccl_binding import DATA_TYPES
from phalanx.errors import CommError


class Held(NcclCommunicator):
    """Holds all memory to its end. On a GPU what is freed is given out again in the order of streams; here at once."""

    def __init__(self, *arguments: Any) -> None:
        self.memory: list[object] = []
        super().__init__(*arguments)

    def _launch(self, call: Any, async_op: bool, start: Any, *arguments: object) -> Any:
        self.memory.append(arguments)
        return super()._launch(call, async_op, start, *arguments)


class Rank:
    """One rank as its function gets it."""

    def __init__(self, rank: int, size: int, store: Any, world: dict[bytes, Any], timeout_s: float) -> None:
        self.gpu = FakeGpu()
        self.nccl = FakeNccl(world, self.gpu)
        self.ledger = Ledger()
        spec = GroupSpec(rank, size, "tp", "cpu", timeout_s, store, ledger=self.ledger)
        self.comm = Held(spec, self.nccl, self.gpu)
        self.rank = rank

    def listed(self, x: torch.Tensor) -> list[float]:
        """What the compute stream holds in `x` when it gets there."""
        self.gpu.synchronize()
        self.comm.check()
        return cast(list[float], x.double().flatten().tolist())


def run(size: int, function: Callable[[Rank], object], timeout_s: float = 20.0) -> list[Any]:
    """What each rank returned; the first error where one raised."""
    store, world = HashStore(), dict[bytes, Any]()

    def one(number: int) -> object:
        rank = Rank(number, size, store, world, timeout_s)
        try:
            return function(rank)
        finally:
            rank.comm.close()

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]


@pytest.mark.parametrize("dtype", DATA_TYPES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_operation_gives_its_result_in_every_dtype(size: int, dtype: torch.dtype) -> None:
    rows = [2, 0, 3][:size]
    whole = torch.arange(sum(rows) * 4, dtype=dtype).reshape(-1, 4)
    starts = [sum(rows[:rank]) for rank in range(size)]

    def use(rank: Rank) -> None:
        comm, number = rank.comm, rank.rank
        mine = whole[starts[number] : starts[number] + rows[number]].clone()
        first, second, third = whole + number, whole + number, whole.clone()
        two, ones = torch.full((2,), number, dtype=dtype), torch.ones(size * 2, dtype=dtype)
        total = comm.all_reduce(first)
        top = comm.all_reduce(second, op="max", async_op=True).wait()
        equal = comm.all_gather(two)
        unequal = comm.all_gather(mine, sizes=rows)
        part = comm.reduce_scatter(third, sizes=rows)
        even = comm.reduce_scatter(ones, async_op=True).wait()
        rooted = comm.broadcast(torch.full((3,), number, dtype=dtype), size - 1)
        comm.barrier()
        added = size * (size - 1) // 2
        assert rank.listed(total) == (whole.double() * size + added).flatten().tolist()
        assert rank.listed(top) == (whole.double() + size - 1).flatten().tolist()
        assert rank.listed(equal) == [each for each in range(size) for _ in range(2)]
        assert rank.listed(unequal) == whole.double().flatten().tolist()
        assert rank.listed(part) == (mine.double() * size).flatten().tolist()
        assert rank.listed(even) == [size] * 2
        assert rank.listed(rooted) == [size - 1] * 3

    run(size, use)


def test_fp8_moves_as_the_bytes_that_it_is_and_is_not_added_up() -> None:
    def use(rank: Rank) -> Any:
        x = torch.full((4,), 0.5 * (rank.rank + 1)).to(torch.float8_e4m3fn)
        with pytest.raises(CommError, match=r"dtype torch.float8_e4m3fn cannot be sent; use one of bfloat16"):
            rank.comm.all_reduce(x)
        gathered = rank.comm.all_gather(x)
        assert gathered.dtype == torch.float8_e4m3fn
        rank.gpu.synchronize()
        return gathered.float().tolist()

    assert run(2, use) == [[0.5] * 4 + [1.0] * 4] * 2


def test_a_transfer_runs_behind_what_makes_its_tensor_and_before_what_reads_its_result() -> None:
    def use(rank: Rank) -> tuple[list[float], list[float]]:
        x, seen = torch.zeros(1000), torch.zeros(1000)
        for async_op in (False, True):
            x.zero_()
            rank.gpu.run(lambda: x.fill_(rank.rank + 1), takes_s=0.05)
            handle = rank.comm.all_reduce(x, async_op=True) if async_op else rank.comm.all_reduce(x)
            assert not x.any(), "the call must not wait for the GPU"
            if isinstance(handle, Handle):
                handle.wait()
            rank.gpu.run(lambda: seen.copy_(x))
            assert rank.listed(seen) == [3.0] * 1000
        return rank.listed(x), rank.listed(seen)

    run(2, use)


def test_what_blocks_is_enqueued_on_the_callers_stream_and_what_is_asynchronous_beside_it() -> None:
    def use(rank: Rank) -> None:
        rank.comm.all_reduce(torch.ones(4))
        rank.comm.all_reduce(torch.ones(4), async_op=True).wait()
        (_, first), (_, second) = rank.nccl.comms[0].used
        assert first == rank.gpu.compute.cuda_stream
        assert second != first

    run(2, use)


def test_operations_on_several_streams_run_in_the_order_of_the_calls() -> None:
    def use(rank: Rank) -> list[float]:
        slow, other = torch.ones(4), rank.gpu.new_stream()
        rank.gpu.run(lambda: None, takes_s=0.05 * (rank.rank + 1))
        handle = rank.comm.all_reduce(slow, async_op=True)
        with rank.gpu.on(other):  # nothing but the communicator orders this behind the first
            fast = rank.comm.all_reduce(torch.full((4,), 5.0))
        handle.wait()
        return [*rank.listed(slow), *rank.listed(fast)]

    assert run(2, use) == [[2.0] * 4 + [10.0] * 4] * 2


def test_a_receive_posted_ahead_holds_up_neither_sends_nor_collectives() -> None:
    def use(rank: Rank) -> list[float]:
        other, into = 1 - rank.rank, torch.zeros(3)
        posted = rank.comm.recv(into, other, async_op=True)
        rank.listed(rank.comm.all_reduce(torch.ones(3)))
        value = torch.full((3,), 7.0 + rank.rank)
        sent = rank.comm.send(value, other, async_op=True)
        posted.wait()
        sent.wait()
        return rank.listed(into)

    assert run(2, use) == [[8.0] * 3, [7.0] * 3]


def test_a_ring_may_send_before_it_receives_from_its_first_transfer_on() -> None:
    def use(rank: Rank) -> list[float]:
        into = torch.zeros(3)
        found = []
        for turn in range(3):
            value = torch.full((3,), 10.0 * turn + rank.rank)
            sent = rank.comm.send(value, (rank.rank + 1) % 3, async_op=True)
            rank.comm.recv(into, (rank.rank + 2) % 3)
            sent.wait()
            found.append(rank.listed(into)[0])
        return found

    assert run(3, use) == [[2, 12, 22], [0, 10, 20], [1, 11, 21]]


def test_transfers_started_before_the_two_ranks_are_connected_match_in_order() -> None:
    def use(rank: Rank) -> list[float]:
        values = [torch.full((2,), float(index)) for index in range(5)]
        if rank.rank == 0:
            for handle in [rank.comm.send(value, 1, async_op=True) for value in values]:
                handle.wait()
            rank.gpu.synchronize()
            return []
        into = [torch.zeros(2) for _ in values]
        for handle in [rank.comm.recv(each, 0, async_op=True) for each in into]:
            handle.wait()
        return [rank.listed(each)[0] for each in into]

    assert run(2, use)[1] == [0, 1, 2, 3, 4]


def broken(rank: Rank) -> CommError:
    """What the rank is told, once its GPU has gone on: as after copying a result to the host."""
    rank.gpu.synchronize()
    with pytest.raises(CommError) as told:
        rank.comm.check()
    return told.value


def test_a_rank_that_never_comes_ends_the_group_with_the_rank_named() -> None:
    def use(rank: Rank) -> str:
        rank.listed(rank.comm.all_reduce(torch.ones(4)))
        if rank.rank == 1:
            return ""
        x = rank.comm.all_reduce(torch.ones(4))  # returns: only the GPU waits
        error = broken(rank)
        assert isinstance(error, WaitTimeoutError)
        assert error.missing_ranks == (1,)
        assert rank.nccl.comms[0].aborted
        with pytest.raises(GroupBrokenError, match="all_reduce in group 'tp' cannot run: all_reduce #2"):
            rank.comm.all_reduce(x)
        return str(error)

    told = run(2, use, timeout_s=0.5)[0]
    assert told.startswith(
        "all_reduce #2 of group 'tp' (16 bytes) on rank 0 waited longer than 0.5 s; not arrived: rank 1"
    )


def test_the_others_are_told_when_one_gives_up() -> None:
    def use(rank: Rank) -> CommError | None:
        x = torch.ones(4)
        rank.comm.barrier()
        if rank.rank == 2:
            return None
        if rank.rank == 1:
            rank.comm.all_reduce(x, async_op=True)  # waits for nothing, so that no limit of its own strikes
        else:
            rank.comm.all_reduce(x)
        return broken(rank)

    first, second, _ = run(3, use, timeout_s=0.4)
    assert isinstance(first, WaitTimeoutError)
    assert isinstance(second, GroupBrokenError)
    assert "rank 0 has given the group up: all_reduce #2" in str(second)


def test_the_limit_counts_only_while_the_gpu_waits() -> None:
    def use(rank: Rank) -> list[float]:
        into = torch.zeros(2)
        connect = rank.comm.recv if rank.rank == 0 else rank.comm.send
        connect(into, 1 - rank.rank)
        if rank.rank == 0:
            posted = rank.comm.recv(into, 1, async_op=True)
            rank.gpu.run(lambda: None, takes_s=0.9)  # compute takes longer than the limit, and so does the sender
            posted.wait()
        else:
            time.sleep(0.7)
            into = rank.comm.send(torch.ones(2), 0)
        return rank.listed(into)

    assert run(2, use, timeout_s=0.4)[0] == [1.0, 1.0]


def test_a_barrier_blocks_the_thread_and_names_who_is_missing() -> None:
    def use(rank: Rank) -> str:
        if rank.rank == 1:
            return ""
        with pytest.raises(WaitTimeoutError, match=r"barrier #1 .* not arrived: rank 1") as told:
            rank.comm.barrier()
        return str(told.value)

    assert run(2, use, timeout_s=0.4)[0]


def test_an_error_behind_the_calls_ends_the_group_with_nccls_own_words() -> None:
    def use(rank: Rank) -> None:
        rank.comm.barrier()
        if rank.rank == 1:
            return
        rank.nccl.comms[0].ill = "NCCL_ERROR_REMOTE_ERROR: a peer has gone"
        rank.comm.all_reduce(torch.ones(4))
        assert "all_reduce #2 of group 'tp' (16 bytes) failed on rank 0: NCCL_ERROR_REMOTE" in str(broken(rank))

    run(2, use, timeout_s=4.0)


def test_abort_returns_within_a_second_even_where_nccl_does_not() -> None:
    def use(rank: Rank) -> float:
        rank.nccl.comms[0].hangs.set()
        rank.comm.all_reduce(torch.ones(4), async_op=True)
        began_s = time.monotonic()
        rank.comm.abort()
        return time.monotonic() - began_s

    assert max(run(1, use)) < 1.0


def test_the_ledger_has_the_gpus_times_and_not_the_threads() -> None:
    def use(rank: Rank) -> None:
        rank.ledger.begin_step(7)
        rank.ledger.layer = 3
        x = torch.ones(4)
        handle = rank.comm.all_reduce(x, async_op=True)
        rank.gpu.run(lambda: None, takes_s=0.1)
        handle.wait()
        rank.ledger.layer = -1
        if rank.rank == 1:
            rank.gpu.run(lambda: None, takes_s=0.2)  # keeps the other waiting
        rank.comm.all_reduce(x)
        assert rank.ledger.take().totals == (), "nothing may be told of what the GPU has not done"
        rank.listed(x)
        hidden, exposed = rank.ledger.entries()
        assert (hidden.step, hidden.layer, hidden.seq, hidden.op) == (7, 3, 1, "all_reduce")
        assert hidden.total_us > 90_000
        assert hidden.waited_us < 0.3 * hidden.total_us
        assert exposed.layer == -1
        assert exposed.waited_us == exposed.total_us
        assert exposed.started_us >= hidden.started_us + hidden.total_us - 1
        if rank.rank == 0:
            assert exposed.waited_us > 150_000

    run(2, use)


def test_what_is_captured_is_neither_timed_nor_watched() -> None:
    def use(rank: Rank) -> None:
        rank.gpu.capturing = True
        x = rank.comm.all_reduce(torch.ones(4))
        rank.comm.all_reduce(x, async_op=True).wait()
        with pytest.raises(CommError, match="first transfer cannot be captured into a CUDA graph"):
            rank.comm.send(x, 1 - rank.rank)
        with pytest.raises(CommError, match="it blocks the thread and cannot be captured"):
            rank.comm.barrier()
        rank.gpu.capturing = False
        rank.listed(x)
        assert rank.ledger.entries() == []

    run(2, use)


def test_memory_is_lent_to_the_transfer_where_another_stream_waits_for_it() -> None:
    def use(rank: Rank) -> None:
        x = torch.ones(4)
        rank.comm.all_reduce(x, async_op=True).wait()
        assert rank.gpu.lent == []
        handle = rank.comm.all_reduce(x, async_op=True)
        with rank.gpu.on(rank.gpu.new_stream()):
            handle.wait()
        assert [(tensor is x, stream) for tensor, stream in rank.gpu.lent] == [(True, rank.nccl.comms[0].used[-1][1])]

    run(2, use)


def test_memory_is_kept_until_the_callers_stream_waits() -> None:
    def use(rank: Rank) -> None:
        x = torch.ones(4)
        kept = weakref.ref(x)
        handle = rank.comm.reduce_scatter(x, async_op=True)
        rank.comm.memory.clear()
        del x
        rank.gpu.synchronize()  # the memory of a CPU must not go before that
        assert kept() is not None
        handle.wait()
        assert kept() is None

    run(1, use)


def test_a_split_group_numbers_its_ranks_anew_and_leaves_out_who_has_no_color() -> None:
    def use(rank: Rank) -> object:
        part = rank.comm.split([1, -1, 0, 1], "halves")
        if part is None:
            return None
        with part:
            found = rank.listed(part.all_reduce(torch.tensor([10.0**rank.rank])))
            other = (part.rank + 1) % part.size
            into = torch.zeros(1)
            if part.size > 1:
                value = torch.tensor([float(rank.rank)])
                sent = part.send(value, other, async_op=True)
                part.recv(into, other)
                sent.wait()
            return part.rank, part.size, *found, *rank.listed(into)

    assert run(4, use) == [(0, 2, 1001.0, 3.0), None, (0, 1, 100.0, 0.0), (1, 2, 1001.0, 0.0)]


def test_profilers_see_the_names_of_the_ledger() -> None:
    def use(rank: Rank) -> list[str]:
        rank.ledger.layer = 5
        rank.comm.all_reduce(torch.ones(4))
        return rank.gpu.names

    assert run(1, use) == [["all_reduce #1 tp layer 5"]]


def captured_step(rank: Rank, x: torch.Tensor, compute_s: float = 0.0) -> Callable[[], None]:
    """Two sums and what comes between them, as a step of two layers."""

    def step() -> None:
        rank.ledger.layer = 4
        rank.comm.all_reduce(x)
        rank.gpu.run(lambda: None, takes_s=compute_s)
        rank.ledger.layer = 5
        rank.comm.all_gather(x, async_op=True).wait()
        rank.ledger.layer = -1

    return step


def test_every_replay_of_a_captured_step_is_in_the_ledger_as_if_it_had_been_called() -> None:
    def use(rank: Rank) -> list[tuple[Any, ...]]:
        x = torch.ones(4)
        rank.comm.all_reduce(x)
        graph = rank.comm.captured(rank.gpu, captured_step(rank, x))
        for step in (7, 8):
            rank.ledger.begin_step(step)
            graph.replay()
        rank.comm.all_reduce(x)
        assert rank.listed(x) == [16.0] * 4
        return [(each.seq, each.step, each.layer, each.op, each.num_bytes) for each in rank.ledger.entries()]

    expected = [
        (1, -1, -1, "all_reduce", 16),
        *((2, 7, 4, "all_reduce", 16), (3, 7, 5, "all_gather", 32)),
        *((4, 8, 4, "all_reduce", 16), (5, 8, 5, "all_gather", 32)),
        (6, 8, -1, "all_reduce", 16),
    ]
    assert run(2, use) == [expected] * 2


def test_a_replay_is_timed_by_marks_within_it_and_those_that_follow_within_a_second_as_it_was() -> None:
    def use(rank: Rank) -> None:
        graph = rank.comm.captured(rank.gpu, captured_step(rank, torch.ones(4), compute_s=0.05))
        plain, timed = rank.gpu.graphs
        for _ in range(3):
            graph.replay()
        rank.gpu.synchronize()
        first, second, *others = rank.ledger.entries()
        assert (timed.num_replays, plain.num_replays) == (1, 2)
        between_us = second.started_us - first.started_us - first.total_us
        assert between_us > 49_000, "what is computed between them counts in neither"
        assert [each.total_us for each in others] == pytest.approx([first.total_us, second.total_us] * 2)
        assert others[2].started_us - others[0].started_us > 50_000

    run(2, use)


def test_a_timed_replay_is_not_repeated_before_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "TIMED_EVERY_S", 0.0)

    def use(rank: Rank) -> list[int]:
        graph = rank.comm.captured(rank.gpu, captured_step(rank, torch.ones(4)))
        _, timed = rank.gpu.graphs
        found = []
        for read in (False, False, True, False):
            graph.replay()
            rank.gpu.synchronize()
            if read:
                rank.ledger.take()
            found.append(timed.num_replays)
        return found

    assert run(2, use) == [[1, 1, 1, 2]] * 2


def test_a_replay_that_a_rank_never_comes_to_ends_the_group_with_the_rank_named() -> None:
    def use(rank: Rank) -> str:
        x = torch.ones(4)
        graph = rank.comm.captured(rank.gpu, captured_step(rank, x))
        graph.replay()
        rank.listed(x)
        if rank.rank == 1:
            return ""
        graph.replay()  # returns: only the GPU waits
        error = broken(rank)
        assert isinstance(error, WaitTimeoutError)
        assert error.missing_ranks == (1,)
        assert rank.nccl.comms[0].aborted
        with pytest.raises(GroupBrokenError, match=r"replay in group 'tp' cannot run: 2 captured transfers from all_"):
            graph.replay()
        return str(error)

    told = run(2, use, timeout_s=0.5)[0]
    assert told.startswith(
        "2 captured transfers from all_reduce #3 of group 'tp' (48 bytes) on rank 0 waited longer than 0.5 s; "
        "not arrived: rank 1"
    )


def test_sends_are_not_captured_in_what_is_watched() -> None:
    def use(rank: Rank) -> None:
        x = torch.ones(4)
        move = rank.comm.send if rank.rank == 0 else rank.comm.recv
        rank.listed(move(x, 1 - rank.rank))
        with pytest.raises(CommError, match="sends and receives cannot be replayed"):
            rank.comm.captured(rank.gpu, lambda: cast(None, move(x, 1 - rank.rank)))

    run(2, use)
