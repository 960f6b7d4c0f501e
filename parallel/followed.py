"""Rates that follow what steps take: the ledger's readings of a step, agreed on by the ranks, move those in use.

Every rank of a group has to choose the same way for the same step, or their calls would not match. So nothing counts
that only one rank has seen: behind a step the ranks exchange what each measured, and all reckon from there with the
same numbers. Who came late to a sum waited least for it, so that of each sum the shortest time of any rank counts; of
computing the longest. What the others had sent by then lay ready, and what he sent himself was perhaps only on its way:
so no sum counts as faster than at the start, where all waited for each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from phalanx.comm.communicator import FUSED, Communicator
from phalanx.comm.ledger import LedgerEntry
from phalanx.parallel.rates import Rates

if TYPE_CHECKING:
    from phalanx.parallel.overlap import StageWork

KEPT = 8  # the latest readings, of which the median counts
FADES = 0.7  # what a reading weighs beside the one after it: two that agree outweigh all before
SETTLED = 1.25  # the factor by which a median must differ from the rate in use to take its place
SHARE = 1 / 200  # of the time of steps, that the ranks may spend on agreeing
MOST_UNREAD = 8  # steps that pass without, however short they were predicted to be

_SUMS = ("all_reduce", FUSED, "reduce_scatter")  # what is gathered behind a reduce_scatter belongs to its sum


class Reading(NamedTuple):
    """Of a step: seconds for an operation of products, and for a byte summed over the ranks."""

    per_flop_s: float
    per_byte_s: float


class FollowedRates:
    """rates: in use, the same on every rank of the group."""

    def __init__(self, comm: Communicator, work: StageWork, rates: Rates) -> None:
        """rates: measured at the start, the same on all ranks, as is `work`."""
        self.rates = rates
        self._comm = comm
        self._work = work
        self._start = rates
        self._readings = deque([Reading(1 / rates.flops_per_s, 1 / rates.bytes_per_s)] * KEPT, maxlen=KEPT)
        self._unread_s = 0.0  # of steps since the last reading, as predicted: the same on all ranks
        self._num_unread = 0

    @contextmanager
    def over(self, num_tokens: int, predicted_s: float) -> Iterator[None]:
        """Around a step, on all ranks alike. predicted_s: what it takes by the rates in use."""
        self._unread_s += predicted_s
        self._num_unread += 1
        if self._unread_s * SHARE < self._start.latency_s and self._num_unread <= MOST_UNREAD:
            yield
            return
        self._unread_s, self._num_unread = 0.0, 0
        ledger = self._comm.ledger
        before, began_s = ledger.num_recorded, ledger.clock_s()
        yield
        taken_s = ledger.clock_s() - began_s
        mine = [each for each in ledger.since(before) if each.group == self._comm.group]
        self._read(self._agree(taken_s, mine), mine, num_tokens)

    def _agree(self, taken_s: float, mine: Sequence[LedgerEntry]) -> list[float]:
        """Seconds of computing on the slowest rank, and of each transfer on the rank that came to it last."""
        exposed_s = sum(each.waited_us for each in mine) / 1e6
        hidden_s = max(0.0, sum(max(0.0, each.took_us) for each in mine) / 1e6 - exposed_s)
        computing_s = taken_s - exposed_s - self._start.contention * hidden_s
        own = torch.tensor([computing_s, *(-each.took_us / 1e6 for each in mine)], dtype=torch.float64)
        computed_s, *took_s = self._comm.all_reduce(own, op="max").tolist()
        return [computed_s, *(-each for each in took_s)]

    def _read(self, agreed_s: Sequence[float], mine: Sequence[LedgerEntry], num_tokens: int) -> None:
        """mine: of which only what is the same on all ranks counts from here on."""
        computed_s, *took_s = agreed_s
        sums = [each for each in mine if each.op in _SUMS]
        num_bytes = sum(each.num_bytes for each in sums)
        summed_s = sum(took_s) - len(sums) * self._start.latency_s
        if not num_bytes or min(took_s) < 0 or summed_s <= 0 or computed_s <= 0:
            return  # of a backend that does not tell, or nothing but latency
        num_flops = 2 * num_tokens * self._work.num_layers * (self._work.attention + self._work.ffn)
        per_byte_s = max(summed_s / num_bytes, 1 / self._start.bytes_per_s)
        self._readings.append(Reading(computed_s / num_flops, per_byte_s))
        flops_per_s, bytes_per_s = (1 / fading_median(values) for values in zip(*self._readings, strict=True))
        in_use = self.rates
        if _differ(flops_per_s, in_use.flops_per_s) or _differ(bytes_per_s, in_use.bytes_per_s):
            source = f"as steps up to {self._comm.ledger.step} took them, sums at {_mb(bytes_per_s)} MB/s"
            source += f" and products at {flops_per_s / 1e9:.3g} GFLOP/s; at the start {_mb(self._start.bytes_per_s)}"
            source += f" and {self._start.flops_per_s / 1e9:.3g}"
            self.rates = in_use._replace(flops_per_s=flops_per_s, bytes_per_s=bytes_per_s, source=source)


def fading_median(values: Sequence[float]) -> float:
    """The weighted median, where each value weighs `FADES` times what the next one does."""
    weights = [FADES**age for age in reversed(range(len(values)))]
    left = sum(weights) / 2
    for value, weight in sorted(zip(values, weights, strict=True)):
        left -= weight
        if left <= 0:
            return value
    raise ValueError("no values")


def _differ(one: float, other: float) -> bool:
    return abs(math.log(one / other)) > math.log(SETTLED)


def _mb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.3g}"
