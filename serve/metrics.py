"""What the server tells Prometheus: of requests, as they go by, and of the engines, as they are when it is asked."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import accumulate
from operator import add, attrgetter
from typing import Literal, NamedTuple, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.utils import floatToGoString

from phalanx import __version__
from phalanx.engine.comm_book import RankTotals
from phalanx.engine.request import FinishReason
from phalanx.engine.stats import EngineStats

Labels = tuple[str, ...]
Ending = FinishReason | Literal["tool_calls"]
Refusal = Literal[
    "invalid",
    "unauthorized",
    "not_found",
    "too_large",
    "queue_full",
    "timeout",
    "stalled",
    "draining",
    "engine_failed",
    "server_error",
]

OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_TYPE = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"  # paths that are no labels


def decades(first: int, last: int, steps: Sequence[str] = ("1", "1.5", "2", "3", "5", "7")) -> tuple[float, ...]:
    """Bounds of buckets: the steps in each decade from 10**first on, and 10**last."""
    return (*(float(f"{step}e{power}") for power in range(first, last) for step in steps), 10.0**last)


# A quantile is interpolated within its bucket: with bounds at most 1.7 times apart it is wrong by no more than that.
# The limits that services promise (20 ms, 50 ms, 200 ms, 1 s, ...) are bounds, so that shares within them are exact.
FIRST_TOKEN_S = decades(-3, 2)  # a kept prefix on an idle engine takes milliseconds; a long queue most of a minute
BETWEEN_TOKENS_S = decades(-3, 1)  # a small model on a GPU takes 1 ms a step; a step delayed by prefills, seconds
REQUEST_S = decades(-2, 3)  # thousands of tokens at 100 ms each are minutes
HTTP_S = decades(-3, 3, ("1", "3"))  # coarse, since there is a histogram for each endpoint
TOKENS = tuple(float(2**power) for power in range(21))  # to the longest contexts there are, a million tokens


class _Reading(NamedTuple):
    """A metric of a replica that is a field of `EngineStats`."""

    field: str
    name: str
    help: str


GAUGES = (
    _Reading("running", "phalanx_sequences_running", "Sequences that run now; a request has n of them."),
    _Reading("waiting", "phalanx_sequences_waiting", "Sequences that wait for a slot or for pages now."),
    _Reading("pages", "phalanx_kv_pages", "Pages of the KV cache."),
    _Reading("pages_used", "phalanx_kv_pages_used", "Pages that running sequences use now."),
    _Reading("pages_kept", "phalanx_kv_pages_kept", "Pages that hold prefixes which no running sequence uses now."),
)
COUNTERS = (
    _Reading("requests", "phalanx_engine_requests", "Prompts that an engine took in."),
    _Reading("finished", "phalanx_engine_requests_finished", "Prompts that an engine finished."),
    _Reading("aborted", "phalanx_engine_requests_aborted", "Prompts that were ended early."),
    _Reading("prompt_tokens", "phalanx_prompt_tokens", "Prompt tokens in: of the sequences that began to run."),
    _Reading("prompt_tokens_cached", "phalanx_prompt_tokens_cached", "Those of them found in the prefix cache."),
    _Reading("output_tokens", "phalanx_output_tokens", "Tokens out."),
    _Reading("preemptions", "phalanx_preemptions", "Sequences that gave their pages to others and began anew."),
    _Reading("steps", "phalanx_steps", "Steps that an engine planned."),
)
_counters_of = attrgetter(*(reading.field for reading in COUNTERS))


class Histogram:
    """Counts values by bucket. A value on a bound belongs to the bucket below it. Used from one thread, read by any.

    prometheus_client's takes a lock, searches its buckets one by one, and counts one value a call: 0.8 us for 30 ms
    among these buckets, where this takes 0.2 us.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """How many values were at most so large, for each bound, as Prometheus writes it."""
        labels: list[str] = [floatToGoString(bound) for bound in (*self.bounds, float("inf"))]  # type: ignore[no-untyped-call]
        return list(zip(labels, accumulate(self.counts), strict=True))


class _Totals:
    """The counters of a replica, which go on where they were when it comes back at zero."""

    def __init__(self) -> None:
        self._last = self._before = (0,) * len(COUNTERS)

    def after(self, stats: EngineStats) -> tuple[int, ...]:
        now = _counters_of(stats)
        if any(new < old for new, old in zip(now, self._last, strict=True)):  # one fell: all began anew
            self._before = tuple(map(add, self._before, self._last))
        self._last = now
        return tuple(map(add, self._before, now))


class Metrics:
    """All metrics of a server, in a registry of their own. Observed from one thread, exposed from any.

    replica_stats: what each replica does now, the same replica always in the same place. is_healthy: whether a token
    could be produced now. endpoints: the paths that may be labels; all others are counted together, since a client may
    ask for any number of them. comm_totals: by replica, what its ranks' transfers took.
    """

    def __init__(
        self,
        replica_stats: Callable[[], Sequence[EngineStats]],
        is_healthy: Callable[[], bool],
        *,
        model_name: str,
        layout: str,
        endpoints: Collection[str],
        comm_totals: Callable[[], Sequence[RankTotals]] = tuple,
    ) -> None:
        self._replica_stats = replica_stats
        self._comm_totals = comm_totals
        self._is_healthy = is_healthy
        self._info = {"version": __version__, "model": model_name, "layout": layout}
        self._endpoints = frozenset(endpoints)
        self._first_token = Histogram(FIRST_TOKEN_S)
        self._between_tokens = Histogram(BETWEEN_TOKENS_S)
        self._per_output_token = Histogram(BETWEEN_TOKENS_S)
        self._queued = Histogram(FIRST_TOKEN_S)
        self._prompt_tokens = Histogram(TOKENS)
        self._output_tokens = Histogram(TOKENS)
        # By the values of their labels.
        self._request_s: dict[Labels, Histogram] = defaultdict(partial(Histogram, REQUEST_S))
        self._http_s: dict[Labels, Histogram] = defaultdict(partial(Histogram, HTTP_S))
        self._finished: Counter[Labels] = Counter()
        self._answered: Counter[Labels] = Counter()
        # At zero from the start: a counter that appears at one has never risen.
        self._refused: Counter[Labels] = Counter({(reason,): 0 for reason in get_args(Refusal)})
        self._num_disconnected = 0
        self._totals: list[_Totals] = []
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def first_token(self, seconds: float) -> None:
        """A request got its first token so long after it came."""
        self._first_token.observe(seconds)

    def between_tokens(self, seconds: float, num_tokens: int = 1) -> None:
        """So many tokens of a completion, at least one, came so long after those before them: an equal part each."""
        self._between_tokens.observe(seconds / num_tokens, num_tokens)

    def per_output_token(self, seconds: float) -> None:
        """A completion of several tokens took so long for each after the first, in the mean."""
        self._per_output_token.observe(seconds)

    def queued(self, seconds: float) -> None:
        """A request waited so long before it began to run."""
        self._queued.observe(seconds)

    def finished(
        self, endpoint: str, finish_reason: Ending, seconds: float, prompt_tokens: int, output_tokens: int
    ) -> None:
        """A request, one prompt with its completions, was generated to its end, in so long from when it came.

        finish_reason: of its first completion. output_tokens: of all of them.
        """
        endpoint = self._known(endpoint)
        self._finished[endpoint, finish_reason] += 1
        self._request_s[(endpoint,)].observe(seconds)
        self._prompt_tokens.observe(prompt_tokens)
        self._output_tokens.observe(output_tokens)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """A response, of any kind, was sent to its last byte, so long after its request came."""
        endpoint = self._known(endpoint)
        self._answered[endpoint, str(status)] += 1
        self._http_s[(endpoint,)].observe(seconds)

    def refused(self, reason: Refusal) -> None:
        """A request was answered with an error instead of being served."""
        self._refused[(reason,)] += 1

    def disconnected(self) -> None:
        """A client left before its response was complete."""
        self._num_disconnected += 1

    def exposition(self, accept: str | None) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header names it, else Prometheus' text format.

        prometheus_client's own choice follows versions in that header, and fails on one that is not a number.
        """
        with self._lock:
            if accept is not None and OPENMETRICS in accept.lower():
                return generate_openmetrics(self._registry), OPENMETRICS_TYPE  # type: ignore[no-untyped-call]
            return generate_latest(self._registry), TEXT_TYPE

    def collect(self) -> Iterable[Metric]:
        """All metrics now, for the registry."""
        yield InfoMetricFamily("phalanx_build", "What is served, and by which version.", self._info)
        yield GaugeMetricFamily("phalanx_healthy", "1 if a token could be produced now.", int(self._is_healthy()))
        yield from self._of_requests()
        yield from self._of_http()
        yield from self._of_replicas(self._replica_stats())
        yield from _of_transfers(self._comm_totals())

    def _of_requests(self) -> Iterable[Metric]:
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a request to its first token.", self._first_token),
            ("time_between_tokens_seconds", "From a token of a completion to the next.", self._between_tokens),
            ("time_per_output_token_seconds", "Mean of a completion's tokens after its first.", self._per_output_token),
            ("queue_time_seconds", "From a request to when it began to run.", self._queued),
            ("request_prompt_tokens", "Length of a request's prompt.", self._prompt_tokens),
            ("request_output_tokens", "Tokens of a request's completions together.", self._output_tokens),
        ):
            yield _histograms(f"phalanx_{name}", text, (), {(): histogram})
        text = "From a request to its last token."
        yield _histograms("phalanx_request_duration_seconds", text, ("endpoint",), self._request_s)
        text = "Requests that were generated to their end."
        yield _counts("phalanx_requests_finished", text, ("endpoint", "finish_reason"), self._finished)

    def _of_http(self) -> Iterable[Metric]:
        text = "Responses sent to their last byte."
        yield _counts("phalanx_http_requests", text, ("endpoint", "status"), self._answered)
        text = "From a request to the last byte of its response."
        yield _histograms("phalanx_http_request_duration_seconds", text, ("endpoint",), self._http_s)
        yield _counts("phalanx_requests_refused", "Requests that were not served.", ("reason",), self._refused)
        text = "Clients that left before their response was complete."
        yield CounterMetricFamily("phalanx_disconnects", text, self._num_disconnected)

    def _of_replicas(self, replicas: Sequence[EngineStats]) -> Iterable[Metric]:
        self._totals += [_Totals() for _ in range(len(replicas) - len(self._totals))]
        totals = [before.after(stats) for before, stats in zip(self._totals, replicas, strict=False)]
        for place, reading in enumerate(COUNTERS):
            counter = CounterMetricFamily(reading.name, reading.help, labels=("replica",))
            for replica, values in enumerate(totals):
                counter.add_metric((str(replica),), values[place])
            yield counter
        for reading in GAUGES:
            gauge = GaugeMetricFamily(reading.name, reading.help, labels=("replica",))
            for replica, stats in enumerate(replicas):
                gauge.add_metric((str(replica),), getattr(stats, reading.field))
            yield gauge
        busy = GaugeMetricFamily(
            "phalanx_stage_busy_ratio", "Share of the last seconds that a stage worked.", labels=("replica", "stage")
        )
        for replica, stats in enumerate(replicas):
            for stage, share in enumerate(stats.stage_busy):
                busy.add_metric((str(replica), str(stage)), share)
        yield busy

    def _known(self, endpoint: str) -> str:
        return endpoint if endpoint in self._endpoints else OTHER


def _of_transfers(replicas: Sequence[RankTotals]) -> Iterable[Metric]:
    labels = ("replica", "rank", "operation")
    text = "Time that a rank waited for transfers."
    exposed = CounterMetricFamily("phalanx_comm_exposed_seconds", text, labels=labels)
    text = "Time that transfers of a rank were under way behind other work."
    hidden = CounterMetricFamily("phalanx_comm_hidden_seconds", text, labels=labels)
    moved = CounterMetricFamily("phalanx_comm_bytes", "Bytes of a rank's transfers.", labels=labels)
    for replica, ranks in enumerate(replicas):
        for rank, totals in ranks.items():
            for op in sorted({each.op for each in totals}):
                mine = [each for each in totals if each.op == op]
                values = str(replica), str(rank), op
                exposed.add_metric(values, sum(each.exposed_us for each in mine) / 1e6)
                hidden.add_metric(values, sum(each.hidden_us for each in mine) / 1e6)
                moved.add_metric(values, sum(each.num_bytes for each in mine))
    return exposed, hidden, moved


def _counts(name: str, text: str, labels: Sequence[str], counts: Counter[Labels]) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in counts.copy().items():
        family.add_metric(values, count)
    return family


def _histograms(name: str, text: str, labels: Sequence[str], histograms: dict[Labels, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, histogram in histograms.copy().items():
        family.add_metric(values, histogram.buckets(), histogram.total)
    return family
