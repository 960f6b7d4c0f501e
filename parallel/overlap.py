"""How much of a row-parallel product is reduced behind the rest of it: one decision, from measured rates.

A product of T tokens is cut into k chunks of tokens, and the sum of one chunk over the ranks is under way while the
next chunk is computed. With C seconds of computing and X of transfer that takes at best max(C, X) + min(C, X) / k, and
each chunk pays the transfer's latency once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import linear

MOST_CHUNKS = 8
LEAST_TOKENS = 32  # of a chunk: products of fewer are slower for each token
WORTH = 0.92  # what the predicted time must fall to: chunks are slower than they should be, and predictions too rosy
REPEATS = 3


class Rates(NamedTuple):
    """Of a rank and its group. flops_per_s: of products. latency_s, bytes_per_s: of sums over the ranks."""

    flops_per_s: float
    latency_s: float
    bytes_per_s: float


class Cut(NamedTuple):
    """Into how many chunks a product is cut, and why."""

    num_chunks: int
    reason: str


class Overlap:
    """The decision for all products of a rank. Every rank of a group decides alike, since they agree on the rates."""

    def __init__(self) -> None:
        self.rates: Rates | None = None

    def cut(self, num_tokens: int, weight: torch.Tensor) -> int:
        """Chunks of a product of so many tokens with a weight [H, I]."""
        if self.rates is None or num_tokens < 2 * LEAST_TOKENS:
            return 1
        return choose_cut(num_tokens, *weight.shape, weight.itemsize, self.rates).num_chunks

    def measure(self, comm: Communicator, weight: torch.Tensor, num_tokens: int) -> str:
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
    compute_s = 2 * num_tokens * num_outputs * num_inputs / rates.flops_per_s
    transfer_s = num_tokens * num_outputs * itemsize / rates.bytes_per_s
    serial_s = compute_s + transfer_s + rates.latency_s
    best, best_s = 1, serial_s
    chunks = 2
    while chunks <= MOST_CHUNKS and num_tokens // chunks >= LEAST_TOKENS:
        # Latencies of chunks are behind computing where there is enough of it, which is not counted on.
        took_s = max(compute_s, transfer_s) + min(compute_s, transfer_s) / chunks + chunks * rates.latency_s
        if took_s < best_s:
            best, best_s = chunks, took_s
        chunks *= 2
    told = f"{compute_s * 1e3:.2f} ms of product and {transfer_s * 1e3:.2f} ms of transfer"
    if best_s > WORTH * serial_s:
        return Cut(1, f"{told} would gain {max(0.0, 1 - best_s / serial_s):.0%}, too little")
    return Cut(best, f"{told} take {best_s * 1e3:.2f} ms in place of {serial_s * 1e3:.2f}")


def measure_rates(comm: Communicator, weight: torch.Tensor, num_tokens: int) -> Rates:
    """The rates that the slowest rank sees, the same on all. A collective call."""
    x = torch.ones(num_tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    small, large = (
        torch.zeros(rows, weight.shape[0], dtype=weight.dtype, device=weight.device) for rows in (1, num_tokens)
    )
    comm.all_reduce(large)  # connections and buffers are made at the first use
    product_s = _least_s(lambda: linear(x, weight))
    latency_s = _least_s(lambda: comm.all_reduce(small))
    transfer_s = _least_s(lambda: comm.all_reduce(large))
    times = torch.tensor([product_s, latency_s, transfer_s], dtype=torch.float64, device=weight.device)
    product_s, latency_s, transfer_s = comm.all_reduce(times, op="max").tolist()
    bandwidth_s = max(transfer_s - latency_s, 1e-9)
    return Rates(2 * num_tokens * weight.numel() / product_s, latency_s, large.nbytes / bandwidth_s)


def _least_s(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began_s)
    return min(taken)
