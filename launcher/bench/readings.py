"""What a round of a workload brought, as its callers and its stages saw it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from phalanx.engine.messages import StageStep
from phalanx.launcher.comm_view import CommUse
from phalanx.launcher.trace import TracedRun


class RequestReading(NamedTuple):
    """Seconds after the start of the round. arrival_s: when the request was due, whether or not it was sent by then.
    token_s: when its caller had each of the new tokens.
    """

    num_prompt_tokens: int
    arrival_s: float
    token_s: tuple[float, ...]

    @property
    def time_to_first_token_s(self) -> float:
        return self.token_s[0] - self.arrival_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """The times between tokens."""
        return tuple(later - earlier for earlier, later in pairwise(self.token_s))

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean of the tokens after the first; None where there are none."""
        num_gaps = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / num_gaps if num_gaps else None


class LatencyLimits(NamedTuple):
    """What a request must not exceed to count as served well."""

    time_to_first_token_s: float
    time_per_output_token_s: float

    def met_by(self, request: RequestReading) -> bool:
        return (
            request.time_to_first_token_s <= self.time_to_first_token_s
            and (request.time_per_output_token_s or 0.0) <= self.time_per_output_token_s
        )


@dataclass(frozen=True, slots=True)
class Round:
    """requests: one a request of the workload, in order. stages: by replica and stage, the steps of this round.
    cached_tokens: tokens of prompts that the prefix cache held. steps, preemptions: of all replicas. comm: what
    transfers took, by replica; empty where a replica is one rank. trace: of the last round, where ranks trace.
    """

    requests: tuple[RequestReading, ...]
    stages: tuple[tuple[tuple[StageStep, ...], ...], ...]
    cached_tokens: int
    preemptions: int
    steps: int
    comm: tuple[CommUse, ...] = ()
    trace: TracedRun | None = None

    @property
    def elapsed_s(self) -> float:
        """From the start to the last token."""
        return max(request.token_s[-1] for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(len(request.token_s) for request in self.requests)
