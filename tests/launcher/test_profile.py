"""`phalanx profile`: what its accounts mean, on made-up steps, and that a run of two ranks gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.instruction_sets import needs_native
from tests.tiny_models import TINY_MODELS, make
from typer.testing import CliRunner

from phalanx.cli import app
from phalanx.comm.ledger import LedgerEntry
from phalanx.engine.clock import ClockReading
from phalanx.engine.messages import OperatorEntry, StageStep, TorchEntry
from phalanx.engine.trace_book import RankTrace
from phalanx.errors import PhalanxError
from phalanx.kernels.ceilings import Ceilings
from phalanx.launcher.profile.account import Phase, phases
from phalanx.launcher.profile.run import Turns
from phalanx.launcher.trace import TracedRank, TracedRun
from phalanx.parallel.layout import RankPlace

PLACES = [RankPlace(0, 0, rank, rank) for rank in range(2)]
CEILINGS = dict.fromkeys(PLACES, Ceilings(bytes_per_s=1e9, flops_per_s=1e12))
MS = 1e-3
NUM_LAYERS = 4


def operator(step: int, name: str, start_ms: float, ms: float, weight: str = "", *sizes: int) -> OperatorEntry:
    return OperatorEntry(step, name, weight, sizes, 1e6, 2e6, start_ms * MS, ms * MS)


def transfer(step: int, start_ms: float, ms: float) -> LedgerEntry:
    return LedgerEntry(step, 0, step + 1, "stage0", "all_reduce", 1024, start_ms * 1e3, ms * 1e3, ms * 1e3)


def trace(
    rank: int,
    steps: list[StageStep],
    operators: list[OperatorEntry],
    transfers: list[LedgerEntry],
    seen: list[TorchEntry],
) -> TracedRank:
    told = tuple(steps), tuple(transfers), {"stage0": (0, 1)}, ClockReading(), 0, tuple(operators), tuple(seen)
    return TracedRank(PLACES[rank], RankTrace(rank, *told))


def accounts(*ranks: TracedRank, plain: tuple[TracedRank, ...] = (), on_gpu: bool = False) -> list[Phase]:
    return phases(TracedRun((ranks,)), TracedRun((plain,)), CEILINGS, on_gpu=on_gpu)


def step(number: int, start_ms: float, end_ms: float, tokens: int = 1, decodes: int = 1) -> StageStep:
    return StageStep(number, start_ms * MS, end_ms * MS, 0.0, tokens, decodes)


def test_operators_of_all_layers_are_one_row_and_leave_the_rest_to_others() -> None:
    calls = [operator(0, "linear", 10 * n, 4, f"layers.{n}.qkv", 1, 8 * (n + 1)) for n in range(3)]
    [phase] = accounts(trace(0, [step(0, 0, 30)], calls, [], []))
    [row] = phase.rows
    assert (row.name, row.load, row.calls) == ("linear qkv", "1 x 8-24", 3)
    assert row.taken_us == pytest.approx(12e3)
    assert row.least_us == pytest.approx(3 * 1e3)  # a megabyte each, at a gigabyte a second
    assert row.roofline == pytest.approx(0.25)
    assert phase.rest_us == pytest.approx(18e3)


def test_what_lies_within_a_transfer_is_counted_once() -> None:
    calls = [operator(0, "add_rms_norm", 3, 2)]
    [phase] = accounts(trace(0, [step(0, 0, 10)], calls, [transfer(0, 2, 6)], []))
    assert {row.name: row.taken_us for row in phase.rows} == pytest.approx({"all_reduce": 4e3, "add_rms_norm": 2e3})


def test_waiting_for_a_later_rank_is_no_part_of_a_transfer() -> None:
    early, late = (
        trace(rank, [step(0, 0, 10)], [], [transfer(0, start, 9 - start)], []) for rank, start in ((0, 1), (1, 7))
    )
    first, second = accounts(early, late)
    assert {row.kind: row.taken_us for row in first.rows} == pytest.approx({"wait": 6e3, "transfer": 2e3})
    assert {row.kind: row.taken_us for row in second.rows} == pytest.approx({"transfer": 2e3})


def test_pytorch_counts_where_nothing_else_does() -> None:
    seen = [TorchEntry(0, name, False, 6 * MS, MS, own * MS) for name, own in (("aten::mm", 0), ("aten::add", 0.5))]
    [phase] = accounts(trace(0, [step(0, 0, 10)], [operator(0, "linear", 2, 3)], [], seen))
    assert {row.name: row.taken_us for row in phase.rows} == pytest.approx({"linear": 3e3, "aten::add": 500})


def test_only_usual_steps_count_and_of_them_the_middle_half() -> None:
    lengths = [5, 1, 6, 90, 4, 7, 3, 60]
    steps = [step(number, 100 * number, 100 * number + ms) for number, ms in enumerate(lengths)]
    odd = step(99, 0, 1000, tokens=3, decodes=3)
    plain = step(50, 0, 4)
    [phase] = accounts(trace(0, [*steps, odd], [], [], []), plain=(trace(0, [plain], [], [], []),))
    assert (phase.name, phase.num_tokens, phase.num_steps) == ("decode", 1, 8)
    assert phase.step_us == pytest.approx(1e3 * (4 + 5 + 6 + 7) / 4)
    assert phase.plain_us == pytest.approx(4e3)


def test_turns() -> None:
    assert [number in Turns(10, 2, begins=True) for number in range(8, 16)] == [
        False,
        False,
        *[True] * 2,
        *[False] * 2,
        *[True] * 2,
    ]
    assert [number in Turns(10, 2, begins=False) for number in range(8, 14)] == [False] * 4 + [True] * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(TINY_MODELS["smollm2"], tmp_path_factory.mktemp("models") / "tiny")


def profile(model: Path, *arguments: str) -> Any:
    config = model.parent / "profile.yaml"
    config.write_text(
        f"model: {{path: {model}, dtype: bfloat16}}\n"
        "cluster: {ray: none, device: cpu, cpus_per_rank: 1}\n"
        "engine: {kv_cache: 4MiB}\n"
    )
    options = ["--prompt-tokens", "8", "--output-tokens", "9", "--rounds", "1"]
    return CliRunner().invoke(app, ["profile", str(config), *options, *arguments], catch_exceptions=False)


@needs_native
def test_two_ranks_replay_steps_and_tell_of_every_product(model: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("profile.json", "trace.json", "roofline.png")]
    written = zip(("--json", "--trace", "--plot"), map(str, files), strict=True)
    done = profile(model, "--set", "parallel.tensor=2", *(word for pair in written for word in pair))
    assert done.exit_code == 0
    assert "where nobody looked, so looking cost" in done.stdout
    report = json.loads(files[0].read_text())
    assert len(report["ceilings"]) == 2
    assert [(phase["phase"], phase["tokens_of_a_step"]) for phase in report["phases"]] == 2 * [
        ("decode", 1),
        ("prefill", 8),
    ]
    for phase in report["phases"]:
        rows = {row["name"]: row for row in phase["rows"]}
        assert {rows[f"linear {name}"]["calls"] for name in ("qkv", "o", "gate_up", "down")} == {NUM_LAYERS}
        assert rows["linear gate_up"]["num_flops"] > 0
        assert 0 < sum(row["taken_us"] for row in phase["rows"]) <= phase["step_us"]
        assert phase["unprofiled_step_us"] > 0
    events = [event for event in json.loads(files[1].read_text())["traceEvents"] if event["ph"] == "X"]
    for pid in range(2):
        mine = [event for event in events if event["pid"] == pid]
        products = {
            event["name"] for event in mine if event["cat"] == "operator" and event["name"].startswith("linear")
        }
        assert {
            f"linear layers.{n}.{name}" for n in range(NUM_LAYERS) for name in ("qkv", "o", "gate_up", "down")
        } < products
        for step in (event for event in mine if event["cat"] == "step" and event["args"]["tokens"] == 1):
            within = [
                each["dur"]
                for each in mine
                if each["cat"] == "operator" and each["args"]["step"] == step["args"]["step"]
            ]
            assert 0 < sum(within) <= step["dur"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_with_pytorch_looking_on_one_rank(model: Path, tmp_path: Path) -> None:
    file, trace_file = tmp_path / "profile.json", tmp_path / "trace.json"
    arguments = ["--torch", "--json", str(file), "--trace", str(trace_file), "--set", "model.dtype=float32"]
    done = profile(model, *arguments)
    assert done.exit_code == 0
    assert "called operator by operator" in done.stdout
    [decode, _] = json.loads(file.read_text())["phases"]
    rows = {row["name"]: row for row in decode["rows"]}
    assert rows["linear qkv"]["calls"] == NUM_LAYERS  # PyTorch's product, as one of ours
    assert "torch" in {row["kind"] for row in decode["rows"]}
    assert not rows.keys() & {"aten::mm", "aten::addmm"}  # which is a part of that
    events = json.loads(trace_file.read_text())["traceEvents"]
    steps = {event["args"]["step"]: event for event in events if event.get("cat") == "step"}
    products = [
        event for event in events if event.get("cat") == "torch" and event["name"] in ("aten::mm", "aten::addmm")
    ]
    assert products
    for event in products:  # on the clock of the steps
        step = steps[event["args"]["step"]]
        assert step["ts"] - 500 <= event["ts"] <= step["ts"] + step["dur"] + 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_marks_for_nsight_need_a_gpu(model: Path) -> None:
    with pytest.raises(PhalanxError, match="marks what GPUs do"):
        profile(model, "--nvtx")
