"""A group of one, and the checks of arguments that all backends share."""

from __future__ import annotations

import pytest
import torch

from phalanx.comm import Communicator, Ledger, create_communicator
from phalanx.errors import CommError


@pytest.fixture
def alone() -> Communicator:
    return create_communicator(rank=0, size=1, group="alone")


def test_every_operation_of_a_group_of_one_returns_what_it_was_given(alone: Communicator) -> None:
    x = torch.arange(6.0).reshape(3, 2)
    expected = x.clone()
    assert alone.backend == "single"
    assert alone.all_reduce(x, op="max") is x
    assert alone.broadcast(x, 0) is x
    for copy in (alone.all_gather(x), alone.reduce_scatter(x), alone.all_gather(x, sizes=[3])):
        assert torch.equal(copy, expected)
        assert copy.data_ptr() != x.data_ptr()
    assert torch.equal(alone.all_reduce(x, async_op=True).wait(), expected)
    alone.barrier()


def test_collectives_are_numbered_and_written_down(alone: Communicator) -> None:
    alone.all_reduce(torch.ones(4))
    alone.barrier(async_op=True).wait()
    assert [(entry.seq, entry.op, entry.num_bytes) for entry in alone.ledger.entries()] == [
        (1, "all_reduce", 16),
        (2, "barrier", 0),
    ]


def test_exposed_time_of_an_asynchronous_operation_is_its_start_and_its_wait() -> None:
    ticks = iter([0.0, 1.0, 50.0, 54.0])  # starts, has started, waits, is done
    comm = create_communicator(rank=0, size=1, ledger=Ledger(clock_s=lambda: next(ticks)))
    comm.all_reduce(torch.ones(1), async_op=True).wait()
    (entry,) = comm.ledger.entries()
    assert (entry.started_us, entry.waited_us, entry.total_us, entry.hidden_us) == (0.0, 5e6, 54e6, 49e6)


def test_a_blocking_operation_is_exposed_throughout() -> None:
    ticks = iter([2.0, 9.0])
    comm = create_communicator(rank=0, size=1, ledger=Ledger(clock_s=lambda: next(ticks)))
    comm.all_reduce(torch.ones(1))
    (entry,) = comm.ledger.entries()
    assert (entry.waited_us, entry.total_us) == (7e6, 7e6)


def test_a_tensor_that_is_not_contiguous_is_refused(alone: Communicator) -> None:
    with pytest.raises(CommError, match=r"all_reduce in group 'alone': the tensor of shape \[3, 2\] .* not contiguous"):
        alone.all_reduce(torch.ones(2, 3).T)


def test_a_dtype_that_cannot_be_sent_is_refused_with_those_that_can(alone: Communicator) -> None:
    with pytest.raises(CommError, match=r"torch.complex64 cannot be sent; use one of bfloat16, .*uint8"):
        alone.broadcast(torch.ones(2, dtype=torch.complex64), 0)


def test_a_tensor_on_another_device_is_refused(alone: Communicator) -> None:
    with pytest.raises(CommError, match="the tensor is on meta, but the group was made for cpu"):
        alone.all_reduce(torch.ones(2, device="meta"))


def test_an_unknown_reduction_is_refused(alone: Communicator) -> None:
    with pytest.raises(CommError, match="op must be 'sum' or 'max', found 'mean'"):
        alone.all_reduce(torch.ones(2), op="mean")  # type: ignore[call-overload]


def test_sizes_that_do_not_fit_the_tensor_are_refused(alone: Communicator) -> None:
    x = torch.ones(3, 2)
    with pytest.raises(CommError, match=r"rank 0 holds 3 rows, but sizes \[4\] say 4"):
        alone.all_gather(x, sizes=[4])
    with pytest.raises(CommError, match=r"sizes \[2\] add up to 2, not to the 3 rows"):
        alone.reduce_scatter(x, sizes=[2])
    with pytest.raises(CommError, match=r"sizes must be 1 numbers of rows.* found \[1, 2\]"):
        alone.all_gather(x, sizes=[1, 2])
    with pytest.raises(CommError, match=r"at least one dimension, found a scalar"):
        alone.all_gather(torch.tensor(1.0))


def test_ranks_outside_the_group_and_oneself_are_refused(alone: Communicator) -> None:
    x = torch.ones(1)
    with pytest.raises(CommError, match="root must be a rank from 0 to 0, found 1"):
        alone.broadcast(x, 1)
    with pytest.raises(CommError, match="to must be a rank from 0 to 0, found -1"):
        alone.send(x, -1)
    with pytest.raises(CommError, match="source is rank 0 itself"):
        alone.recv(x, 0)


def test_a_refused_call_uses_up_no_number(alone: Communicator) -> None:
    with pytest.raises(CommError):
        alone.all_reduce(torch.ones(2, 3).T)
    alone.barrier()
    assert alone.ledger.entries()[0].seq == 1


def test_a_closed_communicator_says_so() -> None:
    with create_communicator(rank=0, size=1) as comm:
        comm.barrier()
    with pytest.raises(CommError, match="has been closed"):
        comm.all_reduce(torch.ones(1))


def test_an_aborted_communicator_says_so(alone: Communicator) -> None:
    alone.abort()
    with pytest.raises(CommError, match="cannot run: it was aborted on rank 0"):
        alone.barrier()
