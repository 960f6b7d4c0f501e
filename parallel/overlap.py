"""How much of a row-parallel product is reduced behind the rest of it: one decision, from measured rates.

A product of T tokens is cut into k chunks of tokens, and the sum of one chunk over the ranks is under way while the
next chunk is computed. With C seconds of computing and X of transfer that takes at best max(C, X) + min(C, X) / k, and
each chunk pays the transfer's latency once more. What the two take of each other, cores or memory, is measured too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import Weight, linear

MOST_CHUNKS = 8
LEAST_TOKENS = 32  # of a chunk: products of fewer are slower for each token
WORTH = 0.92  # what the predicted time must fall to: chunks are slower than they should be, and predictions too rosy
REPEATS, SHORT_REPEATS = 3, 20  # the least of which counts; of what takes no time to speak of, the more
TRIAL_S = 0.05  # that a product and its sum may take, where both ways are tried


class Rates(NamedTuple):
    """Of a rank and its group. flops_per_s: of products. latency_s, bytes_per_s: of sums over the ranks. contention: by
    how many seconds all takes longer for each that one of the two passes under the other.
    """

    flops_per_s: float
    latency_s: float
    bytes_per_s: float
    contention: float = 0.0

    def compute_s(self, num_tokens: int, num_outputs: int, num_inputs: int) -> float:
        return 2 * num_tokens * num_outputs * num_inputs / self.flops_per_s

    def transfer_s(self, num_tokens: int, num_outputs: int, itemsize: int) -> float:
        """Without the latency."""
        return num_tokens * num_outputs * itemsize / self.bytes_per_s

    def overlapped_s(self, compute_s: float, transfer_s: float, num_chunks: int) -> float:
        # Latencies of chunks are behind computing where there is enough of it, which is not counted on.
        hidden_s = min(compute_s, transfer_s)
        ideal_s = max(compute_s, transfer_s) + hidden_s / num_chunks + num_chunks * self.latency_s
        return ideal_s + self.contention * hidden_s


class Cut(NamedTuple):
    """Into how many chunks a product is cut, and why."""

    num_chunks: int
    reason: str


class Overlap:
    """The decision for all products of a rank. Every rank of a group decides alike, since they agree on the rates."""

    def __init__(self) -> None:
        self.rates: Rates | None = None

    def cut(self, num_tokens: int, weight: Weight) -> int:
        """Chunks of a product of so many tokens with a weight [H, I]."""
        if self.rates is None or num_tokens < 2 * LEAST_TOKENS:
            return 1
        return choose_cut(num_tokens, *weight.shape, weight.itemsize, self.rates).num_chunks

    def measure(self, comm: Communicator, weight: Weight, num_tokens: int) -> str:
        """Finds the rates, on all ranks of the group at once, by the product of so many tokens with a weight [H, I];
        what was decided for it, and why.
        """
        if comm.size == 1:
            return "none: there is nobody to wait for"
        if not comm.in_background:
            return f"none: transfers of {comm.backend} take the same cores as the products"
        if num_tokens < 2 * LEAST_TOKENS:
            return f"none: a step has at most {num_tokens} tokens"
        self.rates = measure_rates(comm, weight, num_tokens)
        chosen = choose_cut(num_tokens, *weight.shape, weight.itemsize, self.rates)
        return f"{chosen.num_chunks} chunks at {num_tokens} tokens: {chosen.reason}"


@lru_cache(maxsize=1024)
def choose_cut(num_tokens: int, num_outputs: int, num_inputs: int, itemsize: int, rates: Rates) -> Cut:
    """Chunks of a product of `num_tokens` tokens with a weight [num_outputs, num_inputs] that is then summed over the
    ranks, itemsize bytes a value.
    """
    compute_s = rates.compute_s(num_tokens, num_outputs, num_inputs)
    transfer_s = rates.transfer_s(num_tokens, num_outputs, itemsize)
    serial_s = compute_s + transfer_s + rates.latency_s
    best, best_s = 1, serial_s
    chunks = 2
    while chunks <= MOST_CHUNKS and num_tokens // chunks >= LEAST_TOKENS:
        took_s = rates.overlapped_s(compute_s, transfer_s, chunks)
        if took_s < best_s:
            best, best_s = chunks, took_s
        chunks *= 2
    told = f"{compute_s * 1e3:.2f} ms of product and {transfer_s * 1e3:.2f} ms of transfer"
    if rates.contention > 0.01:
        told += f", {rates.contention:.0%} of what is hidden lost again to cores and memory that both want,"
    if best_s > WORTH * serial_s:
        return Cut(1, f"{told} would gain {max(0.0, 1 - best_s / serial_s):.0%}, too little")
    return Cut(best, f"{told} take {best_s * 1e3:.2f} ms in place of {serial_s * 1e3:.2f}")


def measure_rates(comm: Communicator, weight: Weight, num_tokens: int) -> Rates:
    """The rates that the slowest rank sees, the same on all. A collective call."""
    x = torch.ones(num_tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    small, large = (
        torch.zeros(rows, weight.shape[0], dtype=weight.dtype, device=weight.device) for rows in (1, num_tokens)
    )
    comm.all_reduce(large)  # connections and buffers are made at the first use
    product_s = _least_s(lambda: linear(x, weight))
    latency_s = _least_s(lambda: comm.all_reduce(small), SHORT_REPEATS)
    transfer_s = _least_s(lambda: comm.all_reduce(large))
    times = torch.tensor([product_s, latency_s, transfer_s], dtype=torch.float64, device=weight.device)
    product_s, latency_s, transfer_s = comm.all_reduce(times, op="max").tolist()
    bandwidth_s = max(transfer_s - latency_s, 1e-9)
    rates = Rates(2 * num_tokens * weight.numel() / product_s, latency_s, large.nbytes / bandwidth_s)
    return rates._replace(contention=_measure_contention(comm, x, weight, rates))


def _measure_contention(comm: Communicator, x: torch.Tensor, weight: Weight, rates: Rates) -> float:
    """From the better of a few trials, with as many of the tokens `x` as take no longer than `TRIAL_S`."""
    num_tokens, shape = len(x), tuple(weight.shape)
    while True:
        compute_s = rates.compute_s(num_tokens, *shape)
        transfer_s = rates.transfer_s(num_tokens, shape[0], weight.itemsize)
        if compute_s + transfer_s <= TRIAL_S or num_tokens < 4 * LEAST_TOKENS:
            break
        num_tokens //= 2
    num_chunks = choose_cut(num_tokens, *shape, weight.itemsize, rates).num_chunks
    if num_chunks == 1:
        return 0.0
    part = x[:num_tokens]
    took = torch.tensor([_least_s(lambda: reduce_in_chunks(comm, part, weight, num_chunks))], dtype=torch.float64)
    took_s = comm.all_reduce(took.to(weight.device), op="max").item()
    ideal_s = rates.overlapped_s(compute_s, transfer_s, num_chunks)
    return max(0.0, took_s - ideal_s) / min(compute_s, transfer_s)


def reduce_in_chunks(comm: Communicator, x_TI: torch.Tensor, weight: Weight, num_chunks: int) -> torch.Tensor:
    """The product [T, H] of x and a weight [H, I], summed over the ranks, each chunk of tokens behind the next one."""
    parts = x_TI.tensor_split(num_chunks)
    under_way = [comm.all_reduce(linear(part, weight), async_op=True) for part in parts]
    return torch.cat([handle.wait() for handle in under_way])


def _least_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    taken = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began_s)
    return min(taken)
