"""Traces: of a formation of two stages of two ranks whose clocks are all wrong, and of made-up ranks."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.launcher.skewed_ranks import SKEWS_S
from tests.tiny_models import TINY_MODELS, make
from typer.testing import CliRunner

from phalanx import LLM
from phalanx.cli import app
from phalanx.comm.ledger import LedgerEntry
from phalanx.engine.clock import ClockReading
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.trace_book import RankTrace
from phalanx.launcher.config import load_config
from phalanx.launcher.formation import open_host
from phalanx.launcher.generate_output import await_reports
from phalanx.launcher.trace import TracedRank, TracedRun, arrivals
from phalanx.launcher.trace_file import lanes, trace_data, write_trace
from phalanx.parallel.layout import RankPlace

GROUPS = {"stage0": {0, 1}, "stage1": {2, 3}}
NUM_STEPS = 6
Event = dict[str, Any]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = make(TINY_MODELS["smollm2"], tmp_path_factory.mktemp("models") / "tiny")
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "cluster": {"ray": "none", "device": "cpu", "cpus_per_rank": 1},
        "parallel": {"tensor": 2, "pipeline": 2},
        "engine": {"kv_cache": "4MiB"},
    }


@pytest.fixture(scope="module")
def trace(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Event:
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        skewed = partial(open_host, target="tests.launcher.skewed_ranks:run")
        with LLM.from_config(load_config(config), trace=True, open_host=skewed) as llm:
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=NUM_STEPS, ignore_eos=True))
            assert await_reports(llm)
            write_trace(llm.traced(), path)
    data: Event = json.loads(path.read_text())
    return data


def spans(trace: Event, category: str) -> list[Event]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] == category]


def errors_us(trace: Event) -> list[float]:
    return [each["clock_error_us"] for each in trace["otherData"]["ranks"]]


def test_every_rank_is_a_process_with_a_name_and_all_its_steps(trace: Event) -> None:
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert [names[pid].split(",")[0] for pid in range(4)] == [
        "rank 0 (replica 0",
        "rank 1 (replica 0",
        "rank 2 (replica 0",
        "rank 3 (replica 0",
    ]
    steps = sorted((event["pid"], event["args"]["step"]) for event in spans(trace, "step"))
    assert steps == [(pid, step) for pid in range(4) for step in range(NUM_STEPS)]


def test_clocks_that_are_wrong_are_found_out_within_the_error_that_is_told(trace: Event) -> None:
    for rank, skew_s in zip(trace["otherData"]["ranks"], SKEWS_S, strict=True):
        assert abs(rank["clock_offset_us"] + skew_s * 1e6) <= rank["clock_error_us"] < 0.5e6


def test_the_ranks_of_a_collective_are_in_it_at_one_time(trace: Event) -> None:
    """None can end before all have begun: that is so on a right clock only."""
    together: defaultdict[tuple[str, int], dict[int, Event]] = defaultdict(dict)
    for event in spans(trace, "transfer"):
        if event["args"]["group"] in GROUPS:
            together[event["args"]["group"], event["args"]["seq"]][event["pid"]] = event
    assert len(together) > 4 * NUM_STEPS
    for (group, _), events in together.items():
        assert set(events) == GROUPS[group]
        last_us = max(event["ts"] for event in events.values())
        error_us = sum(errors_us(trace)[pid] for pid in events)
        assert all(event["ts"] + event["dur"] >= last_us - error_us for event in events.values())
        assert len({event["args"]["layer"] for event in events.values()}) == 1
        assert len({event["args"]["last_rank"] for event in events.values() if "last_rank" in event["args"]}) <= 1


def test_nothing_is_received_before_it_is_sent(trace: Event) -> None:
    sent, received = (
        {
            (event["args"]["group"], event["args"]["seq"], *sorted((event["pid"], event["args"]["with_rank"]))): event
            for event in spans(trace, "transfer")
            if event["name"] == op
        }
        for op in ("send", "recv")
    )
    both = sent.keys() & received.keys()  # the last of all is still being sent when the rank has nothing more to do
    assert len(both) > NUM_STEPS
    for key in both:
        error_us = errors_us(trace)[sent[key]["pid"]] + errors_us(trace)[received[key]["pid"]]
        assert received[key]["ts"] + received[key]["dur"] >= sent[key]["ts"] - error_us


def test_a_transfer_says_what_the_ledger_says(trace: Event) -> None:
    for event in spans(trace, "transfer"):
        args = event["args"]
        assert args["exposed_us"] + args["hidden_us"] == pytest.approx(event["dur"], abs=0.01)
        assert args["bytes"] > 0
        assert args["step"] in range(NUM_STEPS)
    layers = {event["args"]["layer"] for event in spans(trace, "transfer") if event["name"].startswith("fused")}
    assert layers == set(range(4))


def test_the_events_of_a_track_do_not_overlap(trace: Event) -> None:
    tracks = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for track in tracks.values():
        track.sort()
        assert all(end_us <= start_us + 0.01 for (_, end_us), (start_us, _) in pairwise(track))


def test_generate_writes_a_trace_and_a_picture(config: dict[str, Any], tmp_path: Path) -> None:
    settings = tmp_path / "config.yaml"
    settings.write_text(json.dumps(config | {"parallel": {"tensor": 2}}))  # JSON is YAML
    files = ["--trace", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, ["generate", str(settings), "-p", "x", "--max-tokens", "3", *files])
    assert result.exit_code == 0, f"{result.exception} {result.stderr}"
    written = json.loads((tmp_path / "out.json").read_text())
    assert {event["pid"] for event in spans(written, "transfer")} == {0, 1}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# ---- made-up ranks ----


def entry(op: str, start_us: float, total_us: float, *, peer: int = -1, last: int = -1) -> LedgerEntry:
    return LedgerEntry(0, 0, 1, "g", op, 8, start_us, total_us, total_us, peer, last)


def rank_of(rank: int, *transfers: LedgerEntry, error_us: float = 0.0) -> TracedRank:
    clock = ClockReading(0.0, error_us / 1e6)
    return TracedRank(RankPlace(0, rank, 0, 0), RankTrace(rank, (), transfers, {"g": (4, 5)}, clock, 0))


def test_the_last_to_come_is_the_one_that_began_last() -> None:
    ranks = [rank_of(4, entry("barrier", 10.0, 30.0)), rank_of(5, entry("barrier", 35.0, 5.0))]
    assert list(arrivals(ranks).values()) == [(5, 35.0)]
    recv, send = rank_of(4, entry("recv", 10.0, 30.0, peer=1)), rank_of(5, entry("send", 35.0, 5.0, peer=0))
    assert arrivals([recv, send]) == {("g", 1, 1, 0): (5, 35.0)}


def test_nobody_is_the_last_where_the_clocks_cannot_tell() -> None:
    ranks = [
        rank_of(4, entry("barrier", 10.0, 30.0), error_us=20.0),
        rank_of(5, entry("barrier", 35.0, 5.0), error_us=10.0),
    ]
    assert list(arrivals(ranks).values()) == [(None, 35.0)]


def test_a_backend_that_saw_who_came_last_is_believed() -> None:
    ranks = [rank_of(4, entry("barrier", 10.0, 30.0, last=1)), rank_of(5, entry("barrier", 8.0, 5.0, last=1))]
    assert list(arrivals(ranks).values()) == [(5, 8.0)]


def test_a_transfer_that_a_rank_has_not_told_of_is_nobodys() -> None:
    assert arrivals([rank_of(4, entry("barrier", 10.0, 30.0)), rank_of(5)]) == {}


def test_groups_that_a_rank_does_not_know_of_are_shown_all_the_same() -> None:
    inner = entry("send", 10.0, 30.0, peer=1)._replace(group="made by a communicator")
    assert arrivals([rank_of(4, inner)]) == {}
    (event,) = spans(trace_data(TracedRun(((rank_of(4, inner),),))), "transfer")
    assert "with_rank" not in event["args"]


def test_transfers_under_way_at_once_are_on_tracks_of_their_own() -> None:
    first, second, third = entry("send", 0.0, 10.0), entry("send", 5.0, 10.0), entry("send", 10.0, 1.0)
    assert lanes([third, second, first]) == [[first, third], [second]]


def test_runs_one_after_the_other_are_one_trace() -> None:
    runs = [TracedRun(((rank_of(4, entry("barrier", start_us, 1.0)),),)) for start_us in (5.0, 50.0)]
    data = trace_data(TracedRun.together(runs))
    assert [event["ts"] for event in spans(data, "transfer")] == [0.0, 45.0]
