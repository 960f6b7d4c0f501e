"""What Prometheus reads, and the Grafana board that shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from phalanx import __version__
from phalanx.comm.ledger import CommTotals
from phalanx.engine.comm_book import RankTotals
from phalanx.engine.stats import EngineStats
from phalanx.serve.metrics import BETWEEN_TOKENS_S, COUNTERS, FIRST_TOKEN_S, TOKENS, Metrics

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/health")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
ANY_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)  # of Prometheus 3


def replica(**changes: Any) -> EngineStats:
    """A replica of two stages with a figure of its own for everything."""
    values: dict[str, Any] = dict(zip(EngineStats.__dataclass_fields__, range(11, 100), strict=False))
    return EngineStats(**values | {"stage_busy": (0.25, 0.75)} | changes)


def counting(**counts: int) -> EngineStats:
    """A replica that has counted this and nothing else."""
    return replica(**{reading.field: 0 for reading in COUNTERS} | counts)


def served(
    *replicas: EngineStats, healthy: bool = True, model_name: str = "model", endpoints: Sequence[str] = ENDPOINTS
) -> Metrics:
    return Metrics(
        lambda: replicas,
        lambda: healthy,
        model_name=model_name,
        layout="2x2",
        endpoints=endpoints,
        comm_totals=lambda: [{0: (CommTotals(0, "all_reduce", 2, 8, 5.0, 5.0),)} for _ in replicas],
    )


def busy() -> Metrics:
    """Metrics of a server to which all has happened that they know of."""
    metrics = served(replica(), replica())
    metrics.first_token(0.2)
    metrics.between_tokens(0.03)
    metrics.per_output_token(0.03)
    metrics.queued(0.1)
    metrics.finished("/v1/completions", "stop", 1.0, 10, 20)
    metrics.answered("/v1/completions", 200, 1.0)
    metrics.refused("queue_full")
    metrics.disconnected()
    return metrics


def families(metrics: Metrics, accept: str | None = None) -> dict[str, Metric]:
    """As a reader of the exposition finds them."""
    body, _ = metrics.exposition(accept)
    parse = parse_openmetrics if accept == OPENMETRICS else parse_text
    return {family.name: family for family in parse(body.decode())}


def samples(metrics: Metrics) -> list[Sample]:
    return [sample for family in metrics.collect() for sample in family.samples]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """Of the one sample of this name that has these labels and no others."""
    (found,) = (sample for sample in samples(metrics) if sample.name == name and sample.labels == labels)
    return found.value


def labels_of(metrics: Metrics, name: str) -> list[dict[str, str]]:
    return [sample.labels for sample in samples(metrics) if sample.name == name]


def assert_histogram(metrics: Metrics, name: str, values: Iterable[float], bounds: Sequence[float]) -> None:
    """The counts are those that numpy finds."""
    array = np.array(list(values), dtype=float)
    found = {float(sample.labels["le"]): sample.value for sample in samples(metrics) if sample.name == f"{name}_bucket"}
    assert found == {bound: np.count_nonzero(array <= bound) for bound in (*bounds, np.inf)}
    assert value(metrics, f"{name}_count") == len(array)
    assert value(metrics, f"{name}_sum") == pytest.approx(float(array.sum()))


def durations(bounds: Sequence[float]) -> st.SearchStrategy[float]:
    """Anything a clock gives, bounds of buckets among them."""
    return st.floats(0, 1000) | st.sampled_from(bounds)


# Histograms


@given(st.lists(durations(FIRST_TOKEN_S)))
def test_a_histogram_counts_what_is_at_most_each_bound(seconds: list[float]) -> None:
    metrics = served()
    for each in seconds:
        metrics.first_token(each)
    assert_histogram(metrics, "phalanx_time_to_first_token_seconds", seconds, FIRST_TOKEN_S)


@given(st.lists(st.tuples(durations(BETWEEN_TOKENS_S), st.integers(1, 9))))
def test_tokens_that_come_together_share_the_time_before_them(gaps: list[tuple[float, int]]) -> None:
    metrics = served()
    for seconds, num_tokens in gaps:
        metrics.between_tokens(seconds, num_tokens)
    values = [seconds / num_tokens for seconds, num_tokens in gaps for _ in range(num_tokens)]
    assert_histogram(metrics, "phalanx_time_between_tokens_seconds", values, BETWEEN_TOKENS_S)


@given(st.lists(st.tuples(st.integers(1, 2_000_000), st.integers(0, 5000))))
def test_lengths_are_those_of_the_finished_requests(lengths: list[tuple[int, int]]) -> None:
    metrics = served()
    for prompt, output in lengths:
        metrics.finished("/v1/completions", "stop", 1.0, prompt, output)
    assert_histogram(metrics, "phalanx_request_prompt_tokens", [prompt for prompt, _ in lengths], TOKENS)
    assert_histogram(metrics, "phalanx_request_output_tokens", [output for _, output in lengths], TOKENS)


def test_each_time_has_a_histogram_of_its_own() -> None:
    metrics = served()
    metrics.first_token(0.1)
    metrics.between_tokens(0.2)
    metrics.per_output_token(0.3)
    metrics.queued(0.4)
    times = ("time_to_first_token", "time_between_tokens", "time_per_output_token", "queue_time")
    assert [value(metrics, f"phalanx_{time}_seconds_sum") for time in times] == [0.1, 0.2, 0.3, 0.4]


def test_the_limits_that_services_promise_are_bounds() -> None:
    assert {0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0} <= set(FIRST_TOKEN_S) & set(BETWEEN_TOKENS_S)
    assert all(high / low < 1.7 for low, high in pairwise(FIRST_TOKEN_S))


# Requests


def test_finished_requests_are_counted_and_timed_by_endpoint() -> None:
    metrics = served()
    metrics.finished("/v1/completions", "stop", 1.0, 10, 20)
    metrics.finished("/v1/completions", "length", 2.0, 10, 20)
    metrics.finished("/v1/chat/completions", "tool_calls", 4.0, 10, 20)
    name = "phalanx_requests_finished_total"
    assert value(metrics, name, endpoint="/v1/completions", finish_reason="stop") == 1
    assert value(metrics, name, endpoint="/v1/completions", finish_reason="length") == 1
    assert value(metrics, name, endpoint="/v1/chat/completions", finish_reason="tool_calls") == 1
    assert value(metrics, "phalanx_request_duration_seconds_sum", endpoint="/v1/completions") == 3
    assert value(metrics, "phalanx_request_duration_seconds_sum", endpoint="/v1/chat/completions") == 4


def test_responses_are_counted_by_status_and_timed_by_endpoint() -> None:
    metrics = served()
    for status in (200, 200, 429):
        metrics.answered("/v1/completions", status, 0.5)
    metrics.answered("/health", 503, 0.25)
    name = "phalanx_http_requests_total"
    assert value(metrics, name, endpoint="/v1/completions", status="200") == 2
    assert value(metrics, name, endpoint="/v1/completions", status="429") == 1
    assert value(metrics, name, endpoint="/health", status="503") == 1
    assert value(metrics, "phalanx_http_request_duration_seconds_sum", endpoint="/v1/completions") == 1.5
    assert value(metrics, "phalanx_http_request_duration_seconds_sum", endpoint="/health") == 0.25


def test_paths_that_the_server_does_not_have_are_counted_together() -> None:
    metrics = served()
    for number in range(100):
        metrics.answered(f"/{number}", 404, 0.001)
        metrics.finished(f"/{number}", "stop", 0.001, 1, 1)
    assert labels_of(metrics, "phalanx_http_requests_total") == [{"endpoint": "other", "status": "404"}]
    assert value(metrics, "phalanx_http_requests_total", endpoint="other", status="404") == 100
    assert labels_of(metrics, "phalanx_requests_finished_total") == [{"endpoint": "other", "finish_reason": "stop"}]


def test_refusals_are_counted_by_reason_from_zero_on() -> None:
    metrics = served()
    metrics.refused("queue_full")
    metrics.refused("queue_full")
    assert value(metrics, "phalanx_requests_refused_total", reason="queue_full") == 2
    assert value(metrics, "phalanx_requests_refused_total", reason="unauthorized") == 0


def test_disconnects_are_counted() -> None:
    metrics = served()
    assert value(metrics, "phalanx_disconnects_total") == 0
    metrics.disconnected()
    assert value(metrics, "phalanx_disconnects_total") == 1


# The server and its replicas


@pytest.mark.parametrize(("healthy", "told"), [(True, 1), (False, 0)])
def test_health_is_asked_for_at_each_scrape(healthy: bool, told: int) -> None:
    assert value(served(healthy=healthy), "phalanx_healthy") == told


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
@given(name=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_name_of_a_model_is_read_back_as_it_is(accept: str | None, name: str) -> None:
    found = families(served(model_name=name), accept)
    (sample,) = found["phalanx_build_info" if accept is None else "phalanx_build"].samples
    assert sample.labels == {"version": __version__, "model": name, "layout": "2x2"}


def test_a_replicas_figures_are_those_of_its_engine() -> None:
    stats = replica()
    metrics = served(replica(running=1), stats)
    for name, field in {
        "sequences_running": "running",
        "sequences_waiting": "waiting",
        "kv_pages": "pages",
        "kv_pages_used": "pages_used",
        "kv_pages_kept": "pages_kept",
        "engine_requests_total": "requests",
        "engine_requests_finished_total": "finished",
        "engine_requests_aborted_total": "aborted",
        "prompt_tokens_total": "prompt_tokens",
        "prompt_tokens_cached_total": "prompt_tokens_cached",
        "output_tokens_total": "output_tokens",
        "preemptions_total": "preemptions",
        "steps_total": "steps",
    }.items():
        assert value(metrics, f"phalanx_{name}", replica="1") == getattr(stats, field), name


def test_every_stage_of_every_replica_has_its_busy_share() -> None:
    metrics = served(replica(stage_busy=(0.5,)), replica(stage_busy=(0.25, 1.0)))
    name = "phalanx_stage_busy_ratio"
    assert value(metrics, name, replica="0", stage="0") == 0.5
    assert value(metrics, name, replica="1", stage="0") == 0.25
    assert value(metrics, name, replica="1", stage="1") == 1.0
    assert len(labels_of(metrics, name)) == 3


def test_transfers_of_every_rank_are_told_by_operation() -> None:
    totals = (CommTotals(-1, "recv", 1, 10, 5e5, 0.0), CommTotals(0, "send", 1, 8, 1e6, 2e6))
    comm: list[RankTotals] = [{}, {0: totals, 1: (*totals, CommTotals(1, "send", 1, 8, 5e5, 1e6))}]
    metrics = Metrics(
        lambda: [replica()] * 2, lambda: True, model_name="m", layout="2", endpoints=(), comm_totals=lambda: comm
    )
    place = {"replica": "1", "rank": "1", "operation": "send"}
    assert value(metrics, "phalanx_comm_exposed_seconds_total", **place) == 1.5
    assert value(metrics, "phalanx_comm_hidden_seconds_total", **place) == 3.0
    assert value(metrics, "phalanx_comm_bytes_total", **place) == 16
    assert value(metrics, "phalanx_comm_exposed_seconds_total", replica="1", rank="0", operation="recv") == 0.5
    assert len(labels_of(metrics, "phalanx_comm_bytes_total")) == 4


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1))
def test_counters_go_on_where_a_replica_comes_back_at_zero(lives: list[list[int]]) -> None:
    """lives: how far a replica's counter rises between scrapes, from its start to its end."""
    now = counting()
    metrics = Metrics(lambda: [now], lambda: True, model_name="model", layout="1x1", endpoints=())
    seen = []
    for life in lives:
        for count in np.cumsum([0, *life]).tolist():
            now = counting(output_tokens=count, steps=count)
            seen.append(value(metrics, "phalanx_output_tokens_total", replica="0"))
    assert seen == sorted(seen)
    assert seen[-1] == sum(map(sum, lives))


def test_one_counter_that_falls_says_that_all_began_anew() -> None:
    now = counting(requests=5, steps=1000)
    metrics = Metrics(lambda: [now], lambda: True, model_name="model", layout="1x1", endpoints=())
    metrics.exposition(None)
    now = counting(requests=7, steps=10)
    assert value(metrics, "phalanx_engine_requests_total", replica="0") == 12
    assert value(metrics, "phalanx_steps_total", replica="0") == 1010


def test_a_replica_that_comes_back_leaves_the_others_counters_alone() -> None:
    now = [counting(steps=10), counting(steps=20)]
    metrics = Metrics(lambda: now, lambda: True, model_name="model", layout="1x1 x2", endpoints=())
    metrics.exposition(None)
    now = [counting(steps=1), counting(steps=21)]
    assert value(metrics, "phalanx_steps_total", replica="0") == 11
    assert value(metrics, "phalanx_steps_total", replica="1") == 21


# The exposition


@pytest.mark.parametrize("accept", [None, OPENMETRICS])
def test_a_reader_of_either_format_finds_all_samples(accept: str | None) -> None:
    metrics = busy()
    read = [sample for family in families(metrics, accept).values() for sample in family.samples]
    assert sorted(read, key=str) == sorted(samples(metrics), key=str)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain; version=1.0.0", "text/plain; version=0.0.4; charset=utf-8"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        ("Application/OpenMetrics-Text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        ("application/openmetrics-text; version=newest", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        (ANY_ACCEPT, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
    ],
)
def test_openmetrics_is_given_where_it_is_asked_for(accept: str | None, kind: str) -> None:
    body, found = served().exposition(accept)
    assert found == kind
    assert body.endswith(b"# EOF\n") == kind.startswith("application/openmetrics-text")


def test_names_follow_the_conventions_of_prometheus() -> None:
    for family in families(busy(), OPENMETRICS).values():
        assert re.fullmatch(r"phalanx_[a-z_]+", family.name)
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|us|milliseconds|microseconds|kb|percent|count|total)$", family.name)
    times = [name for name in families(busy()) if re.search("time|duration", name)]
    assert len(times) == 6
    assert all(name.endswith("_seconds") for name in times)


def test_the_registry_of_the_process_is_left_alone() -> None:
    busy()
    assert [family.name for family in REGISTRY.collect() if family.name.startswith("phalanx")] == []


def test_a_scrape_does_not_grow_with_traffic() -> None:
    metrics = busy()
    before = len(samples(metrics))
    for number in range(1000):
        metrics.between_tokens(number / 100)
        metrics.finished("/v1/completions", "stop", number, number + 1, number)
        metrics.answered("/v1/completions", 200, number)
    assert len(samples(metrics)) == before < 400


def test_an_endpoint_adds_few_samples() -> None:
    metrics = busy()
    before = len(samples(metrics))
    metrics.answered("/health", 200, 0.001)
    assert len(samples(metrics)) - before < 20


def test_a_replica_adds_one_sample_for_each_of_its_figures() -> None:
    one, two = (len(samples(served(*[replica()] * number))) for number in (1, 2))
    shown = set(EngineStats.__dataclass_fields__) - {"tokens_per_s"}  # Prometheus derives rates itself
    assert two - one == len(shown) - 1 + 2 + 3  # with two stages, and three figures of the one rank's transfers


# The board

BOARD = json.loads((Path(__file__).resolve().parents[2] / "configs" / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = BOARD["panels"]
NOT_SHOWN: set[str] = set()  # metrics that the board leaves out on purpose
TARGET_LABELS = {"instance", "job"}  # Prometheus adds them to all it scrapes
WORDS = {"sum", "avg", "min", "max", "by", "rate", "histogram_quantile"}
SELECTOR = re.compile(r"([a-z_]+)\{([^}]*)\}(\[\$__rate_interval\])?")


class Target(NamedTuple):
    panel: str
    expr: str
    legend: str


class Selector(NamedTuple):
    metric: str
    labels: set[str]
    over_time: bool


TARGETS = [
    Target(panel["title"], target["expr"], target["legendFormat"])
    for panel in PANELS
    for target in panel.get("targets", ())
]
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.panel}: {target.legend}")


def selectors(expr: str) -> Iterator[Selector]:
    for metric, matchers, interval in SELECTOR.findall(expr):
        yield Selector(metric, set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', matchers)), bool(interval))


def grouping(expr: str) -> set[str]:
    """All labels that a query groups by."""
    return {label.strip() for labels in re.findall(r"by \(([^)]*)\)", expr) for label in labels.split(",")}


@pytest.fixture(scope="module")
def exposed() -> dict[str, tuple[str, set[str]]]:
    """By the name of a sample: type of its metric, and its labels."""
    return {
        sample.name: (family.type, set(sample.labels))
        for family in families(busy()).values()
        for sample in family.samples
    }


@every_target
def test_a_query_names_only_metrics_and_labels_that_there_are(
    target: Target, exposed: dict[str, tuple[str, set[str]]]
) -> None:
    found = list(selectors(target.expr))
    assert found
    for selector in found:
        labels = exposed[selector.metric][1] | TARGET_LABELS
        assert selector.labels <= labels
        assert grouping(target.expr) <= labels


@every_target
def test_a_query_has_nothing_but_metrics_and_known_functions(target: Target) -> None:
    rest = re.sub(r"by \([^)]*\)", "by", SELECTOR.sub("", target.expr))
    assert set(re.findall(r"[a-zA-Z_]\w*", rest)) <= WORDS
    assert rest.count("(") == rest.count(")")


@every_target
def test_what_counts_is_shown_as_a_rate_and_what_is_now_as_it_is(
    target: Target, exposed: dict[str, tuple[str, set[str]]]
) -> None:
    for selector in selectors(target.expr):
        counts = exposed[selector.metric][0] in {"counter", "histogram"}
        assert selector.over_time == counts
        assert (f"rate({selector.metric}{{" in target.expr) == counts


@every_target
def test_quantiles_are_of_buckets_and_buckets_are_shown_as_quantiles(target: Target) -> None:
    of_buckets = all(selector.metric.endswith("_bucket") for selector in selectors(target.expr))
    assert of_buckets == target.expr.startswith("histogram_quantile(") == ("le" in grouping(target.expr))
    if of_buckets:
        (quantile,) = re.findall(r"^histogram_quantile\((0\.\d+), ", target.expr)
        assert f"p{float(quantile) * 100:.0f}" in target.legend + target.panel


@every_target
def test_a_query_is_of_the_servers_that_are_chosen(target: Target) -> None:
    assert all("instance" in selector.labels for selector in selectors(target.expr))
    assert target.expr.count('instance=~"$instance"') == len(list(selectors(target.expr)))


@every_target
def test_a_legend_names_what_tells_its_lines_apart(target: Target, exposed: dict[str, tuple[str, set[str]]]) -> None:
    named = set(re.findall(r"\{\{(\w+)\}\}", target.legend))
    if re.search(r"\b(sum|avg|min|max)\b", target.expr):
        assert named == grouping(target.expr) - {"le"}
    else:
        (selector,) = selectors(target.expr)
        assert named == exposed[selector.metric][1]


def test_the_board_shows_every_metric(exposed: dict[str, tuple[str, set[str]]]) -> None:
    used = {selector.metric.removesuffix("_bucket") for target in TARGETS for selector in selectors(target.expr)}
    all_of_them = {re.sub(r"(?<!phalanx)_(bucket|sum|count)$", "", name) for name in exposed}
    assert all_of_them - used == NOT_SHOWN


def test_the_board_asks_for_p50_p90_and_p99_of_every_latency() -> None:
    for time in ("time_to_first_token", "time_between_tokens", "time_per_output_token", "queue_time"):
        asked = [target.expr for target in TARGETS if f"phalanx_{time}_seconds_bucket" in target.expr]
        assert [re.findall(r"0\.\d+", expr) for expr in asked] == [["0.5"], ["0.9"], ["0.99"]]


def test_the_servers_to_choose_from_are_found_by_a_metric_that_there_is(
    exposed: dict[str, tuple[str, set[str]]],
) -> None:
    (chosen,) = (variable for variable in BOARD["templating"]["list"] if variable["type"] == "query")
    match = re.fullmatch(r"label_values\((\w+), (\w+)\)", chosen["query"]["query"])
    assert match is not None
    assert match[1] in exposed
    assert (match[2], chosen["name"]) == ("instance", "instance")


def test_panels_have_ids_of_their_own() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)


def test_panels_lie_beside_each_other_within_the_grid() -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in PANELS]
    assert [title for title, place in places if place["x"] < 0 or place["x"] + place["w"] > 24] == []
    for (title, a), (other, b) in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{title} lies over {other}"


def test_the_board_has_the_rows_of_an_operators_questions() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Engine", "Memory", "Pipeline", "Errors"]


def test_the_board_reads_from_whatever_data_source_is_chosen() -> None:
    sources = [source for part in PANELS + BOARD["templating"]["list"] for source in data_sources(part)]
    assert sources
    assert {(source["type"], source["uid"]) for source in sources} == {("prometheus", "${datasource}")}
    assert BOARD["id"] is None
    assert "gnetId" not in BOARD


def data_sources(part: Any) -> Iterator[dict[str, str]]:
    if isinstance(part, dict):
        if "datasource" in part:
            yield part["datasource"]
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from data_sources(each)
