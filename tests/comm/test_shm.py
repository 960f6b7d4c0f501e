"""What is the shared-memory backend's own: slots and their borders, the helper thread, the memory's end.

The operations and failures that all backends have in common are in `test_operations.py` and `test_failures.py`.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.comm.rank_pool import RankPool
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator, create, create_communicator, machine, shm_segment
from phalanx.comm.shm import ShmCommunicator
from phalanx.comm.shm_segment import NUM_RING, RING_BYTES, ROUND_BYTES, SMALL_BYTES
from phalanx.comm.shm_wait import Watch
from phalanx.errors import CommError
from phalanx.native import find_native

MORE_THAN_CORES = min(8, (os.cpu_count() or 1) + 3)
AROUND_BORDERS = [
    SMALL_BYTES - 4,
    SMALL_BYTES,
    SMALL_BYTES + 4,
    ROUND_BYTES - 4,
    ROUND_BYTES,
    ROUND_BYTES + 4,
    2 * ROUND_BYTES + 12,
]


def filled(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Small numbers, so that sums over 8 ranks are exact in every dtype."""
    return ((torch.arange(count) * (rank + 2) + 3 * rank) % 13).to(dtype)


def total(size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([filled(rank, count, torch.int64) for rank in range(size)]).sum(0).to(dtype)


def wait_for(store: Store, key: str) -> None:
    while not store.check([key]):
        time.sleep(0.01)


def rank_all_reduce_borders(comm: Communicator, store: Store, num_bytes: list[int]) -> object:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8):
        for count in (size // dtype.itemsize for size in num_bytes):
            x = filled(comm.rank, count, dtype)
            comm.all_reduce(x)
            assert torch.equal(x, total(comm.size, count, dtype)), (dtype, count)
            x = filled(comm.rank, count, dtype)
            comm.all_reduce(x, op="max")
            highest = torch.stack([filled(rank, count, dtype) for rank in range(comm.size)]).amax(0)
            assert torch.equal(x, highest), (dtype, count)
    return True


@pytest.mark.parametrize("size", [1, 2, 3, 4, MORE_THAN_CORES])
def test_all_reduce_is_right_on_both_sides_of_every_border(shm_pool: Any, size: int) -> None:
    assert all(shm_pool.run(rank_all_reduce_borders, size, num_bytes=AROUND_BORDERS))


def rank_random_sum(comm: Communicator, store: Store, count: int, dtype: str) -> str:
    parts = [
        torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(getattr(torch, dtype))
        for rank in range(comm.size)
    ]
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part.float()
    x = parts[comm.rank].clone()
    comm.all_reduce(x)
    assert torch.equal(x, expected.to(x.dtype))
    return hashlib.sha256(bytes(x.view(torch.uint8).tolist())).hexdigest()


@pytest.mark.parametrize("count", [577, 40_001])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_rank_gets_the_same_bits_of_a_sum_in_rank_order(shm_pool: Any, dtype: str, count: int) -> None:
    for size in (2, 3, 4):
        assert len(set(shm_pool.run(rank_random_sum, size, count=count, dtype=dtype))) == 1


def rank_ragged(comm: Communicator, store: Store, rows: list[int], columns: int, dtype: str) -> object:
    kind = getattr(torch, dtype)
    x = filled(comm.rank, rows[comm.rank] * columns, kind).view(-1, columns)
    whole = torch.cat([filled(rank, rows[rank] * columns, kind).view(-1, columns) for rank in range(comm.size)])
    assert torch.equal(comm.all_gather(x, sizes=rows), whole)
    count = sum(rows) * columns
    mine = slice(sum(rows[: comm.rank]), sum(rows[: comm.rank + 1]))
    scattered = comm.reduce_scatter(filled(comm.rank, count, kind).view(-1, columns), sizes=rows)
    assert torch.equal(scattered, total(comm.size, count, kind).view(-1, columns)[mine])
    return True


@pytest.mark.parametrize("rows", [[3, 300], [300, 0, 7], [171, 171, 170], [90, 1, 0, 513], [64, 64, 64, 64]])
@pytest.mark.parametrize(("dtype", "columns"), [("float32", 1023), ("bfloat16", 1024), ("int64", 511)])
def test_unlike_parts_of_many_slots_are_gathered_and_scattered(
    shm_pool: Any, rows: list[int], columns: int, dtype: str
) -> None:
    assert all(shm_pool.run(rank_ragged, len(rows), rows=rows, columns=columns, dtype=dtype))


def rank_broadcasts(comm: Communicator, store: Store, counts: list[int]) -> object:
    """One after another with nothing between, so that the root runs ahead of the others as far as it may."""
    for number in range(40):
        count = counts[number % len(counts)]
        x = filled(comm.rank + number, count, torch.int64)
        comm.broadcast(x, 1)
        assert torch.equal(x, filled(1 + number, count, torch.int64)), number
    return True


@pytest.mark.parametrize("counts", [[100], [SMALL_BYTES // 8 + 1], [3, ROUND_BYTES // 4 + 5, 70_000, 1]])
def test_a_root_that_runs_ahead_overwrites_nothing(shm_pool: Any, counts: list[int]) -> None:
    assert all(shm_pool.run(rank_broadcasts, 3, counts=counts))


def rank_mixed(comm: Communicator, store: Store, seed: int) -> object:
    """The same random calls on every rank, some blocking, some waited for later and in another order."""
    draw, own = random.Random(seed), random.Random(seed * 100 + comm.rank)
    held: list[Callable[[], object]] = []
    for number in range(120):
        op = draw.choice(["all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "ring"])
        count = draw.choice([1, 576, 4097, 20_000, 300_001]) if draw.random() < 0.3 else draw.randint(1, 600)
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.int32])
        later = draw.random() < 0.6
        x = filled(comm.rank + number, count, dtype)
        peers = [filled(rank + number, count, dtype) for rank in range(comm.size)]
        if op == "all_reduce":
            expected = torch.stack(peers).double().sum(0).to(dtype)
            handle: Any = comm.all_reduce(x, async_op=True)
        elif op == "all_gather":
            expected = torch.cat(peers)
            handle = comm.all_gather(x, async_op=True)
        elif op == "reduce_scatter":
            rows = [count] + [0] * (comm.size - 1)
            expected = torch.stack(peers).double().sum(0).to(dtype)[: rows[comm.rank]]
            handle = comm.reduce_scatter(x, sizes=rows, async_op=True)
        elif op == "broadcast":
            expected = peers[number % comm.size]
            handle = comm.broadcast(x, number % comm.size, async_op=True)
        elif op == "ring":
            before = (comm.rank - 1) % comm.size
            expected = peers[before]
            sent = comm.send(x, (comm.rank + 1) % comm.size, async_op=True)
            held.append(sent.wait)
            handle = comm.recv(torch.empty(count, dtype=dtype), before, async_op=True)
        else:
            comm.barrier()
            continue

        def finish(handle: Any = handle, expected: torch.Tensor = expected, what: object = (number, op)) -> None:
            assert torch.equal(handle.wait(), expected), what

        held.append(finish)
        if not later:
            own.shuffle(held)
            while held:
                held.pop()()
    while held:
        held.pop()()
    comm.barrier()
    return True


@pytest.mark.parametrize(("size", "seed"), [(2, 1), (2, 2), (3, 3), (4, 4), (MORE_THAN_CORES, 5)])
def test_any_mixture_of_operations_gives_every_element(shm_pool: Any, size: int, seed: int) -> None:
    assert all(shm_pool.run(rank_mixed, size, seed=seed))


def rank_many_outstanding(comm: Communicator, store: Store) -> object:
    with torch.inference_mode():
        tensors = [filled(comm.rank + number, 100, torch.float32) for number in range(30)]
        handles = [comm.all_reduce(x, async_op=True) for x in tensors]
        for number in reversed(range(30)):
            expected = torch.stack([filled(rank + number, 100, torch.float32) for rank in range(comm.size)]).sum(0)
            assert torch.equal(handles[number].wait(), expected)
    return True


def test_more_operations_than_slots_may_be_outstanding_on_inference_tensors(shm_pool: Any) -> None:
    assert all(shm_pool.run(rank_many_outstanding, 3))


def rank_waits_elsewhere(comm: Communicator, store: Store, count: int, key: str) -> object:
    x = filled(comm.rank, count, torch.float32)
    if comm.rank == 0:
        handle = comm.all_reduce(x, async_op=True)
        wait_for(store, key)  # which rank 1 sets only when it is through
        handle.wait()
    else:
        comm.all_reduce(x)
        store.set(key, "done")
    return torch.equal(x, total(2, count, torch.float32))


@pytest.mark.parametrize("num_bytes", [1024, SMALL_BYTES + 4, 3 * ROUND_BYTES])
def test_an_asynchronous_operation_goes_on_while_its_rank_waits_elsewhere(shm_pool: Any, num_bytes: int) -> None:
    assert shm_pool.run(
        rank_waits_elsewhere, 2, count=num_bytes // 4, key=f"elsewhere-{num_bytes}-{shm_pool.backend}"
    ) == [True, True]


def rank_send_both_ways(comm: Communicator, store: Store, num_bytes: int) -> object:
    other = 1 - comm.rank
    sends = [comm.send(filled(comm.rank + number, num_bytes, torch.uint8), other, async_op=True) for number in range(3)]
    comm.all_reduce(torch.ones(4))  # the sends hold up nothing else
    for number in range(3):
        x = comm.recv(torch.empty(num_bytes, dtype=torch.uint8), other)
        assert torch.equal(x, filled(other + number, num_bytes, torch.uint8))
    for handle in sends:
        handle.wait()
    return True


@pytest.mark.parametrize("num_bytes", [RING_BYTES, RING_BYTES + 1, 3 * NUM_RING * RING_BYTES + 7])
def test_large_sends_both_ways_at_once_do_not_lock_up(shm_pool: Any, num_bytes: int) -> None:
    assert all(shm_pool.run(rank_send_both_ways, 2, num_bytes=num_bytes))


def rank_posts_receives(comm: Communicator, store: Store, num_bytes: int) -> object:
    if comm.rank == 0:
        received = [comm.recv(torch.empty(num_bytes, dtype=torch.uint8), 1, async_op=True) for _ in range(3)]
        comm.barrier()
        return all(torch.equal(received[number].wait(), filled(number, num_bytes, torch.uint8)) for number in (2, 0, 1))
    for number in range(3):
        comm.send(filled(number, num_bytes, torch.uint8), 0)  # blocking, and more than the ring holds
    comm.barrier()
    return True


@pytest.mark.parametrize("num_bytes", [RING_BYTES * NUM_RING // 2, 2 * NUM_RING * RING_BYTES])
def test_posted_receives_make_room_while_their_rank_waits_for_something_else(shm_pool: Any, num_bytes: int) -> None:
    assert all(shm_pool.run(rank_posts_receives, 2, num_bytes=num_bytes))


def rank_looks_at_the_other(comm: Communicator, store: Store) -> object:
    assert isinstance(comm, ShmCommunicator)
    never = Watch((comm._waiter._awaited[comm.rank],), (1 - comm.rank,))

    def look() -> None:
        for _ in range(2000):
            comm._waiter.check(never, 1)

    with ThreadPoolExecutor(3) as threads:
        for looked in [threads.submit(look) for _ in range(3)]:
            looked.result()
    comm.barrier()
    return True


def test_a_rank_and_its_helper_may_look_at_once_whether_another_has_ended(pool: RankPool) -> None:
    assert all(pool.run(rank_looks_at_the_other, 2, backend="shm-torch"))


def rank_unlike(comm: Communicator, store: Store, case: str) -> None:
    if case == "bytes":
        comm.all_reduce(torch.ones(4 + comm.rank))
    elif case == "dtype":
        comm.all_reduce(torch.ones(4, dtype=torch.float32 if comm.rank else torch.int32))
    elif case == "root":
        comm.broadcast(torch.ones(4), 1 - comm.rank)
    elif comm.rank == 0:
        comm.send(torch.ones(4), 1)
        comm.barrier()
    else:
        comm.recv(torch.ones(5), 0)


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("bytes", "called all_reduce of 16 bytes of float32, this rank all_reduce of 20 bytes of float32"),
        ("dtype", "called all_reduce of 16 bytes of int32, this rank all_reduce of 16 bytes of float32"),
        ("root", "broadcast of 16 bytes of float32 from rank"),
        ("recv", "rank 0 sent 16 bytes of float32, this rank expects 20 bytes of float32"),
    ],
)
def test_calls_that_do_not_match_are_refused_with_what_each_rank_called(shm_pool: Any, case: str, told: str) -> None:
    answers = shm_pool.outcomes(rank_unlike, 2, fresh=True, timeout_s=20.0, case=case)
    assert any(told in answer["error"]["message"] for answer in answers if "error" in answer), answers


def rank_leaves(comm: Communicator, store: Store) -> object:
    if comm.rank == 0:
        comm.send(torch.tensor([5.0]), 1)
        comm.close()
        return None
    time.sleep(0.2)
    assert comm.recv(torch.zeros(1), 0).item() == 5.0
    comm.recv(torch.zeros(1), 0)
    return None


def test_what_was_sent_before_a_rank_closed_arrives_and_more_is_refused(shm_pool: Any) -> None:
    _, answer = shm_pool.outcomes(rank_leaves, 2, fresh=True, timeout_s=300.0)
    assert answer["error"]["type"] == "PeerLostError"
    assert "rank 0 has closed its end" in answer["error"]["message"]
    assert "recv #2" in answer["error"]["message"]


def rank_killed_in_background(comm: Communicator, store: Store) -> object:
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    handle = comm.send(torch.ones(NUM_RING * RING_BYTES), 1, async_op=True)  # more than the ring holds
    handle.wait()
    return None


def test_a_killed_receiver_ends_a_send_that_the_helper_carries_on(shm_pool: Any) -> None:
    answers = shm_pool.outcomes(rank_killed_in_background, 2, fresh=True, timeout_s=300.0)
    assert answers[0]["error"]["type"] == "PeerLostError"
    assert "rank 1 has ended" in answers[0]["error"]["message"]


def segments() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:phalanx-gone" in line]


def rank_memory(comm: Communicator, store: Store, name: str) -> object:
    group = create_communicator("shm", rank=comm.rank, size=comm.size, rendezvous=store, group=name, timeout_s=20)
    with group:
        group.all_reduce(torch.ones(ROUND_BYTES))
        held = len(segments())
        named = [entry.name for entry in Path("/dev/shm").iterdir() if "phalanx" in entry.name]
    open_files = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]  # noqa: PTH115
    return held, named, len(segments()), [file for file in open_files if "memfd:phalanx-gone" in file]


def test_the_memory_has_no_name_and_ends_with_its_last_user(shm_pool: Any) -> None:
    # Nothing names it but the mappings themselves, so no way of ending a process can leave it behind.
    for answer in shm_pool.run(rank_memory, 3, name=f"gone-{shm_pool.backend}"):
        assert answer == [1, [], 0, []]


def rank_idle(comm: Communicator, store: Store) -> float:
    comm.barrier()
    if comm.rank == 1:
        time.sleep(1.5)
        comm.send(torch.ones(1), 0)
        return 0.0
    started, cpu = time.perf_counter(), time.process_time()
    comm.recv(torch.ones(1), 1)
    return (time.process_time() - cpu) / (time.perf_counter() - started)


def test_a_long_wait_leaves_its_core_to_others(shm_pool: Any) -> None:
    assert shm_pool.run(rank_idle, 2)[0] < 0.2


def rank_chosen(comm: Communicator, store: Store, wanted: str, hosts: list[str], name: str) -> object:
    real = machine.own_seat()
    create.own_seat = lambda obstacle="": real._replace(host=hosts[comm.rank], boot=hosts[comm.rank])  # type: ignore[attr-defined]
    try:
        with create_communicator(
            wanted, rank=comm.rank, size=comm.size, rendezvous=store, group=name, timeout_s=20
        ) as chosen:
            chosen.all_reduce(torch.ones(1))
            return chosen.backend, chosen.reason
    finally:
        create.own_seat = machine.own_seat  # type: ignore[attr-defined]


def test_ranks_of_one_machine_take_shared_memory(shm_pool: Any) -> None:
    answers = shm_pool.run(rank_chosen, 3, wanted="auto", hosts=["a", "a", "a"], name=f"one-machine-{shm_pool.backend}")
    for backend, reason in answers:
        assert backend == "shm"
        assert "memory that processes of one machine share" in reason


def test_ranks_of_several_machines_say_why_they_share_no_memory(shm_pool: Any) -> None:
    for hosts, told in (
        (["a", "b", "a"], "0, 2 on a; 1 on b"),
        (["a", "b", "c"], "0 on a; 1 on b; 2 on c"),
    ):
        name = f"{'-'.join(hosts)}-{shm_pool.backend}"
        for backend, reason in shm_pool.run(rank_chosen, 3, wanted="auto", hosts=hosts, name=name):
            assert backend == "hierarchical"
            assert f"not shm: ranks on several machines: {told}" in reason


def test_shared_memory_asked_for_on_several_machines_is_refused_on_every_rank(shm_pool: Any) -> None:
    for answer in shm_pool.outcomes(rank_chosen, 2, wanted="shm", hosts=["a", "b"], name=f"asked-{shm_pool.backend}"):
        assert answer["error"]["type"] == "CommError"
        assert (
            "'shm' cannot serve 2 ranks on 'cpu': ranks on several machines: 0 on a; 1 on b"
            in answer["error"]["message"]
        )


def rank_cannot_map(comm: Communicator, store: Store, name: str) -> str:
    class NoRoom(shm_segment.Segment):
        def __init__(self, file: int, size: int) -> None:
            if comm.rank == 1:
                raise OSError(12, "Cannot allocate memory")
            super().__init__(file, size)

    real, shm_segment.Segment = shm_segment.Segment, NoRoom  # type: ignore[misc]
    try:
        with pytest.raises(CommError) as caught:
            create_communicator("shm", rank=comm.rank, size=comm.size, rendezvous=store, group=name, timeout_s=20)
        return str(caught.value)
    finally:
        shm_segment.Segment = real  # type: ignore[misc]


def test_where_one_rank_cannot_map_the_memory_all_are_told(shm_pool: Any) -> None:
    for message in shm_pool.run(rank_cannot_map, 3, name=f"unmapped-{shm_pool.backend}"):
        assert "cannot share memory: rank 1: Cannot allocate memory. Use the backend gloo" in message


def rank_last_to_come(comm: Communicator, store: Store) -> list[int]:
    for late in range(comm.size):
        comm.barrier()
        if comm.rank == late:
            time.sleep(0.1)
        comm.all_reduce(torch.ones(4))
    return [entry.last for entry in comm.ledger.entries() if entry.op == "all_reduce"]


def test_the_ledger_knows_who_came_last(pool: Any) -> None:
    if find_native().library is None:
        pytest.skip("needs the native library, which sees it")
    assert pool.run(rank_last_to_come, 3, backend="shm", fresh=True) == [[0, 1, 2]] * 3
