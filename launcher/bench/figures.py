"""The figures that are read off a round, and which of them a workload is about."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from phalanx.launcher.bench.readings import LatencyLimits, RequestReading, Round
from phalanx.launcher.bench.workloads import WorkloadName


class Figure(NamedTuple):
    """title: with the unit that it is shown in. scale: from its own unit, which its name says, to that. digits: shown.
    read: None where a round says nothing of it, such as the time between tokens where there is one.
    """

    title: str
    scale: float
    digits: int
    read: Callable[[Round, LatencyLimits], float | None]


class Spread(NamedTuple):
    """A figure over rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Spread | None:
        """None where no round says anything."""
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Between the values on either side in proportion; None of no values."""
    return float(np.percentile(values, percent)) if values else None


def num_within(requests: Iterable[RequestReading], limits: LatencyLimits) -> int:
    """Requests that meet both limits."""
    return sum(limits.met_by(request) for request in requests)


def _first_token(percent: float) -> Callable[[Round, LatencyLimits], float | None]:
    return lambda taken, _: percentile([request.time_to_first_token_s for request in taken.requests], percent)


def _per_token(percent: float) -> Callable[[Round, LatencyLimits], float | None]:
    def read(taken: Round, limits: LatencyLimits) -> float | None:
        means = (request.time_per_output_token_s for request in taken.requests)
        return percentile([mean for mean in means if mean is not None], percent)

    return read


def _gap(percent: float) -> Callable[[Round, LatencyLimits], float | None]:
    return lambda taken, _: percentile([gap for request in taken.requests for gap in request.gaps_s], percent)


FIGURES: Mapping[str, Figure] = {
    "time_to_first_token_s": Figure("time to first token, ms", 1e3, 1, _first_token(50)),
    "time_per_output_token_s": Figure("time per output token, ms", 1e3, 2, _per_token(50)),
    "output_tokens_per_s": Figure("output tokens/s", 1, 1, lambda taken, _: taken.output_tokens / taken.elapsed_s),
    "total_tokens_per_s": Figure(
        "prompt and output tokens/s",
        1,
        1,
        lambda taken, _: (taken.prompt_tokens + taken.output_tokens) / taken.elapsed_s,
    ),
    "prompt_tokens_per_s": Figure("prompt tokens/s", 1, 1, lambda taken, _: taken.prompt_tokens / taken.elapsed_s),
    "time_to_first_token_p50_s": Figure("time to first token, p50, ms", 1e3, 1, _first_token(50)),
    "time_to_first_token_p99_s": Figure("time to first token, p99, ms", 1e3, 1, _first_token(99)),
    "time_between_tokens_p50_s": Figure("time between tokens, p50, ms", 1e3, 2, _gap(50)),
    "time_between_tokens_p99_s": Figure("time between tokens, p99, ms", 1e3, 2, _gap(99)),
    "time_per_output_token_p50_s": Figure("mean of a request's, p50, ms", 1e3, 2, _per_token(50)),
    "time_per_output_token_p99_s": Figure("mean of a request's, p99, ms", 1e3, 2, _per_token(99)),
    "requests_per_s": Figure("requests/s", 1, 2, lambda taken, _: len(taken.requests) / taken.elapsed_s),
    "goodput_per_s": Figure(
        "goodput, requests/s", 1, 2, lambda taken, limits: num_within(taken.requests, limits) / taken.elapsed_s
    ),
    "share_within_limits": Figure(
        "requests within limits, %",
        100,
        1,
        lambda taken, limits: num_within(taken.requests, limits) / len(taken.requests),
    ),
}

FIGURES_OF: Mapping[WorkloadName, tuple[str, ...]] = {
    "W1": ("time_to_first_token_s", "time_per_output_token_s"),
    "W2": ("output_tokens_per_s", "total_tokens_per_s"),
    "W3": ("prompt_tokens_per_s",),
    "W4": (
        "time_to_first_token_p50_s",
        "time_to_first_token_p99_s",
        "time_between_tokens_p50_s",
        "time_between_tokens_p99_s",
        "time_per_output_token_p50_s",
        "time_per_output_token_p99_s",
        "requests_per_s",
        "goodput_per_s",
        "share_within_limits",
    ),
}


def read_figures(name: WorkloadName, taken: Round, limits: LatencyLimits) -> dict[str, float | None]:
    """What a round of this workload says, by name, in the units that the names say."""
    return {figure: FIGURES[figure].read(taken, limits) for figure in FIGURES_OF[name]}
