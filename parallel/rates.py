"""What a rank computes and its group transfers in a second, found at the start by doing both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import Weight, add_rms_norm, linear
from phalanx.parallel.layers import RowParallelLinear
from phalanx.parallel.stream import reduce_in_chunks

LEAST_TOKENS = 64  # of a part of a step: products of fewer are slower for each token
REPEATS, SHORT_REPEATS = 3, 20  # the least of which counts; of what takes no time to speak of, the more
TRIAL_S = 0.05  # that one trial may take
TRIAL_CHUNKS = 8
GAINED = 0.95  # what the time of a sum must fall to, to be taken for faster


class Rates(NamedTuple):
    """Of a rank and its group. flops_per_s: of products. weights_per_s: elements of weights that products can read.
    latency_s, bytes_per_s: of sums over the ranks. contention: by how many seconds all takes longer for each that one
    of the two passes under the other. source: what they are known from, where that is not the measurement at the start.
    """

    flops_per_s: float
    latency_s: float
    bytes_per_s: float
    contention: float = 0.0
    weights_per_s: float = math.inf
    source: str = ""

    def compute_s(self, num_tokens: int, num_elements: int) -> float:
        """Of products of so many tokens with weights of so many elements."""
        return max(2 * num_tokens * num_elements / self.flops_per_s, num_elements / self.weights_per_s)

    def transfer_s(self, num_tokens: int, num_outputs: int, itemsize: int) -> float:
        """Without the latency."""
        return num_tokens * num_outputs * itemsize / self.bytes_per_s

    def chunked_s(self, compute_s: float, transfer_s: float, num_chunks: int) -> float:
        """Of a product and its sum in chunks."""
        # Latencies of chunks are behind computing where there is enough of it, which is not counted on.
        hidden_s = min(compute_s, transfer_s)
        ideal_s = max(compute_s, transfer_s) + hidden_s / num_chunks + num_chunks * self.latency_s
        return ideal_s + self.contention * hidden_s


def find_trial_tokens(comm: Communicator, weight: Weight, most_tokens: int) -> int:
    """As many as are summed in `TRIAL_S`, at most `most_tokens`. A collective call."""
    num_tokens = min(LEAST_TOKENS, most_tokens)
    while True:
        x = _zeros_like_output(weight, num_tokens)
        comm.all_reduce(x)  # connections and buffers are made at the first use
        (took_s,) = _slowest(comm, _least_s(partial(comm.all_reduce, x), 1))
        if 2 * num_tokens > most_tokens or 2 * took_s > TRIAL_S:
            return num_tokens
        num_tokens *= 2


def measure_rates(comm: Communicator, weight: Weight, most_tokens: int, trial_tokens: int) -> Rates:
    """The rates that the slowest rank sees, the same on all. A collective call.

    weight: [H, I] of a row-parallel product. most_tokens: of a step. trial_tokens: see `find_trial_tokens`.
    """
    x = torch.ones(most_tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    product_s = _least_s(lambda: linear(x, weight))
    row_s = _least_s(lambda: linear(x[:1], weight))
    small = _zeros_like_output(weight, 1)
    latency_s = _least_s(lambda: comm.all_reduce(small, async_op=True).wait(), SHORT_REPEATS)
    large = _zeros_like_output(weight, trial_tokens)
    transfer_s = _least_s(lambda: comm.all_reduce(large))
    elements = math.prod(weight.shape)
    # Ranks may hold unlike parts of the weight, so that what they agree on is not the times.
    per_flop_s, latency_s, per_byte_s, per_weight_s = _slowest(
        comm,
        product_s / (2 * most_tokens * elements),
        latency_s,
        max(transfer_s - latency_s, 1e-9) / large.nbytes,
        row_s / elements,
    )
    rates = Rates(1 / per_flop_s, latency_s, 1 / per_byte_s, weights_per_s=1 / per_weight_s)
    (contention,) = _slowest(comm, _measure_contention(comm, x[:trial_tokens], weight, rates))
    return rates._replace(contention=contention)


def find_scattering(comm: Communicator, norm: torch.Tensor, weight: Weight, trial_tokens: int) -> int | None:
    """Tokens from which on reduce-scatter, addition and norm of a rank's own tokens and all-gather take less time than
    the communicator's one operation for all of it; None for never. The same on all ranks. A collective call.
    """
    found = None
    num_tokens = trial_tokens
    while num_tokens >= 2 * LEAST_TOKENS:
        x, residual = _zeros_like_output(weight, num_tokens), _zeros_like_output(weight, num_tokens)
        sizes = [num_tokens // comm.size] * (comm.size - 1)
        sizes.append(num_tokens - sum(sizes))
        shard = residual[: sizes[comm.rank]]

        def scattered(x: torch.Tensor = x, shard: torch.Tensor = shard, sizes: list[int] = sizes) -> None:
            normed, _ = add_rms_norm(comm.reduce_scatter(x, sizes=sizes), shard, norm, 1e-6)
            comm.all_gather(normed, sizes=sizes)

        def fused(x: torch.Tensor = x, residual: torch.Tensor = residual) -> None:
            comm.fused_all_reduce_rms_norm(x, residual, norm, 1e-6)

        scattered_s, fused_s = _slowest(comm, _least_s(scattered), _least_s(fused))
        if scattered_s > GAINED * fused_s:
            break
        found = num_tokens
        num_tokens //= 2
    return found


def _measure_contention(comm: Communicator, x: torch.Tensor, weight: Weight, rates: Rates) -> float:
    """From the better of a few trials of the tokens `x`."""
    num_chunks = min(TRIAL_CHUNKS, len(x) // LEAST_TOKENS)
    compute_s = rates.compute_s(len(x), math.prod(weight.shape))
    transfer_s = rates.transfer_s(len(x), weight.shape[0], weight.itemsize)
    if num_chunks < 2:
        return 0.0
    took_s = _least_s(lambda: reduce_in_chunks(RowParallelLinear(comm, weight=weight), x, num_chunks))
    ideal_s = rates.chunked_s(compute_s, transfer_s, num_chunks)
    return min(1.0, max(0.0, took_s - ideal_s) / min(compute_s, transfer_s))


def _zeros_like_output(weight: Weight, num_tokens: int) -> torch.Tensor:
    return torch.zeros(num_tokens, weight.shape[0], dtype=weight.dtype, device=weight.device)


def _slowest(comm: Communicator, *times_s: float) -> list[float]:
    """Each by the rank that it took longest."""
    found: list[float] = comm.all_reduce(
        torch.tensor(times_s, dtype=torch.float64, device=comm.device), op="max"
    ).tolist()
    return found


def _least_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    taken = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began_s)
    return min(taken)
