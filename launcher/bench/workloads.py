"""The workloads of the benchmarks: requests as data, the same on every machine for one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Literal, NamedTuple

from phalanx.errors import RequestError

WorkloadName = Literal["W1", "W2", "W3", "W4"]

WORKLOADS: Mapping[WorkloadName, str] = {
    "W1": "1 request: a prompt of 64 tokens, 128 new",
    "W2": "32 requests: prompts of 16 to 256 tokens, 64 new each",
    "W3": "8 requests: prompts of 1024 tokens, 1 new each",
    "W4": "requests that arrive at random (Poisson), prompts and outputs of log-normal lengths",
}

# Ids below are often control tokens, those from the second on often rare or added ones.
_FIRST_ID, _END_OF_IDS = 1_000, 40_000


class RequestShape(NamedTuple):
    """What a request asks of an engine. prompt: token ids. arrival_s: seconds after the start of the workload."""

    prompt: tuple[int, ...]
    max_tokens: int
    arrival_s: float = 0.0


class LengthDistribution(NamedTuple):
    """Log-normal lengths in tokens, clipped to `least` ... `most`. sigma: standard deviation of the logarithm."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        length = round(source.lognormvariate(math.log(self.median), self.sigma))
        return min(max(length, self.least), self.most)


PROMPT_TOKENS = LengthDistribution(median=128, sigma=0.8, least=8, most=1024)
OUTPUT_TOKENS = LengthDistribution(median=64, sigma=0.6, least=4, most=256)


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """W4: requests arrive at `rate_per_s` on average, whether or not earlier ones have been served.

    Raises RequestError where no requests can be drawn from it.
    """

    rate_per_s: float = 1.0
    num_requests: int = 64
    prompt_tokens: LengthDistribution = PROMPT_TOKENS
    output_tokens: LengthDistribution = OUTPUT_TOKENS

    def __post_init__(self) -> None:
        if not (0 < self.rate_per_s < math.inf and self.num_requests >= 1):
            raise RequestError(
                f"{self.num_requests} requests at {self.rate_per_s} a second are no workload; give at least 1 request"
                " and a rate above 0"
            )
        for what, lengths in (("prompt_tokens", self.prompt_tokens), ("output_tokens", self.output_tokens)):
            if not (1 <= lengths.least <= lengths.most and lengths.median > 0 and lengths.sigma >= 0):
                raise RequestError(f"{what}: {lengths}; give 1 <= least <= most, a median above 0 and sigma >= 0")


def workload(
    name: WorkloadName, *, vocab_size: int, seed: int = 0, open_loop: OpenLoop | None = None
) -> list[RequestShape]:
    """The requests of a workload, in order of arrival, as WORKLOADS describes them.

    vocab_size: ids of the prompts are below it. open_loop: rate and lengths of W4, its defaults where None; the other
    workloads are fixed. Raises RequestError for an unknown name.
    """

    def source(purpose: str) -> random.Random:
        # One for each purpose, so that another rate or output length leaves the prompts as they are. A text as seed
        # is hashed by SHA-512 and means the same in every process.
        return random.Random(f"{name} {seed} {purpose}")

    prompt_lengths = source("prompt lengths")
    arrivals_s: Iterable[float] = repeat(0.0)
    match name:
        case "W1":
            lengths = [(64, 128)]
        case "W2":
            lengths = [(prompt_lengths.randint(16, 256), 64) for _ in range(32)]
        case "W3":
            lengths = [(1024, 1)] * 8
        case "W4":
            wanted, output_lengths, gaps = open_loop or OpenLoop(), source("output lengths"), source("gaps")
            numbers = range(wanted.num_requests)
            lengths = [
                (wanted.prompt_tokens.draw(prompt_lengths), wanted.output_tokens.draw(output_lengths)) for _ in numbers
            ]
            # The times between the events of a Poisson process are exponential.
            arrivals_s = accumulate(gaps.expovariate(wanted.rate_per_s) for _ in numbers)
        case _:
            raise RequestError(f"{name!r} is no workload; known: {', '.join(WORKLOADS)}")
    end = min(_END_OF_IDS, vocab_size)
    ids, token_ids = source("ids"), range(min(_FIRST_ID, end // 2), end)
    return [
        RequestShape(tuple(ids.choices(token_ids, k=num_tokens)), max_tokens, arrival_s)
        for (num_tokens, max_tokens), arrival_s in zip(lengths, arrivals_s, strict=False)
    ]
