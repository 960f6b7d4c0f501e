"""Every operation between real processes, on every element. Functions named `rank_*` run on each rank of the pool."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator, create_communicator

SIZES = [1, 2, 3, 4]
DTYPES = ["float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8"]
SHAPES = [[1], [1, 576], [7, 5, 3], [4099], []]


def value(rank: int, index: int) -> int:
    """Element `index` of the tensor of `rank`: small enough that sums over 4 ranks are exact in every dtype."""
    return (index * (rank + 2) + 3 * rank) % 23


def filled(rank: int, shape: list[int], dtype: str) -> torch.Tensor:
    data = [value(rank, index) for index in range(math.prod(shape))]
    return torch.tensor(data, dtype=getattr(torch, dtype)).reshape(shape)


def listed(tensor: torch.Tensor) -> Any:
    return cast(Any, tensor.double().tolist())


def rank_all_reduce(comm: Communicator, store: Store, shape: list[int], dtype: str, op: str) -> object:
    x = filled(comm.rank, shape, dtype)
    result = comm.all_reduce(x, op=cast(Any, op))
    assert result is x
    assert x.dtype == getattr(torch, dtype)
    return [listed(x.reshape(-1)), listed(comm.all_reduce(x, op="max").reshape(-1))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["sum", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_combines_every_element_on_every_rank(any_pool: Any, size: int, dtype: str, op: str) -> None:
    combine = sum if op == "sum" else max
    for shape in SHAPES if dtype == "float32" else [[5, 131]]:
        expected = [combine(value(rank, index) for rank in range(size)) for index in range(math.prod(shape))]
        for answer in any_pool.run(rank_all_reduce, size, shape=shape, dtype=dtype, op=op):
            assert answer == [expected, expected]


def rank_sum_of_narrow(comm: Communicator, store: Store, values: list[float], dtype: str) -> object:
    return listed(comm.all_reduce(torch.tensor([values[comm.rank]], dtype=getattr(torch, dtype))))


@pytest.mark.parametrize(
    ("dtype", "values", "nearest"),
    [("bfloat16", [256.0, 1.0, 1.0, 1.5], 260.0), ("float16", [2048.0, 1.0, 1.0, 1.5], 2052.0)],
)
def test_a_sum_of_narrow_floats_is_rounded_once(
    flat_pool: Any, dtype: str, values: list[float], nearest: float
) -> None:
    # One addition after another would lose each 1.0: next to 256 (2048 in float16) the numbers are 2 apart.
    assert flat_pool.run(rank_sum_of_narrow, 4, values=values, dtype=dtype) == [[nearest]] * 4


def rank_all_gather(comm: Communicator, store: Store, rows: list[int], columns: int, dtype: str, sized: bool) -> object:
    x = filled(comm.rank, [rows[comm.rank], columns], dtype)
    result = comm.all_gather(x, sizes=rows) if sized else comm.all_gather(x)
    assert result.dtype == x.dtype
    return listed(result)


def gathered(rows: list[int], columns: int) -> list[list[int]]:
    return [
        [value(rank, row * columns + column) for column in range(columns)]
        for rank, count in enumerate(rows)
        for row in range(count)
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gather_joins_the_rows_in_rank_order(any_pool: Any, size: int, dtype: str) -> None:
    rows = [3] * size
    for sized in (False, True):
        answers = any_pool.run(rank_all_gather, size, rows=rows, columns=7, dtype=dtype, sized=sized)
        assert answers == [gathered(rows, 7)] * size


@pytest.mark.parametrize("rows", [[5], [1, 4], [4, 1], [3, 0, 2], [0, 0, 6], [2, 3, 1, 5], [0, 1, 0, 0]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_all_gather_takes_unlike_numbers_of_rows(any_pool: Any, rows: list[int], dtype: str) -> None:
    answers = any_pool.run(rank_all_gather, len(rows), rows=rows, columns=5, dtype=dtype, sized=True)
    assert answers == [gathered(rows, 5)] * len(rows)


def rank_reduce_scatter(comm: Communicator, store: Store, rows: list[int], dtype: str, sized: bool) -> object:
    x = filled(comm.rank, [sum(rows), 3], dtype)
    before = x.clone()
    result = comm.reduce_scatter(x, sizes=rows) if sized else comm.reduce_scatter(x)
    assert torch.equal(x, before)
    return listed(result)


@pytest.mark.parametrize("rows", [[4], [2, 2], [5, 1], [2, 2, 2], [3, 0, 4], [3, 3, 3, 3], [1, 5, 2, 4]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int64"])
def test_reduce_scatter_hands_each_rank_its_rows_of_the_sum(any_pool: Any, rows: list[int], dtype: str) -> None:
    size = len(rows)
    total = [
        [sum(value(rank, row * 3 + column) for rank in range(size)) for column in range(3)] for row in range(sum(rows))
    ]
    expected = [total[sum(rows[:rank]) : sum(rows[: rank + 1])] for rank in range(size)]
    for sized in (True, False) if len(set(rows)) == 1 else (True,):
        assert any_pool.run(rank_reduce_scatter, size, rows=rows, dtype=dtype, sized=sized) == expected


def rank_broadcast(comm: Communicator, store: Store, dtype: str) -> object:
    results = []
    for root in range(comm.size):
        x = filled(comm.rank, [3, 50], dtype)
        assert comm.broadcast(x, root) is x
        results.append(listed(x.reshape(-1)))
    return results


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_copies_the_tensor_of_any_root(any_pool: Any, size: int, dtype: str) -> None:
    expected = [[value(root, index) for index in range(150)] for root in range(size)]
    assert any_pool.run(rank_broadcast, size, dtype=dtype) == [expected] * size


def rank_exchange(comm: Communicator, store: Store, dtype: str) -> object:
    """Each rank sends to every other at once, two tensors of unlike shape each."""
    shapes = [[2, 9], [31]]
    peers = [rank for rank in range(comm.size) if rank != comm.rank]
    sends = [comm.send(filled(comm.rank * 4 + to, shape, dtype), to, async_op=True) for shape in shapes for to in peers]
    received = [
        [listed(comm.recv(torch.empty(shape, dtype=getattr(torch, dtype)), source).reshape(-1)) for shape in shapes]
        for source in peers
    ]
    for handle in sends:
        handle.wait()
    return received


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_send_and_recv_match_in_order_between_every_pair(any_pool: Any, size: int, dtype: str) -> None:
    for rank, answer in enumerate(any_pool.run(rank_exchange, size, dtype=dtype)):
        sources = [source for source in range(size) if source != rank]
        assert answer == [
            [[value(source * 4 + rank, index) for index in range(count)] for count in (18, 31)] for source in sources
        ]


def rank_empty(comm: Communicator, store: Store) -> object:
    nothing = torch.empty(0, 4)
    comm.all_reduce(nothing)
    comm.broadcast(nothing, 0)
    shapes = [comm.all_gather(nothing).shape, comm.reduce_scatter(nothing).shape]
    return [list(shape) for shape in shapes]


def test_tensors_without_elements_pass_through_every_operation(any_pool: Any) -> None:
    assert any_pool.run(rank_empty, 3) == [[[0, 4], [0, 4]]] * 3


def rank_barrier(comm: Communicator, store: Store, key: str) -> int:
    store.add(key, 1)
    comm.barrier()
    return store.add(key, 0)


@pytest.mark.parametrize("size", SIZES)
def test_no_rank_passes_a_barrier_before_all_have_reached_it(any_pool: Any, size: int) -> None:
    assert any_pool.run(rank_barrier, size, key=f"barrier-{any_pool.backend}-{size}") == [size] * size


def rank_handles_out_of_order(comm: Communicator, store: Store) -> object:
    reduced = comm.all_reduce(filled(comm.rank, [100], "float32"), async_op=True)
    gathered_rows = comm.all_gather(filled(comm.rank, [comm.rank + 1, 2], "int64"), sizes=[1, 2, 3], async_op=True)
    scattered = comm.reduce_scatter(filled(comm.rank, [6, 2], "bfloat16"), sizes=[3, 2, 1], async_op=True)
    spread = comm.broadcast(filled(comm.rank, [10], "float32"), 1, async_op=True)
    met = comm.barrier(async_op=True)
    handles = [spread, scattered, gathered_rows, reduced]
    met.wait()
    return [listed(handle.wait().reshape(-1)) for handle in handles], [
        listed(handle.wait().reshape(-1)) for handle in handles
    ]


def test_handles_are_waited_for_in_any_order_and_more_than_once(any_pool: Any) -> None:
    total = [sum(value(rank, index) for rank in range(3)) for index in range(100)]
    for rank, (first, second) in enumerate(any_pool.run(rank_handles_out_of_order, 3)):
        spread, scattered, gathered_rows, reduced = first
        assert spread == [value(1, index) for index in range(10)]
        assert scattered == total[:12][[0, 6, 10][rank] : [6, 10, 12][rank]]
        assert gathered_rows == [element for row in gathered([1, 2, 3], 2) for element in row]
        assert reduced == total
        assert second == first


def rank_two_groups(comm: Communicator, store: Store, name: str) -> object:
    """Rows {0, 1} and {2, 3}, columns {0, 2} and {1, 3} of a square of ranks; operations of both under way at once."""
    row, column = divmod(comm.rank, 2)
    settings: dict[str, Any] = {"size": 2, "rendezvous": store, "timeout_s": 20}
    with (
        create_communicator(comm.backend, rank=column, group=f"{name}-row-{row}", **settings) as across,
        create_communicator(comm.backend, rank=row, group=f"{name}-column-{column}", **settings) as down,
    ):
        own = torch.tensor([float(10**comm.rank)])
        handles = [group.all_reduce(own.clone(), async_op=True) for _ in range(3) for group in (across, down)]
        whole = comm.all_reduce(own.clone())
        return [listed(handle.wait())[0] for handle in reversed(handles)], listed(whole)[0]


def test_groups_in_one_process_do_not_disturb_each_other(any_pool: Any) -> None:
    rows, columns = [11.0, 1100.0], [101.0, 1010.0]
    answers = any_pool.run(rank_two_groups, 4, name=f"square-{any_pool.backend}")
    assert answers == [[[columns[rank % 2], rows[rank // 2]] * 3, 1111.0] for rank in range(4)]


def rank_alone(comm: Communicator, store: Store) -> object:
    return comm.backend, listed(comm.all_gather(comm.all_reduce(torch.tensor([3.0]))))


def test_a_backend_serves_a_group_of_one_when_asked(any_pool: Any) -> None:
    assert any_pool.run(rank_alone, 1) == [[any_pool.backend, [3.0]]]


def rank_ledger(comm: Communicator, store: Store) -> object:
    comm.ledger.begin_step(7)
    comm.barrier()
    for _ in range(3):
        comm.all_reduce(torch.ones(4, 8))
    comm.all_gather(torch.ones(2, 8, dtype=torch.bfloat16), async_op=True).wait()
    if comm.rank == 0:
        comm.send(torch.ones(5), 1)
    else:
        comm.recv(torch.ones(5), 0)
    entries = comm.ledger.entries(7)
    assert all(entry.group == comm.group for entry in entries)
    assert all(0 <= entry.waited_us <= entry.total_us for entry in entries)
    totals = {op: [total.num_ops, total.num_bytes] for op, total in comm.ledger.summary(7).items()}
    return [[entry.seq for entry in entries], totals]


def test_the_ledger_counts_every_operation_and_its_bytes(any_pool: Any) -> None:
    shared = {"barrier": [1, 0], "all_reduce": [3, 3 * 128], "all_gather": [1, 64]}
    assert any_pool.run(rank_ledger, 2, fresh=True) == [
        [[1, 2, 3, 4, 5, 1], {**shared, "send": [1, 20]}],
        [[1, 2, 3, 4, 5, 1], {**shared, "recv": [1, 20]}],
    ]
