"""`phalanx bench`: what its figures mean, on made-up readings, and that runs of it give them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import socket
import statistics
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_models import MAX_POSITION, TINY_MODELS, VOCAB, make
from typer.testing import CliRunner, Result

from phalanx import AsyncEngine
from phalanx.cli import app
from phalanx.engine.clock import ClockReading
from phalanx.engine.messages import RankReady, StageStep
from phalanx.engine.request import Delta, RequestOutput
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.trace_book import RankTrace
from phalanx.errors import PhalanxError, RequestError
from phalanx.launcher.bench.figures import Spread, percentile, read_figures
from phalanx.launcher.bench.jobs import BenchOptions, plan_jobs, scaled
from phalanx.launcher.bench.memory import peak_memory
from phalanx.launcher.bench.readings import LatencyLimits, RequestReading, Round
from phalanx.launcher.bench.rounds import measure, play, turned
from phalanx.launcher.bench.stages import busy_shares, full_span
from phalanx.launcher.bench.workloads import RequestShape, WorkloadName
from phalanx.launcher.config import load_config
from phalanx.launcher.trace import TracedRank, TracedRun
from phalanx.models.resolve import ModelSource
from phalanx.parallel.layout import RankPlace

ROOT = Path(__file__).resolve().parents[2]
LIMITS = LatencyLimits(time_to_first_token_s=1.0, time_per_output_token_s=0.5)
PNG = b"\x89PNG\r\n\x1a\n"


def round_of(*requests: RequestReading, stages: Sequence[Sequence[Sequence[StageStep]]] = (((),),)) -> Round:
    kept = tuple(tuple(tuple(steps) for steps in replica) for replica in stages)
    return Round(requests, kept, cached_tokens=0, preemptions=0, steps=0)


def reading(*token_s: float, prompt: int = 10, arrival_s: float = 0.0) -> RequestReading:
    return RequestReading(prompt, arrival_s, token_s)


def figures(name: WorkloadName, *requests: RequestReading) -> dict[str, float | None]:
    return read_figures(name, round_of(*requests), LIMITS)


# ---- figures ----


def test_the_first_token_is_timed_from_when_the_request_was_due() -> None:
    assert reading(3.5, 4.0, arrival_s=2.0).time_to_first_token_s == 1.5


def test_the_time_per_output_token_is_the_mean_of_the_gaps() -> None:
    request = reading(1.0, 1.5, 3.0)
    assert request.gaps_s == (0.5, 1.5)
    assert request.time_per_output_token_s == 1.0


@pytest.mark.parametrize(
    ("request_", "met"),
    [
        (reading(1.0, 1.5, 2.0), True),  # exactly at both limits
        (reading(1.25, 1.5), False),
        (reading(0.5, 1.25), False),
        (reading(0.5, 0.5, 1.5), True),  # one long gap, the mean is what counts
        (reading(3.0, 3.5, arrival_s=2.0), True),
        (reading(0.5), True),  # nothing after the first token
    ],
)
def test_a_request_is_served_well_within_both_limits(request_: RequestReading, met: bool) -> None:
    assert LIMITS.met_by(request_) is met


def test_goodput_counts_requests_within_both_limits_over_the_whole_round() -> None:
    late, slow = reading(3.5, 3.75, arrival_s=2.0), reading(0.5, 4.0)
    good = [reading(0.25, 0.5), reading(7.5, 8.0, arrival_s=7.0)]
    found = figures("W4", late, slow, *good)
    assert found["goodput_per_s"] == 2 / 8.0
    assert found["requests_per_s"] == 4 / 8.0
    assert found["share_within_limits"] == 0.5


def test_gaps_are_spread_over_all_tokens_and_means_over_requests() -> None:
    found = figures("W4", reading(0.0, 1.0, 2.0, 3.0), reading(0.0, 9.0))
    assert found["time_between_tokens_p50_s"] == 1.0
    assert found["time_per_output_token_p50_s"] == 5.0


def test_tokens_a_second_are_over_the_time_to_the_last_token() -> None:
    requests = (reading(1.0, 2.0, prompt=30), reading(1.0, 4.0, prompt=10))
    assert figures("W2", *requests) == {"output_tokens_per_s": 1.0, "total_tokens_per_s": 11.0}
    assert figures("W3", *requests) == {"prompt_tokens_per_s": 10.0}


def test_requests_of_one_token_say_nothing_of_the_time_between_tokens() -> None:
    found = figures("W4", reading(0.5), reading(0.75))
    assert found["time_between_tokens_p99_s"] is None
    assert found["time_per_output_token_p50_s"] is None


@given(st.lists(st.floats(0, 100), min_size=2, max_size=50))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert percentile(values, 50) == pytest.approx(cuts[49])
    assert percentile(values, 99) == pytest.approx(cuts[98])


def test_rounds_that_say_nothing_do_not_count() -> None:
    assert Spread.over([3.0, None, 1.0, 2.0]) == Spread(median=2.0, least=1.0, most=3.0)
    assert Spread.over([None]) is None


# ---- stages ----


def steps(*times: tuple[float, float]) -> list[StageStep]:
    return [StageStep(number, *each) for number, each in enumerate(times)]


FIRST = steps((0, 1), (1, 2), (2, 4), (4, 5))
SECOND = steps((1, 2), (2, 3), (4, 4.5), (5, 6))


def test_a_pipeline_is_full_from_the_last_stages_first_step_to_the_first_stages_last() -> None:
    assert full_span([FIRST, SECOND]) == (1, 5)


def test_a_stage_is_busy_while_it_is_inside_a_step() -> None:
    assert busy_shares([FIRST, SECOND]) == (1.0, (1 + 1 + 0.5) / 4)


def test_a_step_through_stages_one_after_the_other_fills_no_pipeline() -> None:
    assert busy_shares([steps((0, 1)), steps((1, 2))]) is None


def test_a_stage_that_did_nothing_says_nothing() -> None:
    assert busy_shares([FIRST, []]) is None


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=20), min_size=1, max_size=4), st.floats(0, 0.009))
def test_stages_without_gaps_are_wholly_busy(lengths_s: list[list[float]], late_s: float) -> None:
    stages = []
    for number, mine in enumerate(lengths_s):
        ends = [number * late_s / 4 + sum(mine[: count + 1]) for count in range(len(mine))]
        stages.append(steps(*zip([number * late_s / 4, *ends[:-1]], ends, strict=True)))
    assert busy_shares(stages) == pytest.approx([1.0] * len(stages))


# ---- memory ----


def ready(pid: int, node: str | None = None) -> RankReady:
    return RankReady(0, socket.gethostname() if node is None else node, pid, {}, 0, 0, 0)


def tell(proc: Path, pid: int, peak_kib: int, shared_kib: tuple[int, int]) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "status").write_text(f"Name:\tpython\nVmHWM:\t{peak_kib} kB\nThreads:\t3\n")
    text = f"00-ff ---p 0 00:00 0 [rollup]\nShared_Clean: {shared_kib[0]} kB\nShared_Dirty: {shared_kib[1]} kB\n"
    (proc / str(pid) / "smaps_rollup").write_text(text)


def test_memory_that_ranks_share_counts_once(tmp_path: Path) -> None:
    tell(tmp_path, 7, 500, (90, 10))
    tell(tmp_path, 8, 300, (40, 10))
    memory = peak_memory([ready(7), ready(8)], tmp_path)
    assert memory.ranks_bytes == (400 + 250 + 100) * 1024
    assert memory.largest_rank_bytes == 500 * 1024


def test_ranks_in_one_process_are_counted_as_one(tmp_path: Path) -> None:
    tell(tmp_path, os.getpid(), 500, (90, 10))
    memory = peak_memory([ready(os.getpid())] * 2, tmp_path)
    assert memory[:3] == (500 * 1024,) * 3


def test_ranks_on_other_machines_and_dead_ones_are_unknown(tmp_path: Path) -> None:
    tell(tmp_path, 7, 500, (90, 10))
    assert peak_memory([ready(7, "elsewhere"), ready(9)], tmp_path) == (None, None, None, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_of_this_process_is_the_kernels() -> None:
    found = peak_memory([]).process_bytes
    # Either counter may lag behind by some pages a core.
    assert found == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.05)


# ---- jobs ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(TINY_MODELS["smollm2"], tmp_path_factory.mktemp("models") / "tiny")


def sections(model: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "cluster": {"ray": "none", "device": "cpu", "cpus_per_rank": 1},
        "engine": {"kv_cache": "4MiB"},
    }


def test_a_scale_shortens_prompts_and_outputs_but_never_to_nothing() -> None:
    shape = RequestShape(tuple(range(100)), 30, arrival_s=2.5)
    assert scaled(shape, 0.25) == (tuple(range(25)), 7, 2.5)
    assert scaled(shape, 0.001) == ((0,), 1, 2.5)
    assert scaled(shape, 1.0) == shape


@pytest.mark.parametrize(
    ("overrides", "most", "remedy"),
    [
        (["model.max_length=100"], 100, "are all that model.max_length says; raise it"),
        (["engine.kv_cache=36KiB"], 48, "are all that the KV cache holds; raise engine.kv_cache"),
        ([], MAX_POSITION, "are all that the model can address; take a model of longer sequences"),
    ],
)
def test_sequences_that_are_too_long_are_refused_before_a_start(
    tiny: Path, overrides: list[str], most: int, remedy: str
) -> None:
    config = load_config(sections(tiny), overrides)
    with pytest.raises(RequestError, match="W3 has sequences of up to 1025 tokens, but") as refused:
        plan_jobs(config, BenchOptions(("W2", "W3"), num_rounds=1))
    assert f"but {most} {remedy}" in str(refused.value)
    scale = float(str(refused.value).rpartition("--scale ")[2])
    jobs = plan_jobs(config, BenchOptions(("W2", "W3"), num_rounds=1, scale=scale))
    assert 0.9 * most < max(job.longest for job in jobs) <= most


# ---- rounds ----


@given(st.lists(st.integers(0, 99), min_size=1, unique=True), st.integers(0, 200))
def test_a_turned_prompt_has_the_same_tokens_in_another_order(prompt: list[int], number: int) -> None:
    shape = RequestShape(tuple(prompt), 3, 1.5)
    other = turned(shape, number)
    assert sorted(other.prompt) == sorted(prompt)
    assert other[1:] == shape[1:]
    assert (other == shape) is (number % len(prompt) == 0)


class OneAtATime:
    """Answers no request before the last one has come."""

    def __init__(self, num_calls: int) -> None:
        self.calls: list[list[Sequence[int]]] = []
        self._all_came = asyncio.Event()
        self._num_calls = num_calls

    async def stream(
        self, prompts: list[Sequence[int]], params: list[SamplingParams]
    ) -> AsyncGenerator[Delta | RequestOutput, None]:
        self.calls.append(prompts)
        if len(self.calls) == self._num_calls:
            self._all_came.set()
        await self._all_came.wait()
        for place, each in reversed(list(enumerate(params))):
            for _ in range(each.max_tokens):
                yield Delta(place, 0, (5,), "", (), None)


def test_requests_are_sent_when_they_are_due_whatever_became_of_others() -> None:
    shapes = [RequestShape((1,), 1), RequestShape((2, 2), 3), RequestShape((3, 3, 3), 2, arrival_s=0.05)]

    async def run() -> tuple[OneAtATime, list[RequestReading]]:
        engine = OneAtATime(num_calls=2)
        return engine, await asyncio.wait_for(play(cast("AsyncEngine", engine), shapes), timeout=30)

    engine, readings = asyncio.run(run())
    assert engine.calls == [[(1,), (2, 2)], [(3, 3, 3)]]
    assert [(each.num_prompt_tokens, len(each.token_s), each.arrival_s) for each in readings] == [
        (1, 1, 0.0),
        (2, 3, 0.0),
        (3, 2, 0.05),
    ]
    assert min(each.token_s[0] for each in readings) >= 0.05


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[AsyncEngine]:
    served = AsyncEngine(**sections(tiny))
    yield served
    served.close()


def test_a_round_brings_every_token_and_every_step_and_finds_no_prefix(engine: AsyncEngine) -> None:
    source = random.Random(3)
    shapes = [RequestShape(tuple(source.choices(range(VOCAB), k=40)), 5, 0.02 * place) for place in range(6)]
    numbers: list[int] = []
    rounds = asyncio.run(measure(engine, shapes, 2, numbers.append))
    assert numbers == [0, 1, 2]
    assert engine.config.engine.prefix_cache
    seen = []
    for taken in rounds:
        assert (taken.prompt_tokens, taken.output_tokens, taken.cached_tokens) == (240, 30, 0)
        ((done,),) = taken.stages
        assert len(done) == taken.steps > 0
        seen += [step.step for step in done]
    assert seen == list(range(seen[0], engine.replica_stats()[0].steps))


# ---- the command ----


def phalanx(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny_config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(json.dumps(sections(tiny)))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """All of `phalanx bench throughput` on two stages, and the directory with what it wrote."""
    folder = tmp_path_factory.mktemp("out")
    files = ("--json", folder / "out.json", "--plot", folder / "out.png", "--trace", folder / "trace.json")
    open_loop = ("--rate", 100, "--num-requests", 5, "--ttft-limit-ms", 1e6, "--tpot-limit-ms", 0)
    options = ("--scale", 0.1, "--rounds", 2, "--seed", 7, *open_loop, *files)
    result = phalanx("bench", "throughput", tiny_config, *options, "--set", "parallel.pipeline=2")
    assert result.exit_code == 0, f"{result.exception} {result.stderr}"
    return result, folder


@pytest.fixture(scope="module")
def report(run: tuple[Result, Path]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((run[1] / "out.json").read_text())
    return data


def test_the_table_goes_to_standard_output_and_all_else_to_standard_error(run: tuple[Result, Path]) -> None:
    result, _ = run
    for part in ("W2", "output tokens/s", "stage 1 busy", "goodput", "median", "start-up", "peak memory"):
        assert part in result.stdout
        assert part not in result.stderr
    assert "ready in" in result.stderr


def test_the_json_says_what_was_measured_and_where(report: dict[str, Any]) -> None:
    assert report["config"]["model"] == "tiny"
    assert report["config"]["dtype"] == "float32"
    assert report["config"]["layout"] == "1+1 ranks, 2+2 layers"
    assert set(report["machine"]) == {"processor", "num_cores", "gpus", "python", "torch"}
    assert {"model", "imports", "rendezvous", "weights", "warmup", "total"} <= set(report["startup_s"])
    memory = report["peak_memory"]
    assert 0 < memory["largest_rank_bytes"] < memory["ranks_bytes"] < 2 * memory["largest_rank_bytes"]


def test_the_json_has_the_workloads_as_they_were_run(report: dict[str, Any]) -> None:
    assert list(report["workloads"]) == ["W2", "W3", "W4"]
    parameters = {name: each["parameters"] for name, each in report["workloads"].items()}
    assert {(each["seed"], each["scale"]) for each in parameters.values()} == {(7, 0.1)}
    assert parameters["W3"]["prompt_tokens"] == {"least": 102, "most": 102, "total": 816}
    assert parameters["W4"]["num_requests"] == 5
    assert parameters["W4"]["rate_per_s"] == 100
    assert parameters["W4"]["limits"] == {"time_to_first_token_s": 1000.0, "time_per_output_token_s": 0.0}


def test_the_json_has_the_readings_of_every_round(report: dict[str, Any]) -> None:
    for workload in report["workloads"].values():
        rounds = workload["rounds"]
        assert len(rounds) == 2
        for taken in rounds:
            assert len(taken["requests"]) == workload["parameters"]["num_requests"]
            tokens = sum(request["output_tokens"] for request in taken["requests"])
            assert tokens == workload["parameters"]["output_tokens"]["total"]
            assert taken["prompt_tokens_cached"] == 0
            assert taken["steps"] > 0
            ((first, second),) = taken["stage_busy"]
            assert 0 < first <= 1
            assert 0 < second <= 1
        for name, spread in workload["figures"].items():
            values = [taken["figures"][name] for taken in rounds]
            assert (spread["least"], spread["most"]) == (min(values), max(values))
            assert spread["median"] == statistics.median(values)


def test_what_was_typed_is_kept_without_this_machines_paths(run: tuple[Result, Path], report: dict[str, Any]) -> None:
    assert report["command"].split("throughput ")[1] == (
        "tiny.yaml --rate 100.0 --num-requests 5 --ttft-limit-ms 1000000.0 --tpot-limit-ms 0.0 --rounds 2 --seed 7 "
        "--scale 0.1 --json out.json --plot out.png --trace trace.json --set parallel.pipeline=2"
    )
    assert str(run[1].parent) not in (run[1] / "out.json").read_text()


def test_the_plot_is_a_png_with_something_in_it(run: tuple[Result, Path]) -> None:
    picture = (run[1] / "out.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 20_000


def test_the_trace_has_the_last_round_of_each_workload(run: tuple[Result, Path], report: dict[str, Any]) -> None:
    trace = json.loads((run[1] / "trace.json").read_text())
    steps = [event["args"]["step"] for event in trace["traceEvents"] if event.get("cat") == "step"]
    num_steps = sum(workload["rounds"][-1]["steps"] for workload in report["workloads"].values())
    assert len(steps) == 2 * num_steps  # two ranks
    assert len(set(steps)) == num_steps
    assert {event["args"]["step"] for event in trace["traceEvents"] if event.get("cat") == "transfer"} == set(steps)


def test_a_plot_of_replicas_and_of_runs_without_steps(tmp_path: Path) -> None:
    from phalanx.launcher.trace_plot import plot_runs

    def run(*stages: Sequence[StageStep]) -> TracedRun:
        return TracedRun(
            tuple(
                tuple(
                    TracedRank(
                        RankPlace(replica, rank, rank, 0), RankTrace(rank, tuple(mine), (), {}, ClockReading(), 0)
                    )
                    for rank, mine in enumerate(stages)
                )
                for replica in range(2)
            )
        )

    path = tmp_path / "out.png"
    plot_runs("title", [("busy", run(FIRST, SECOND)), ("idle", run((), ())), ("nobody", TracedRun(((),)))], path)
    assert path.read_bytes().startswith(PNG)


def test_a_plot_without_matplotlib_is_refused_before_a_start(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "phalanx.launcher.trace_plot", raising=False)
    result = phalanx("bench", "latency", tiny_config, "--plot", tmp_path / "out.png")
    assert isinstance(result.exception, PhalanxError)
    assert "pip install 'phalanx[plot]'" in str(result.exception)
    assert "ready in" not in result.stderr


def test_a_directory_that_is_not_there_is_refused_before_a_start(tiny_config: Path, tmp_path: Path) -> None:
    result = phalanx("bench", "latency", tiny_config, "--json", tmp_path / "missing" / "out.json")
    assert result.exit_code == 2
    assert "there is no directory" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "W9"), "'W9' is no workload; known: W1, W2, W3, W4"),
        (("--rate", 0), "a rate above 0"),
        (("--set", "paralel.tensor=2"), "did you mean `parallel`"),
    ],
)
def test_errors_name_cause_and_remedy(tiny_config: Path, arguments: tuple[object, ...], message: str) -> None:
    result = phalanx("bench", "throughput", tiny_config, *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_latency_of_the_built_in_model(smollm2: ModelSource, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    config = ROOT / "configs" / "single.yaml"
    # One thread: threads that wait for each other take long where other programs run too.
    quick = ("--scale", 0.05, "--rounds", 1, "--set", "cluster.cpus_per_rank=1")
    result = phalanx("bench", "latency", config, *quick, "--json", path)
    assert result.exit_code == 0, f"{result.exception} {result.stderr}"
    report = json.loads(path.read_text())
    assert report["config"]["model"] == smollm2.name
    (taken,) = report["workloads"]["W1"]["rounds"]
    assert taken["figures"]["time_to_first_token_s"] > 0
    assert taken["figures"]["time_per_output_token_s"] > 0
    assert "time per output token" in result.stdout
