"""What was measured at one rate, and whether the server kept up with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from phalanx.launcher.bench.figures import num_within, percentile
from phalanx.launcher.bench.readings import LatencyLimits, RequestReading
from phalanx.launcher.bench.workloads import RequestShape
from phalanx.serve.bench.client import Answer, Failure
from phalanx.serve.bench.sse import Usage

KEEPS_UP = 0.9
KNEE = (
    f"the highest rate measured at which requests are completed at no less than {KEEPS_UP:.0%} of the rate at which "
    f"they arrive, and no fewer than {KEEPS_UP:.0%} of them within the limits"
)
# What is late or slow in the client itself is charged to the server: up to this it does not matter.
LATE_S, LATE_SHARE, BUSY_SHARE = 0.005, 0.1, 0.8


class HttpReading(NamedTuple):
    """Of one request, in seconds after the start of the point. arrival_s: when it was due; sent_s: when the client came
    to send it. served: None of a failure; its tokens are as many as the server counts.
    """

    arrival_s: float
    sent_s: float
    num_asked: int
    served: RequestReading | None
    failure: Failure | None

    @property
    def late_s(self) -> float:
        """How far the client itself was behind. What is measured includes it."""
        return self.sent_s - self.arrival_s


def read_answer(answer: Answer, shape: RequestShape, *, began_s: float, sent_s: float) -> HttpReading:
    """began_s, sent_s: by the clock of the answer's chunks."""
    served = None
    if answer.failure is None:
        usage, times = answer.usage or Usage(), [when_s - began_s for when_s in answer.chunk_s]
        token_s = token_times(times, usage.completion_tokens or len(times))
        served = RequestReading(usage.prompt_tokens or len(shape.prompt), shape.arrival_s, tuple(token_s))
    return HttpReading(shape.arrival_s, sent_s - began_s, shape.max_tokens, served, answer.failure)


def token_times(chunk_s: Sequence[float], num_tokens: int) -> list[float]:
    """A time for each token. Which chunks had several is not known: the last one gets what is over. Where there are
    more chunks than tokens, the last chunk is that of the last token.
    """
    over = num_tokens - len(chunk_s)
    if over < 0:
        return [*chunk_s[: num_tokens - 1], chunk_s[-1]]
    return [*chunk_s, *[chunk_s[-1]] * over]


class ClientCost(NamedTuple):
    """cpu_s: of the load generator, over elapsed_s. num_chunks: with output, that it read."""

    elapsed_s: float
    cpu_s: float
    num_chunks: int

    @property
    def cpu_share(self) -> float:
        """Of one core: more than one it cannot use."""
        return self.cpu_s / self.elapsed_s


@dataclass(frozen=True, slots=True)
class Point:
    """One rate. readings: of all requests that came to an end, in order of arrival. num_planned: requests to be sent;
    there are fewer readings where the measuring was interrupted. drained: whether the server was idle again afterwards.
    """

    rate_per_s: float
    num_planned: int
    readings: tuple[HttpReading, ...]
    client: ClientCost
    drained: bool = True

    @property
    def served(self) -> tuple[RequestReading, ...]:
        return tuple(reading.served for reading in self.readings if reading.served is not None)

    @property
    def interrupted(self) -> bool:
        return len(self.readings) < self.num_planned

    @property
    def failures(self) -> dict[str, list[Failure]]:
        """By kind, those that happened most first."""
        kinds: dict[str, list[Failure]] = {}
        for reading in self.readings:
            if reading.failure is not None:
                kinds.setdefault(reading.failure.kind, []).append(reading.failure)
        return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))


class _Middle(NamedTuple):
    """Of sorted times: what lies between the first and the last tenth, neither ramp nor tail."""

    from_s: float
    until_s: float
    num: int  # in (from_s, until_s], where no two are equal

    @property
    def per_s(self) -> float:
        return self.num / (self.until_s - self.from_s)


def _middle(times_s: Sequence[float]) -> _Middle | None:
    """None where the times say nothing of a rate: fewer than two, or all the same."""
    ordered = sorted(times_s)
    first = len(ordered) // 10
    last = len(ordered) - 1 - first
    if last <= first or ordered[first] == ordered[last]:
        return None
    return _Middle(ordered[first], ordered[last], last - first)


class Figures(NamedTuple):
    """What is read off a point; None where it says nothing of a figure.

    arrived_per_s, completed_per_s: requests, each between the first and the last tenth of those events, so that neither
    the start nor the wait for the last request counts. output_tokens_per_s: tokens that came between the first and the
    last tenth of completions. goodput_per_s: the part of completed_per_s within the limits. share_within_limits: of all
    requests that were sent, failures among them. Latencies are from when a request was due.
    """

    arrived_per_s: float | None
    completed_per_s: float | None
    output_tokens_per_s: float | None
    goodput_per_s: float | None
    share_within_limits: float
    time_to_first_token_p50_s: float | None
    time_to_first_token_p99_s: float | None
    time_per_output_token_p50_s: float | None
    time_per_output_token_p99_s: float | None
    time_between_tokens_p99_s: float | None
    end_to_end_p50_s: float | None
    end_to_end_p99_s: float | None


def read_figures(point: Point, limits: LatencyLimits) -> Figures:
    """The figures of a point with at least one reading."""
    served = point.served
    arrived = _middle([reading.arrival_s for reading in point.readings])
    completed = _middle([request.token_s[-1] for request in served])
    tokens_per_s = None
    if completed is not None:
        token_s = chain.from_iterable(request.token_s for request in served)
        num_tokens = sum(completed.from_s < when_s <= completed.until_s for when_s in token_s)
        tokens_per_s = num_tokens / (completed.until_s - completed.from_s)
    num_good = num_within(served, limits)
    first = [request.time_to_first_token_s for request in served]
    means = [mean for request in served if (mean := request.time_per_output_token_s) is not None]
    gaps = list(chain.from_iterable(request.gaps_s for request in served))
    end_to_end = [request.token_s[-1] - request.arrival_s for request in served]
    return Figures(
        arrived_per_s=arrived and arrived.per_s,
        completed_per_s=completed and completed.per_s,
        output_tokens_per_s=tokens_per_s,
        goodput_per_s=completed and completed.per_s * num_good / len(served),
        share_within_limits=num_good / len(point.readings),
        time_to_first_token_p50_s=percentile(first, 50),
        time_to_first_token_p99_s=percentile(first, 99),
        time_per_output_token_p50_s=percentile(means, 50),
        time_per_output_token_p99_s=percentile(means, 99),
        time_between_tokens_p99_s=percentile(gaps, 99),
        end_to_end_p50_s=percentile(end_to_end, 50),
        end_to_end_p99_s=percentile(end_to_end, 99),
    )


def falls_behind(point: Point, limits: LatencyLimits) -> str | None:
    """In what the server did not keep up with the rate; None where it did."""
    figures = read_figures(point, limits)
    arrived, completed = figures.arrived_per_s, figures.completed_per_s
    if arrived is not None and completed is not None and completed < KEEPS_UP * arrived:
        return f"{completed:.3g} requests/s completed of {arrived:.3g} that arrived"
    if figures.share_within_limits < KEEPS_UP:
        return f"{figures.share_within_limits:.0%} of the requests within the limits"
    return None


def client_is_late(point: Point) -> str | None:
    """Why this point says as much of the load generator as of the server; None where it says nothing of it."""
    late_s = percentile([reading.late_s for reading in point.readings], 99) or 0.0
    first_s = percentile([request.time_to_first_token_s for request in point.served], 50) or 0.0
    if late_s > max(LATE_S, LATE_SHARE * first_s):
        return f"the client sent requests up to {late_s * 1e3:.0f} ms (p99) after they were due"
    if point.client.cpu_share > BUSY_SHARE:
        return f"the client was busy {point.client.cpu_share:.0%} of the time"
    return None


def notes(point: Point) -> list[str]:
    """What a reader of the figures should know."""
    found = []
    if late := client_is_late(point):
        found.append(late)
    ends_s = percentile([request.token_s[-1] - request.arrival_s for request in point.served], 50)
    span_s = point.readings[-1].arrival_s
    if ends_s is not None and len(point.readings) > 1 and span_s < 2 * ends_s:
        found.append(
            f"arrivals lasted {span_s:.3g} s and a request {ends_s:.3g} s, too short for a steady state; "
            "raise --duration"
        )
    short = sum(
        len(reading.served.token_s) < reading.num_asked for reading in point.readings if reading.served is not None
    )
    if short:
        found.append(f"{short} requests got fewer tokens than they asked for")
    if not point.drained:
        found.append("the server had still requests afterwards: the next rate began on a busy one")
    if point.interrupted:
        found.append(f"interrupted after {len(point.readings)} of {point.num_planned} requests")
    return found
