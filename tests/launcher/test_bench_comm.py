"""`phalanx bench comm`: what is measured for a layout, what limits say, and that a run of it gives both."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tests.launcher.fake_ranks import SHAPE
from typer.testing import CliRunner, Result

from phalanx.cli import app
from phalanx.comm.create import choose_backend, usable_backends
from phalanx.errors import RankFailedError
from phalanx.launcher.bench_comm.groups import OPS, crossing_share, layout_groups, num_elements, touched_share
from phalanx.launcher.bench_comm.limits import Limits, Link, Word, together_s
from phalanx.launcher.bench_comm.measure import MOST_CALLS, READING_S, num_calls
from phalanx.launcher.bench_comm.plan import parse_ops, plan_comm
from phalanx.launcher.bench_comm.rank import Reading
from phalanx.launcher.bench_comm.ranks import Ranks
from phalanx.launcher.config import load_config
from phalanx.parallel.layout import Layout, StageRequest, build_layout

pytestmark = pytest.mark.alone  # it compares times

PNG = b"\x89PNG\r\n\x1a\n"
CONFIG = {
    "model": {"path": "shape:llama-3.1-8b", "dtype": "bfloat16"},
    "cluster": {"ray": "none", "device": "cpu"},
    "parallel": {"stages": [{"tensor": 2}, {"tensor": 1}]},
}


def layout(*stages: int) -> Layout:
    return build_layout(SHAPE, [StageRequest(num_ranks) for num_ranks in stages])


# ---- what is measured ----


def test_a_layout_has_a_group_for_each_wide_stage_and_each_border() -> None:
    groups = layout_groups(layout(2, 1, 3), OPS)
    assert [(group.name, group.ranks, group.pair) for group in groups] == [
        ("stage 0", (0, 1), (0, 1)),
        ("stage 2", (3, 4, 5), (0, 1)),
        ("stage 0 to 1", (0, 1, 2, 3, 4, 5), (0, 2)),
        ("stage 1 to 2", (0, 1, 2, 3, 4, 5), (2, 3)),
    ]
    assert {group.ops for group in groups if " to " in group.name} == {("send_recv",)}


def test_borders_are_left_out_where_nothing_is_measured_there() -> None:
    assert layout_groups(layout(1, 1), ["all_reduce"]) == []


@pytest.mark.parametrize("op", OPS)
def test_tensors_have_a_part_for_every_rank_and_about_the_size_asked_for(op: Any) -> None:
    elements = num_elements(op, 1000, itemsize=2, size=3)
    if op == "barrier":
        assert elements == 0
        return
    assert abs(elements * 2 - 1000) <= 3 * 2
    assert op not in ("all_gather", "reduce_scatter") or elements % 3 == 0
    assert num_elements(op, 1, itemsize=4, size=5) >= 1


@pytest.mark.parametrize(("call_s", "calls"), [(1e-9, MOST_CALLS), (READING_S / 10, 10), (1.0, 2)])
def test_a_reading_has_as_many_calls_as_its_time_allows(call_s: float, calls: int) -> None:
    assert num_calls(call_s) == calls


# ---- limits ----


def limits(machines: Sequence[int], *links: Link, word: Word | None = None) -> Limits:
    return Limits(tuple(machines), word, 1e9, 2e9, links)


def test_on_one_machine_a_call_takes_a_copy_or_the_way_of_a_word() -> None:
    found = limits([0, 0], Link((0, 1), 1.0, 1.0), word=Word(seen_s=3e-6, interpreter_s=1e-6))
    assert found.least_s("all_reduce", 8, copy_s=51e-6, overhead_s=1e-6) == pytest.approx(50e-6)
    assert found.least_s("send_recv", 8, copy_s=51e-6, overhead_s=1e-6) == pytest.approx(25e-6)
    assert found.least_s("all_reduce", 8, copy_s=2e-6, overhead_s=1e-6) == pytest.approx(2e-6)
    assert found.least_s("barrier", 0, copy_s=9.0, overhead_s=0.0) == pytest.approx(2e-6)


def test_between_machines_it_is_the_slowest_link() -> None:
    fast, slow = Link((0, 1), 1e9, 20e-6), Link((1, 2), 1e6, 50e-6)
    found = limits([0, 1, 2], fast, slow)
    assert found.least_s("all_reduce", 1000, copy_s=0.0, overhead_s=0.0) == pytest.approx(1e-3)
    assert found.least_s("barrier", 0, copy_s=0.0, overhead_s=0.0) == pytest.approx(50e-6)


def test_what_ranks_do_in_turns_counts_from_the_first_to_the_last() -> None:
    in_turns = [Reading(0.5, 10.0, 11.0), Reading(0.5, 11.0, 12.0)]
    assert together_s(in_turns, [0, 0], calls=2) == 1.0
    assert together_s(in_turns, [0, 1], calls=2) == 0.5  # clocks of two machines


def test_where_nothing_was_measured_there_is_no_limit() -> None:
    assert limits([0, 0]).least_s("all_reduce", 8, copy_s=1.0, overhead_s=0.0) is None


def test_what_a_machine_holds_itself_need_not_cross() -> None:
    assert crossing_share("all_gather", [0, 0, 0, 1]) == 0.75
    assert crossing_share("reduce_scatter", [0, 1]) == 0.5
    assert crossing_share("all_reduce", [0, 0, 1]) == 1.0


@pytest.mark.parametrize("op", OPS)
def test_no_operation_must_touch_more_than_a_copy(op: Any) -> None:
    assert 0 <= touched_share(op, 4) <= touched_share(op, 2) <= 1


# ---- backends ----


def test_every_backend_that_serves_is_named_and_auto_takes_the_first() -> None:
    usable = usable_backends("cpu", 2)
    assert {"gloo"} <= {backend.name for backend in usable}
    assert usable[0].name == choose_backend("auto", "cpu", 2).name
    apart = usable_backends("cpu", 2, apart="ranks on several machines")
    assert [backend.name for backend in apart] == [name for name, _ in usable if not name.startswith("shm")]


# ---- the command ----


def phalanx(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "config.yaml"
    path.write_text(json.dumps(CONFIG))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("out")
    before = set(psutil.Process().children(recursive=True))
    files = ("--json", folder / "out.json", "--plot", folder / "out.png")
    options = ("--sizes", "64KiB,1KB", "--rounds", 2, "--ops", ",".join(OPS))
    result = phalanx("bench", "comm", config, *options, *files)
    assert result.exit_code == 0, f"{result.exception} {result.stderr}"
    assert not set(psutil.Process().children(recursive=True)) - before
    return result, folder


@pytest.fixture(scope="module")
def report(run: tuple[Result, Path]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((run[1] / "out.json").read_text())
    return data


def test_the_tables_go_to_standard_output(run: tuple[Result, Path]) -> None:
    for part in (
        "stage 0: ranks 0, 1",
        "stage 0 to 1: ranks 0, 1, 2",
        *OPS,
        "taken by a run",
        "GB/s",
        "limit",
        "over loopback",
    ):
        assert part in run[0].stdout


def test_every_group_operation_and_size_is_in_the_json(report: dict[str, Any]) -> None:
    stage, border = report["groups"]
    of_stage = [(result["op"], result["num_bytes"]) for result in stage["results"]]
    assert of_stage == [(op, size) for op in OPS for size in ([1000, 65536] if op != "barrier" else [0])]
    assert [(result["op"], result["num_bytes"]) for result in border["results"]] == [
        ("send_recv", 1000),
        ("send_recv", 65536),
    ]
    assert (border["ranks"], border["send_recv_between"]) == ([0, 1, 2], [0, 2])


def test_every_backend_that_serves_is_measured_and_the_one_a_run_takes_marked(report: dict[str, Any]) -> None:
    for group in report["groups"]:
        usable = {backend.name for backend in usable_backends("cpu", len(group["ranks"]))}
        marked = {backend["name"]: backend["chosen"] for backend in group["backends"]}
        assert set(marked) == usable
        assert [name for name, chosen in marked.items() if chosen] == [next(iter(marked))]
        assert next(iter(marked)) == choose_backend("auto", "cpu", len(group["ranks"])).name
        for result in group["results"]:
            assert set(result["backends"]) == usable
            for figures in result["backends"].values():
                assert len(figures["readings_us"]) == 2
                assert figures["us"]["median"] == statistics.median(figures["readings_us"])
                assert min(figures["readings_us"]) > 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_the_limits_of_one_machine_are_measured(report: dict[str, Any]) -> None:
    for group in report["groups"]:
        found = group["limits"]
        assert found["machines"] == [0] * len(group["ranks"])
        assert 0 < found["core_to_core_us"] < found["core_to_core_with_interpreter_us"]
        assert found["copy_one_rank_bytes_per_s"] > 0
        assert found["tcp"][0]["bytes_per_s"] > 0
        assert all(result["limit_us"] > 0 for result in group["results"])


def test_the_json_says_what_was_typed_and_where_it_ran(report: dict[str, Any]) -> None:
    assert report["command"].endswith(
        "bench comm config.yaml --ops all_reduce,all_gather,reduce_scatter,broadcast,barrier,send_recv "
        "--sizes 64KiB,1KB --rounds 2 --json out.json --plot out.png"
    )
    assert report["config"]["layout"].startswith("2+1 ranks")
    assert report["machine"]["torch"] == torch.__version__


def test_the_plot_is_a_png_with_something_in_it(run: tuple[Result, Path]) -> None:
    picture = (run[1] / "out.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ops", "all_reduce,scatter"), "'scatter' is no operation; known: all_reduce, all_gather"),
        (("--sizes", "8KiB,big"), "--sizes: not a size: 'big'; allowed: bytes as a whole number"),
        (("--set", "parallel={}"), "nothing is transferred in 1 rank, 32 layers by all_reduce"),
        (("--set", "comm.backend=glo"), "did you mean 'gloo'?"),
    ],
)
def test_errors_name_cause_and_remedy(config: Path, arguments: tuple[object, ...], message: str) -> None:
    result = phalanx("bench", "comm", config, *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_a_rank_that_fails_ends_the_run_with_its_own_error() -> None:
    plan = plan_comm(load_config(CONFIG), parse_ops("all_reduce"))
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises(RankFailedError, match=r"rank 1 .* failed: KeyError: 'nonsense'"),
        Ranks.start(plan.specs, plan.settings) as ranks,
    ):
        ranks.ask((0, 1), "join", key="pair", backend="gloo")
        assert min(reading.call_s for reading in ranks.read((0, 1), "pair", "all_reduce", 8, 1, (0, 1))) > 0
        ranks.read((1,), "pair", "nonsense", 8, 1, (0, 1))
    assert not set(psutil.Process().children(recursive=True)) - before
