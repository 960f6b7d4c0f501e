"""Which transfers of a stage are hidden, and how: one decision for each step, from measured rates.

With C seconds of computing and X of transfer, both over all layers of a stage, a step takes C + X where nothing is
hidden. Products cut in k chunks take max(c, x) + min(c, x) / k each, where c is only the row-parallel product before
the sum. Parts of the tokens, two or more, that pass each block in turns hide sums behind whole blocks, and approach
max(C, X): the more of them, the less the blocks need to be alike.
What the two take of each other, cores or memory, is measured too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import Weight
from phalanx.parallel.layers import RowParallelLinear
from phalanx.parallel.rates import LEAST_TOKENS, Rates, find_scattering, measure_rates
from phalanx.parallel.stream import ChunkedStream, ResidualStream, ScatteredStream, WholeStream

MOST_CHUNKS = 8
PARTS = (2, 4, 8)
ASKED_CHUNKS = 4  # where chunks are asked for by name
WORTH = 0.92  # what the predicted time must fall to: parts are slower than they should be, and predictions too rosy


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


class Cut(NamedTuple):
    """Into how many chunks a product is cut, and the seconds that it and its sum are then predicted to take."""

    num_chunks: int
    took_s: float


class Way(NamedTuple):
    """What is done in a step: `none`, `chunks`, `parts` or `sequence`; and why. num_parts: of its tokens."""

    name: str
    reason: str
    num_parts: int = 1


class Overlap:
    """The decision for the steps of a rank. Every rank of a group decides alike, since they agree on the rates.

    asked: `auto`, or the way to be taken by all steps of `2 * LEAST_TOKENS` tokens and more.
    """

    def __init__(self, asked: str = "auto", work: StageWork | None = None, rates: Rates | None = None) -> None:
        self._asked = asked
        self._work = work
        self._rates = rates
        self._scattered_from: int | None = None

    def way(self, num_tokens: int) -> Way:
        if num_tokens < 2 * LEAST_TOKENS:
            return Way("none", f"steps of fewer than {2 * LEAST_TOKENS} tokens have nothing to hide behind")
        if self._asked != "auto":
            return Way(self._asked, "comm.overlap says so", 2 if self._asked == "parts" else 1)
        if self._work is None:
            return Way("none", "nothing was measured")
        return choose_way(num_tokens, self._work, self._rates, self._scattered_from)

    def cut(self, num_tokens: int, weight: Weight) -> int:
        """Chunks of a product of so many tokens with a weight [H, I], where a step is one of chunks."""
        if self._asked == "chunks":
            return ASKED_CHUNKS
        assert self._rates is not None, "chunks are chosen by rates"
        return choose_cut(num_tokens, *weight.shape, weight.itemsize, self._rates).num_chunks

    def stream(self, x_TH: torch.Tensor, norm: torch.Tensor, eps: float, comm: Communicator) -> ResidualStream:
        """Of all tokens of a step that is not done in parts. x_TH, norm, eps: as for any `ResidualStream`."""
        num_tokens = len(x_TH)

        def num_chunks(out: RowParallelLinear) -> int:
            return self.cut(num_tokens, out.weight)

        name = self.way(num_tokens).name
        if name == "chunks":
            return ChunkedStream(x_TH, norm, eps, num_chunks)
        if name == "sequence":
            return ScatteredStream(x_TH, norm, eps, comm)
        return WholeStream(x_TH, norm, eps)

    def measure(self, comm: Communicator, work: StageWork, weight: Weight, norm: torch.Tensor, most_tokens: int) -> str:
        """Finds the rates, on all ranks of the group at once; what is done in a step of `most_tokens` tokens, and why.

        weight: [H, I] of a row-parallel product. norm: [H].
        """
        if self._asked == "auto" and most_tokens >= 2 * LEAST_TOKENS:
            self._work = work
            if comm.in_background:
                self._rates = measure_rates(comm, weight, most_tokens)
            self._scattered_from = find_scattering(comm, norm, weight, most_tokens)
        way = self.way(most_tokens)
        return f"{way.name} at {most_tokens} tokens: {way.reason}"


@lru_cache(maxsize=4096)
def choose_way(num_tokens: int, work: StageWork, rates: Rates | None, scattered_from: int | None) -> Way:
    """rates: None where transfers do not go on by themselves. scattered_from: tokens from which on reduce-scatter, norm
    and all-gather were measured to be faster than all-reduce and norm; None for never.
    """
    told = "transfers take the same cores as the products"
    if rates is not None:
        compute_s, transfer_s, serial_s = serial_times(num_tokens, work, rates)
        predicted = {("chunks", 1): chunks_s(num_tokens, work, rates)} | {
            ("parts", parts): parts_s(num_tokens, work, rates, parts)
            for parts in PARTS
            if num_tokens // parts >= LEAST_TOKENS
        }
        name, num_parts = best = min(predicted, key=lambda way: predicted[way])
        told = f"{compute_s * 1e3:.3g} ms of computing and {transfer_s * 1e3:.3g} ms of transfers"
        if rates.contention > 0.01:
            told += f", {rates.contention:.0%} of what is hidden lost again to cores and memory that both want,"
        if predicted[best] <= WORTH * serial_s:
            how = f" in {num_parts} parts" if name == "parts" else ""
            told += f" take {predicted[best] * 1e3:.3g} ms{how} in place of {serial_s * 1e3:.3g}"
            return Way(name, told, num_parts)
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


def chunks_s(num_tokens: int, work: StageWork, rates: Rates) -> float:
    """Of a step whose row-parallel products are cut."""
    took_s = 0.0
    for elements, num_inputs in ((work.attention, work.attention_inputs), (work.ffn, work.ffn_inputs)):
        before = elements - work.hidden * num_inputs
        took_s += rates.compute_s(num_tokens, before)
        took_s += choose_cut(num_tokens, work.hidden, num_inputs, work.itemsize, rates).took_s
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


@lru_cache(maxsize=4096)
def choose_cut(num_tokens: int, num_outputs: int, num_inputs: int, itemsize: int, rates: Rates) -> Cut:
    """Chunks of a product of `num_tokens` tokens with a weight [num_outputs, num_inputs] that is then summed over the
    ranks, itemsize bytes a value.
    """
    compute_s = rates.compute_s(num_tokens, num_outputs * num_inputs)
    transfer_s = rates.transfer_s(num_tokens, num_outputs, itemsize)
    serial_s = compute_s + transfer_s + rates.latency_s
    best = Cut(1, serial_s)
    chunks = 2
    while chunks <= MOST_CHUNKS and num_tokens // chunks >= LEAST_TOKENS:
        took_s = rates.chunked_s(compute_s, transfer_s, chunks)
        if took_s < best.took_s:
            best = Cut(chunks, took_s)
        chunks *= 2
    return best if best.took_s <= WORTH * serial_s else Cut(1, serial_s)
