"""Logits of a head that two ranks share, over transfers of a real group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.rank_threads import Join, run_ranks

from phalanx.comm.work import GroupBrokenError
from phalanx.kernels import (
    PackedWeight,
    QuantisedWeight,
    WeightFormat,
    choose_packing,
    columns_of_keys,
    linear,
    quantise,
)
from phalanx.parallel.layers import ColumnParallelLinear
from phalanx.parallel.shared_head import HeadAsker, HeadHelper

VOCAB, HIDDEN, CUT = 200, 48, 64
PACKING = choose_packing(torch.bfloat16, torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def quantised(weight: torch.Tensor) -> QuantisedWeight:
    held = WeightFormat(8)
    made = QuantisedWeight(weight.shape[0], weight.shape[1], held)
    made.put(0, quantise(weight, held))
    return made


PACKED = pytest.param(
    PackedWeight.pack, id="packed", marks=pytest.mark.skipif(not PACKING.usable, reason=f"needs {PACKING.told}")
)


@pytest.mark.parametrize("hold", [PACKED, quantised, torch.Tensor.double], ids=["packed", "quantised", "tensor"])
def test_logits_are_those_of_the_whole_head(hold: Callable[[torch.Tensor], Any]) -> None:
    """The helper multiplies by some rows of the embedding that it holds. Steps come in any sizes, as prompts do."""
    weight = random(VOCAB, HIDDEN)
    own, whole = hold(weight[:CUT].clone()), hold(weight)
    asked = [(0, 1), (0, 64), (0, 3), (1, 5), (3, 70)]
    dtype = torch.float64 if isinstance(whole, torch.Tensor) else torch.bfloat16

    def rank(number: int, join: Join) -> list[torch.Tensor]:
        comm = join("head", number, 2)
        if number == 0:
            asker, head = HeadAsker(comm, 1, VOCAB - CUT), ColumnParallelLinear(own)
            return [asker.logits(random(rows, HIDDEN, seed=rows).to(dtype), head) for _, rows in asked]
        helper = HeadHelper(comm, 0)
        helper.start(ColumnParallelLinear(whole, outputs=slice(CUT, VOCAB)), CUT)
        for step, rows in asked:
            helper.expect(step, (rows, HIDDEN), dtype, keys=False)
        helper.finish()
        assert sorted({entry.step for entry in comm.ledger.entries()}) == [0, 1, 3]
        helper.close()
        return []

    for (_, rows), logits in zip(asked, run_ranks(2, rank)[0], strict=True):
        expected = linear(random(rows, HIDDEN, seed=rows).to(dtype), whole)
        assert logits.dtype == dtype
        if dtype == torch.float64:  # where the order of additions may depend on the number of columns
            torch.testing.assert_close(logits, expected)
        else:
            assert torch.equal(logits, expected)


def test_of_the_largest_logits_only_keys_come_back() -> None:
    """Of equal logits the first counts, on whichever side; a token that both sides' rows are copies of comes up so."""
    weight = random(VOCAB, HIDDEN)
    weight[CUT + 7] = weight[3]
    rows_BH = torch.cat((weight[[3, CUT + 7, 5, CUT, VOCAB - 1]] * 4, random(20, HIDDEN, seed=1)))

    def rank(number: int, join: Join) -> list[int]:
        comm = join("head", number, 2)
        if number == 0:
            asker = HeadAsker(comm, 1, VOCAB - CUT)
            keys_B = asker.largest_keys(rows_BH, ColumnParallelLinear(weight[:CUT]), 0)
            return columns_of_keys(keys_B).tolist()
        helper = HeadHelper(comm, 0)
        helper.start(ColumnParallelLinear(weight[CUT:]), CUT)
        helper.expect(0, (len(rows_BH), HIDDEN), torch.bfloat16, keys=True)
        helper.finish()
        _, answer = comm.ledger.entries()
        assert answer.num_bytes == 8 * len(rows_BH)
        helper.close()
        return []

    tokens = run_ranks(2, rank)[0]
    assert tokens[:5] == [3, 3, 5, CUT, VOCAB - 1]
    assert tokens == linear(rows_BH, weight).argmax(1).tolist()


def test_a_helper_that_fails_ends_the_wait_for_it_and_says_why() -> None:
    def rank(number: int, join: Join) -> None:
        comm = join("head", number, 2)
        if number == 0:
            asker = HeadAsker(comm, 1, VOCAB - CUT)
            with pytest.raises(GroupBrokenError, match="rank 1"):
                asker.logits(random(2, HIDDEN), ColumnParallelLinear(random(CUT, HIDDEN)))
            return
        helper = HeadHelper(comm, 0)
        helper.start(ColumnParallelLinear(random(VOCAB, HIDDEN + 1)), CUT)
        helper.expect(0, (2, HIDDEN), torch.bfloat16, keys=True)
        with pytest.raises(RuntimeError, match="48"):
            helper.finish()
        with pytest.raises(RuntimeError, match="48"):
            helper.expect(1, (2, HIDDEN), torch.bfloat16, keys=True)
        helper.close()

    run_ranks(2, rank)


def test_an_asker_that_leaves_is_told_by_the_next_step() -> None:
    def rank(number: int, join: Join) -> None:
        comm = join("head", number, 2)
        if number == 0:
            return
        helper = HeadHelper(comm, 0)
        helper.start(ColumnParallelLinear(random(VOCAB, HIDDEN)), CUT)
        helper.expect(0, (2, HIDDEN), torch.bfloat16, keys=True)
        with pytest.raises(GroupBrokenError, match="rank 0"):
            helper.finish()
        helper.close()

    run_ranks(2, rank)


def test_closing_does_not_wait_for_rows_that_nobody_sends() -> None:
    closed = threading.Event()

    def rank(number: int, join: Join) -> None:
        comm = join("head", number, 2)
        if number == 0:
            assert closed.wait(10.0)
            return
        helper = HeadHelper(comm, 0)
        helper.start(ColumnParallelLinear(random(VOCAB, HIDDEN)), CUT)
        helper.expect(0, (2, HIDDEN), torch.bfloat16, keys=True)
        helper.close()
        closed.set()

    run_ranks(2, rank)
    assert "phalanx-head" not in [thread.name for thread in threading.enumerate()]
