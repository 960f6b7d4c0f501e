"""Hidden states from a stage to one of another number of ranks; the ranks are threads, their transfers real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rank_threads import Join, run_ranks

from phalanx.comm import Communicator, Handle
from phalanx.comm.compress import Rows
from phalanx.parallel.handover import HandOver

SIZES = [(1, 1), (1, 2), (1, 3), (3, 1), (2, 3), (3, 2), (2, 2), (2, 4), (4, 3)]


class Spy:
    """A communicator that keeps a copy of everything sent through it, and counts the sends not yet waited for."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.rank = comm.rank
        self.machines = comm.machines
        self.sent: list[torch.Tensor] = []
        self.num_pending = self.most_pending = 0

    def send(self, x: torch.Tensor, to: int, *, async_op: Literal[True]) -> WatchedHandle:
        self.sent.append(x.clone())
        self.num_pending += 1
        self.most_pending = max(self.most_pending, self.num_pending)
        return WatchedHandle(self._comm.send(x, to, async_op=async_op), self)

    def recv(self, x: torch.Tensor, source: int, **options: Any) -> Any:
        return self._comm.recv(x, source, **options)


@dataclass
class WatchedHandle:
    """An asynchronous send that its Spy hears being waited for."""

    handle: Handle[torch.Tensor]
    spy: Spy

    def wait(self) -> torch.Tensor:
        self.spy.num_pending -= 1
        return self.handle.wait()


class Crossing(NamedTuple):
    """sent: what each sender sent, by tensor. received: what each receiver holds afterwards, by hand-over.
    most_pending: sends of each rank that were under way at once.
    """

    sent: list[list[torch.Tensor]]
    received: list[list[torch.Tensor]]
    most_pending: list[int]


def cross(
    num_senders: int,
    num_receivers: int,
    *hidden_states: torch.Tensor,
    compress: str = "none",
    machines: tuple[int, ...] | None = None,
) -> Crossing:
    """Hands the hidden states over one after another. machines: of all ranks, in place of the one they are on."""
    senders, receivers = range(num_senders), range(num_senders, num_senders + num_receivers)

    def rank(number: int, join: Join) -> tuple[list[torch.Tensor], int]:
        pipeline = Spy(join("pipeline", number, num_senders + num_receivers))
        ranks = senders if number in senders else receivers
        stage = join(f"stage of rank {ranks.start}", number - ranks.start, len(ranks))
        pipeline.machines = machines or pipeline.machines
        border = HandOver(cast(Communicator, pipeline), senders, receivers, stage, compress)
        if number in senders:
            for x in hidden_states:
                border.send(x.clone())
            border.flush()
            assert pipeline.num_pending == 0
            return pipeline.sent, pipeline.most_pending
        got = []
        for x in hidden_states:
            border.expect(x.shape[0], x.shape[1], x.dtype, x.device)
            got.append(border.receive())
        assert pipeline.sent == []
        return got, 0

    tensors, most_pending = zip(*run_ranks(num_senders + num_receivers, rank), strict=True)
    return Crossing(list(tensors[:num_senders]), list(tensors[num_senders:]), list(most_pending))


def numbered(num_tokens: int, hidden_size: int) -> torch.Tensor:
    """Hidden states no two values of which are the same."""
    return torch.arange(num_tokens * hidden_size, dtype=torch.float32).view(num_tokens, hidden_size)


def check_crossing(num_senders: int, num_receivers: int, x: torch.Tensor) -> None:
    crossing = cross(num_senders, num_receivers, x)
    sent = torch.cat([piece for pieces in crossing.sent for piece in pieces])
    assert sent.sort().values.tolist() == x.flatten().tolist(), "not every value crossed the border exactly once"
    for got in crossing.received:
        assert torch.equal(got[0], x)


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize(("num_senders", "num_receivers"), SIZES)
def test_every_value_crosses_once_and_every_receiver_holds_them_all(
    num_senders: int, num_receivers: int, num_tokens: int
) -> None:
    check_crossing(num_senders, num_receivers, numbered(num_tokens, 10))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(4, 40))
def test_so_it_is_for_any_sizes(num_senders: int, num_receivers: int, num_tokens: int, hidden_size: int) -> None:
    check_crossing(num_senders, num_receivers, numbered(num_tokens, hidden_size))


def test_senders_share_the_work_evenly() -> None:
    crossing = cross(3, 2, numbered(7, 10))
    assert [sum(piece.numel() for piece in pieces) for pieces in crossing.sent] == [24, 23, 23]


@pytest.mark.parametrize(("num_senders", "num_receivers"), [(1, 3), (3, 1), (2, 3)])
def test_steps_arrive_in_order_whatever_their_sizes(num_senders: int, num_receivers: int) -> None:
    steps = [torch.randn(tokens, 12, generator=torch.Generator().manual_seed(tokens)) for tokens in (7, 1, 300, 2, 1)]
    for got in cross(num_senders, num_receivers, *steps).received:
        assert all(torch.equal(x, step) for x, step in zip(got, steps, strict=True))


def test_a_rank_never_has_more_than_one_hand_over_on_its_way() -> None:
    """Or hidden states would pile up in front of a slow stage."""
    crossing = cross(1, 3, *[numbered(2, 12)] * 5)
    assert crossing.most_pending == [3, 0, 0, 0]


def test_what_is_expected_ahead_comes_while_nobody_waits_and_in_order() -> None:
    steps = [numbered(tokens, 12) for tokens in (3, 1, 7)]

    def rank(number: int, join: Join) -> list[torch.Tensor]:
        pipeline = join("pipeline", number, 2)
        border = HandOver(pipeline, range(1), range(1, 2), join(f"stage {number}", 0, 1))
        if number == 0:
            for x in steps:
                border.send(x)
            border.flush()
            pipeline.barrier()
            return []
        for x in steps:
            border.expect(x.shape[0], x.shape[1], x.dtype, x.device)
        assert border.num_expected == len(steps)
        pipeline.barrier()  # the sender gets here only once all has left it
        received = [border.receive() for _ in steps]
        assert border.num_expected == 0
        return received

    _, received = run_ranks(2, rank)
    assert all(torch.equal(got, x) for got, x in zip(received, steps, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_cross_bit_by_bit(dtype: torch.dtype) -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :3] = torch.tensor([float("inf"), -0.0, 1e-7]).to(dtype)
    for got in cross(2, 3, x).received:
        assert got[0].dtype == dtype
        assert torch.equal(got[0].view(torch.int16), x.view(torch.int16))


def test_hidden_states_that_are_not_contiguous_cross_too() -> None:
    x = numbered(12, 5).t()
    for got in cross(2, 3, x).received:
        assert torch.equal(got[0], x)


# ---- between machines ----


def tokens_of_unlike_size(num_tokens: int, hidden_size: int) -> torch.Tensor:
    """Hidden states [num_tokens, hidden_size]; each token ten times as large as the one before."""
    x = torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(num_tokens))
    return x * 10.0 ** torch.arange(num_tokens).unsqueeze(1)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize(("num_senders", "num_receivers"), SIZES)
def test_compressed_tokens_arrive_alike_on_all_receivers_and_close_to_what_was_sent(
    num_senders: int, num_receivers: int, scheme: str
) -> None:
    machines = (0,) * num_senders + (1,) * num_receivers
    x = tokens_of_unlike_size(5, 13)  # which no number of ranks cuts between tokens
    crossing = cross(num_senders, num_receivers, x, x[:1], compress=scheme, machines=machines)
    assert all(piece.dtype == torch.uint8 for pieces in crossing.sent for piece in pieces)
    for got in crossing.received:
        # The scales are those of whole tokens, so that cutting changes nothing.
        assert torch.equal(got[0], Rows.of(x, scheme).decode(x.dtype))
        assert torch.equal(got[1], got[0][:1])
    largest = x.abs().amax(1, keepdim=True)
    assert ((crossing.received[0][0] - x).abs() <= largest / (250 if scheme == "int8" else 16)).all()


def test_only_what_goes_to_another_machine_is_compressed() -> None:
    x = tokens_of_unlike_size(4, 10)
    crossing = cross(2, 2, x, compress="int8", machines=(0, 0, 0, 1))
    (near,), (far,) = crossing.sent
    assert torch.equal(near, x.view(-1)[:20])
    assert (far.dtype, far.numel()) == (torch.uint8, 20 + 2 * 4)
    for got in crossing.received:
        assert torch.equal(got[0][:2], x[:2])
        assert torch.equal(got[0][2:], Rows.of(x[2:], "int8").decode(x.dtype))


def test_ranks_of_one_machine_compress_nothing() -> None:
    x = numbered(3, 10)
    assert torch.equal(cross(1, 1, x, compress="int8").received[0][0], x)
