"""Which transfers of a stage are hidden, and how: one decision for each step, from measured rates.

With C seconds of computing and X of transfer, both over all layers of a stage, a step takes C + X where nothing is
hidden. Products cut in k chunks take max(c, x) + min(c, x) / k each, where c is only the row-parallel product before
the sum. Parts of the tokens, two or more, that pass each block in turns hide sums behind whole blocks, and approach
max(C, X): the more of them, the less the blocks need to be alike.
What the two take of each other, cores or memory, is measured too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import Norm, Weight, plain_norm
from phalanx.parallel.followed import FollowedRates
from phalanx.parallel.rates import LEAST_TOKENS, Rates, find_scattering, find_trial_tokens, measure_rates
from phalanx.parallel.stream import ChunkedStream, ResidualStream, ScatteredStream, WholeStream

PIECES = (2, 4, 8)
ASKED_PIECES = {"chunks": 4, "parts": 2}  # of ways that are asked for by name
_UNWATCHED = nullcontext()
WORTH = 0.92  # what the predicted time must fall to: pieces are slower than they should be, and predictions too rosy


class StageWork(NamedTuple):
    """What a rank computes for the layers of its stage.

    attention, ffn: elements of the weights of a block. hidden: size of what is summed over the ranks for each token.
    attention_inputs, ffn_inputs: of the blocks' row-parallel products. itemsize: bytes of a value.
    """

    num_layers: int
    attention: int
    ffn: int
    hidden: int
    attention_inputs: int
    ffn_inputs: int
    itemsize: int


class Way(NamedTuple):
    """What is done in a step: `none`, `chunks`, `parts` or `sequence`; and why. num_pieces: that products are cut in by
    `chunks`, and the step's tokens by `parts`.
    """

    name: str
    reason: str
    num_pieces: int = 1


class Overlap:
    """The decision for the steps of a rank. Every rank of a group decides alike, since they agree on what it rests on:
    rates measured at the start, and from `follow` on those that steps show.

    asked: `auto`, or the way to be taken by all steps of `2 * LEAST_TOKENS` tokens and more. work, rates: the same on
    all ranks, as `measure` finds them.
    """

    def __init__(self, asked: str = "auto", work: StageWork | None = None, rates: Rates | None = None) -> None:
        self._asked = asked
        self._work = work
        self._rates = rates
        self._followed: FollowedRates | None = None
        self._scattered_from: int | None = None

    def way(self, num_tokens: int) -> Way:
        if num_tokens < 2 * LEAST_TOKENS:
            return Way("none", f"steps of fewer than {2 * LEAST_TOKENS} tokens have nothing to hide behind")
        if self._asked != "auto":
            return Way(self._asked, "comm.overlap says so", ASKED_PIECES.get(self._asked, 1))
        if self._work is None:
            return Way("none", "nothing was measured")
        rates = self._rates if self._followed is None else self._followed.rates
        return choose_way(num_tokens, self._work, rates, self._scattered_from)

    def num_parts(self, num_tokens: int) -> int:
        """That the tokens of a step pass the layers in."""
        way = self.way(num_tokens)
        return way.num_pieces if way.name == "parts" else 1

    def follow(self, comm: Communicator) -> None:
        """From now on the rates are those that steps show, where they were measured; on all ranks of the group at once.

        Not on a GPU: its times are known only once it has passed the step, and nobody waits for that.
        """
        if self._work is not None and self._rates is not None and comm.device.type == "cpu":
            self._followed = FollowedRates(comm, self._work, self._rates)

    @property
    def has_moved(self) -> bool:
        """Whether steps have shown other rates than were measured at the start."""
        return self._followed is not None and self._followed.rates is not self._rates

    def over(self, num_tokens: int) -> AbstractContextManager[None]:
        """Around the computing of a step of so many tokens, from which the rates may be learned. A collective call."""
        if self._followed is None or self._work is None or num_tokens < 2 * LEAST_TOKENS:
            return _UNWATCHED
        return self._followed.over(num_tokens, serial_times(num_tokens, self._work, self._followed.rates)[2])

    def stream(self, x_TH: torch.Tensor, norm: Norm, eps: float, comm: Communicator) -> ResidualStream:
        """Of all tokens of a step of one part. x_TH, norm, eps: as for any `ResidualStream`."""
        way = self.way(len(x_TH))
        if way.name == "chunks":
            return ChunkedStream(x_TH, norm, eps, way.num_pieces)
        if way.name == "sequence":
            return ScatteredStream(x_TH, norm, eps, comm)
        return WholeStream(x_TH, norm, eps)

    def measure(self, comm: Communicator, work: StageWork, weight: Weight, norm: Norm, most_tokens: int) -> str:
        """Finds the rates, on all ranks of the group at once; what is done in a step of `most_tokens` tokens, and why.

        work: of this rank. weight: [H, I] of a row-parallel product. norm: of the stream.
        """
        if self._asked == "auto" and most_tokens >= 2 * LEAST_TOKENS:
            most = comm.all_reduce(torch.tensor(work, dtype=torch.int64, device=comm.device), op="max")
            self._work = StageWork(*most.tolist())
            trial_tokens = find_trial_tokens(comm, weight, most_tokens)
            if comm.in_background:
                self._rates = measure_rates(comm, weight, most_tokens, trial_tokens)
            self._scattered_from = find_scattering(comm, plain_norm(norm), weight, trial_tokens)
        return self.told(most_tokens)

    def told(self, num_tokens: int) -> str:
        """What is done in a step of so many tokens, and why."""
        way = self.way(num_tokens)
        return f"{way.name} at {num_tokens} tokens: {way.reason}"


@lru_cache(maxsize=4096)
def choose_way(num_tokens: int, work: StageWork, rates: Rates | None, scattered_from: int | None) -> Way:
    """rates: None where transfers do not go on by themselves. scattered_from: tokens from which on reduce-scatter, norm
    and all-gather were measured to be faster than all-reduce and norm; None for never.
    """
    told = "transfers take the same cores as the products"
    if rates is not None:
        compute_s, transfer_s, serial_s = serial_times(num_tokens, work, rates)
        predicted = {
            (name, pieces): took_s(num_tokens, work, rates, pieces)
            for name, took_s in (("chunks", chunks_s), ("parts", parts_s))
            for pieces in PIECES
            if num_tokens // pieces >= LEAST_TOKENS
        }
        name, num_pieces = best = min(predicted, key=lambda way: predicted[way])
        told = f"{compute_s * 1e3:.3g} ms of computing and {transfer_s * 1e3:.3g} ms of transfers"
        if rates.source:
            told += f", {rates.source},"
        if rates.contention > 0.01:
            told += f", {rates.contention:.0%} of what is hidden lost again to cores and memory that both want,"
        if predicted[best] <= WORTH * serial_s:
            told += f" take {predicted[best] * 1e3:.3g} ms in {num_pieces} {name}, in place of {serial_s * 1e3:.3g}"
            return Way(name, told, num_pieces)
        told += f" would gain {max(0.0, 1 - predicted[best] / serial_s):.0%}, too little"
    if scattered_from is not None and num_tokens >= scattered_from:
        return Way("sequence", f"{told}; norms of a rank's own tokens were faster from {scattered_from} tokens on")
    return Way("none", told)


def serial_times(num_tokens: int, work: StageWork, rates: Rates) -> tuple[float, float, float]:
    """Seconds of a step: of computing, of transfers, and of both one after the other."""
    compute_s = rates.compute_s(num_tokens, work.attention) + rates.compute_s(num_tokens, work.ffn)
    transfer_s = 2 * (rates.transfer_s(num_tokens, work.hidden, work.itemsize) + rates.latency_s)
    times = work.num_layers * compute_s, work.num_layers * transfer_s
    return *times, sum(times)


def chunks_s(num_tokens: int, work: StageWork, rates: Rates, num_chunks: int) -> float:
    """Of a step whose row-parallel products are cut."""
    transfer_s = rates.transfer_s(num_tokens, work.hidden, work.itemsize)
    took_s = 0.0
    for elements, num_inputs in ((work.attention, work.attention_inputs), (work.ffn, work.ffn_inputs)):
        product = work.hidden * num_inputs
        took_s += rates.compute_s(num_tokens, elements - product)
        took_s += rates.chunked_s(rates.compute_s(num_tokens, product), transfer_s, num_chunks)
    return work.num_layers * took_s


def parts_s(num_tokens: int, work: StageWork, rates: Rates, num_parts: int) -> float:
    """Of a step in parts: blocks run one after another, and so do sums; a part's block waits for its last sum."""
    rows = -(-num_tokens // num_parts)
    sum_s = rates.transfer_s(rows, work.hidden, work.itemsize) + rates.latency_s
    blocks_s = rates.compute_s(rows, work.attention), rates.compute_s(rows, work.ffn)
    computed_s = sent_s = 0.0
    ready_s = [0.0] * num_parts
    for _ in range(work.num_layers):
        for block_s in blocks_s:
            for part in range(num_parts):
                computed_s = max(computed_s, ready_s[part]) + block_s
                sent_s = ready_s[part] = max(computed_s, sent_s) + sum_s
    hidden_s = num_parts * work.num_layers * (sum(blocks_s) + 2 * sum_s) - sent_s
    return sent_s + rates.contention * hidden_s
