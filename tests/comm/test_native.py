"""The native library: against torch, bit for bit, against numbers of twice the precision, and mixed with it.

What holds with and without it alike is in `test_operations.py`, `test_failures.py` and `test_shm.py`, which run both.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, cast

import pytest
import torch
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator, create_communicator
from phalanx.comm.shm_segment import ROUND_BYTES, SMALL_BYTES
from phalanx.kernels.rms_norm import rms_norm
from phalanx.native import find_native

NATIVE = find_native()
needs_library = pytest.mark.skipif(NATIVE.library is None, reason=NATIVE.told)
DTYPES = ["float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8"]
FLOATS = ["float32", "bfloat16", "float16"]
RAGGED = [1, 3, 31, 577, 4099, 40_001]
FLOAT_SIZES = [*RAGGED, ROUND_BYTES // 2 + 33]


def drawn(rank: int, count: int, dtype: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * count + rank)
    if getattr(torch, dtype).is_floating_point:
        return torch.randn(count, generator=generator).mul_(10).to(getattr(torch, dtype))
    return torch.randint(0, 256, (count,), generator=generator).to(getattr(torch, dtype))


def joined(comm: Communicator, store: Store, backend: str, name: str) -> Communicator:
    return create_communicator(backend, rank=comm.rank, size=comm.size, rendezvous=store, group=name, timeout_s=20)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def rank_against_torch(comm: Communicator, store: Store, dtype: str, counts: list[int], name: str) -> object:
    """Rank 0 with the library, the others in turn without: every rank must get what a group without it gets."""
    size = comm.size
    mixed = joined(comm, store, "shm-torch" if comm.rank % 2 else "shm", f"mixed-{name}")
    with joined(comm, store, "shm", f"native-{name}") as native, joined(comm, store, "shm-torch", name) as plain, mixed:
        for count in counts:
            x = drawn(comm.rank, count, dtype)
            rows = [(rank * count) % 7 for rank in range(size)]
            pile = drawn(comm.rank, sum(rows) * 3, dtype).view(-1, 3)
            for other in (native, mixed):
                for op in ("sum", "max"):
                    expected = plain.all_reduce(x.clone(), op=cast(Any, op))
                    assert same_bits(other.all_reduce(x.clone(), op=cast(Any, op)), expected), (op, count)
                assert same_bits(other.all_gather(x), plain.all_gather(x)), count
                assert same_bits(other.reduce_scatter(pile, sizes=rows), plain.reduce_scatter(pile, sizes=rows)), count
                assert same_bits(other.broadcast(x.clone(), size - 1), plain.broadcast(x.clone(), size - 1)), count
                other.barrier()
                if size > 1:
                    arrived = torch.empty_like(x)
                    handle = other.send(x, (comm.rank + 1) % size, async_op=True)
                    other.recv(arrived, (comm.rank - 1) % size)
                    handle.wait()
                    assert same_bits(arrived, drawn((comm.rank - 1) % size, count, dtype)), count
    return True


@needs_library
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_and_without_it_all_ranks_get_the_same_bits(pool: Any, size: int, dtype: str) -> None:
    name = f"bits-{size}-{dtype}"
    assert all(pool.run(rank_against_torch, size, backend="shm", dtype=dtype, counts=RAGGED, name=name))


def rank_against_double(comm: Communicator, store: Store, dtype: str, counts: list[int]) -> object:
    for count in counts:
        parts = [drawn(rank, count, dtype) for rank in range(comm.size)]
        exact = torch.stack([part.double() for part in parts]).sum(0)
        got = comm.all_reduce(parts[comm.rank].clone())
        # One rounding to the dtype, and those of the sums in float32 before it.
        bound = exact.abs() * torch.finfo(got.dtype).eps / 2 + comm.size * 100 * torch.finfo(torch.float32).eps
        assert bool(((got.double() - exact).abs() <= bound).all()), count
    return True


@needs_library
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_is_right_to_the_last_bit_of_its_dtype(pool: Any, size: int, dtype: str) -> None:
    assert all(pool.run(rank_against_double, size, backend="shm", dtype=dtype, counts=FLOAT_SIZES))


def special(dtype: torch.dtype) -> torch.Tensor:
    """Numbers at which a careless rounding goes wrong, at every place of a register."""
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, limits.max, -limits.max, limits.smallest_normal, limits.smallest_normal / 4, 1 + limits.eps]
    return torch.tensor([*values, float("inf"), float("nan")], dtype=dtype).repeat(11)


def rank_special(comm: Communicator, store: Store, name: str) -> object:
    with joined(comm, store, "shm-torch", name) as plain:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for op in ("sum", "max"):
                x = special(dtype).roll(comm.rank)
                got = comm.all_reduce(x.clone(), op=cast(Any, op))
                expected = plain.all_reduce(x.clone(), op=cast(Any, op))
                assert torch.equal(got.isnan(), expected.isnan()), (dtype, op)
                assert same_bits(got[~got.isnan()], expected[~got.isnan()]), (dtype, op)
    return True


@needs_library
@pytest.mark.parametrize("size", [2, 3])
def test_subnormals_infinities_and_not_a_number_are_those_of_torch(pool: Any, size: int) -> None:
    assert all(pool.run(rank_special, size, backend="shm", name=f"special-{size}"))


def rank_fused(comm: Communicator, store: Store, dtype: str, shapes: list[list[int]], name: str) -> object:
    kind = getattr(torch, dtype)
    with joined(comm, store, "shm-torch", name) as plain:
        for shape in shapes:
            count = torch.Size(shape).numel()
            x = drawn(comm.rank, count, dtype).view(shape)
            residual, weight = drawn(7, count, dtype).view(shape), drawn(8, shape[-1], dtype)
            total = plain.all_reduce(x.clone())
            kept, entries = residual.clone(), len(comm.ledger.entries())
            normed, residual_sum = comm.fused_all_reduce_rms_norm(x.clone(), residual, weight, 1e-5)
            assert torch.equal(residual, kept)
            assert len(comm.ledger.entries()) == entries + 1
            assert comm.ledger.entries()[-1].op == "fused_all_reduce_rms_norm"
            assert same_bits(residual_sum, total + residual), shape
            wanted = rms_norm(total + residual, weight, 1e-5)
            # One step of the dtype; in float32 also those of the sum of squares, whose order is another one.
            num_steps = 4 if kind == torch.float32 else 1
            steps = (
                num_steps * torch.finfo(kind).eps * wanted.abs().float().clamp(min=torch.finfo(kind).smallest_normal)
            )
            assert normed.dtype == kind
            assert bool(((normed.float() - wanted.float()).abs() <= steps).all()), shape
    return True


@needs_library
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_fused_form_is_the_sum_the_residual_and_the_norm(pool: Any, size: int, dtype: str) -> None:
    shapes = [[1, 576], [2, 3, 65], [7, 1], [300, 577]]
    name = f"fused-{size}-{dtype}"
    assert all(pool.run(rank_fused, size, backend="shm", dtype=dtype, shapes=shapes, name=name))


def rank_killed(comm: Communicator, store: Store, op: str) -> object:
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.3)  # until the others sleep
        os.kill(os.getpid(), signal.SIGKILL)
    large = torch.ones(ROUND_BYTES // 4)
    started_s = time.monotonic()
    try:
        if op == "recv":
            comm.recv(torch.ones(4), 1)
        elif op == "send":
            for _ in range(16):
                comm.send(large, 1)
        elif op == "barrier":
            comm.barrier()
        elif op == "broadcast":
            comm.broadcast(torch.ones(4), 1)
        elif op == "fused":
            comm.fused_all_reduce_rms_norm(torch.ones(1, 8), torch.ones(1, 8), torch.ones(8), 1e-5)
        else:
            getattr(comm, op.removesuffix("-large"))(large if op.endswith("large") else torch.ones(6, 8))
    finally:
        assert time.monotonic() - started_s < 5
    return None


@needs_library
@pytest.mark.parametrize(
    "op",
    ["all_reduce", "all_reduce-large", "all_gather", "reduce_scatter", "broadcast", "barrier", "send", "recv", "fused"],
)
def test_a_killed_rank_ends_every_wait_for_it(pool: Any, op: str) -> None:
    answers = pool.outcomes(rank_killed, 2, backend="shm", fresh=True, timeout_s=300.0, op=op)
    assert answers[0]["error"]["type"] == "PeerLostError", answers
    assert "rank 1 has ended" in answers[0]["error"]["message"]


def rank_times_out(comm: Communicator, store: Store, key: str) -> object:
    comm.barrier()
    if comm.rank == 1:
        while not store.check([key]):
            time.sleep(0.02)
        return None
    try:
        return comm.fused_all_reduce_rms_norm(torch.ones(1, 8), torch.ones(1, 8), torch.ones(8), 1e-5)
    finally:
        store.set(key, "late")


@needs_library
def test_a_wait_past_its_limit_is_told_like_any_other(pool: Any) -> None:
    answers = pool.outcomes(rank_times_out, 2, backend="shm", fresh=True, timeout_s=2.0, key="native-late")
    error = answers[0]["error"]
    assert error["type"] == "WaitTimeoutError"
    assert error["missing"] == [1]
    assert "fused_all_reduce_rms_norm #2" in error["message"]


def rank_counts(comm: Communicator, store: Store) -> object:
    """The calls of a model's layers, an asynchronous one among them: numbers and order stay those of the calls."""
    first = comm.all_reduce(torch.ones(4), async_op=True)
    second = comm.all_reduce(torch.ones(SMALL_BYTES))  # behind one that is under way
    assert torch.equal(first.wait(), torch.full((4,), float(comm.size)))
    assert torch.equal(second, torch.full((SMALL_BYTES,), float(comm.size)))
    comm.all_reduce(torch.ones(2))
    return [(entry.op, entry.seq) for entry in comm.ledger.entries()]


@needs_library
def test_blocking_calls_wait_for_the_asynchronous_ones_before_them(pool: Any) -> None:
    for answer in pool.run(rank_counts, 3, backend="shm", fresh=True):
        assert sorted(answer) == [["all_reduce", 1], ["all_reduce", 2], ["all_reduce", 3]]
