from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from phalanx.cli import app
from phalanx.comm.machine import find_obstacle
from phalanx.errors import ModelError
from phalanx.launcher.check import CheckReport, check
from phalanx.launcher.machine import Gpu, Machine, this_machine
from phalanx.launcher.rank_plan import RankPlan
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.shape import ModelShape

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIB = 2**30

SMALL = DecoderConfig(
    "llama", ModelShape(576, 30, 9, 3, 64, 1536, 49152), 8192, 1e-5, RopeConfig(), tie_embeddings=True
)
LARGE = DecoderConfig("llama", ModelShape(8192, 80, 64, 8, 128, 28672, 128256), 131072, 1e-5, RopeConfig())

LAPTOP = Machine(num_cores=2, memory_bytes=8 * GIB, free_bytes=6 * GIB, bfloat16=True)
OLD_LAPTOP = replace(LAPTOP, bfloat16=False)
ONE_GPU = replace(LAPTOP, gpus=(Gpu("H100", 80 * GIB),))
FOUR_GPUS = Machine(64, 512 * GIB, 400 * GIB, bfloat16=True, gpus=(Gpu("H100", 80 * GIB),) * 4)


@dataclass(frozen=True)
class Found:
    name: str
    config: DecoderConfig
    kind: str = "safetensors"

    def known_entries(self) -> dict[str, TensorEntry]:
        return {}


def look_up(path: str, revision: str | None) -> Found:
    models = {"smollm2-135m": SMALL, "small": SMALL, "half": replace(SMALL, dtype="float16")}
    models |= {"shape:llama-3.1-70b": LARGE}
    if path not in models:
        raise ModelError(f"no model {path!r}; name a directory")
    return Found(path, models[path], "shape" if path.startswith("shape:") else "safetensors")


def checked(source: Any, *overrides: str, machine: Machine = LAPTOP) -> CheckReport:
    return check(source, overrides, machine=machine, look_up=look_up)


def small(*overrides: str, machine: Machine = LAPTOP) -> CheckReport:
    return checked({"model": "small", "engine": {"kv_cache": "64MiB"}}, *overrides, machine=machine)


def choice(report: CheckReport, name: str) -> str:
    (found,) = [decision.choice for decision in report.decisions if decision.name == name]
    return found


def error_paths(report: CheckReport) -> list[str]:
    return [problem.path for problem in report.errors]


# Who holds what, and how much of it


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_configuration_passes_on_a_small_machine_without_a_gpu(path: Path) -> None:
    report = checked(path)
    assert report.errors == ()
    assert report.exit_code == 0


def test_the_ready_configurations_are_the_promised_ones() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"demo", "single", "pipeline", "ragged", "two-nodes", "h100-8x", "two-nodes-16x-h100"}


def test_one_rank_holds_the_published_number_of_parameters() -> None:
    # SmolLM2-135M has 134,515,008 parameters, its tied head counted once.
    (rank,) = small().to_json()["layout"]
    assert rank["parameters"] == 134_515_008
    assert rank["weight_bytes"] == 2 * 134_515_008
    # 30 layers of 3 heads of 64, keys and values, in two bytes
    assert rank["kv_bytes_per_token"] == 30 * 3 * 64 * 2 * 2


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_cache_in_8_bits_holds_nearly_twice_the_tokens(kv_cache_dtype: str) -> None:
    plain, found = small(), small(f"engine.kv_cache_dtype={kv_cache_dtype}")
    rank, totals = found.to_json()["layout"][0], found.to_json()["totals"]
    assert rank["kv_bytes_per_token"] == 30 * 3 * 2 * (64 + 2)  # a byte a number, and a scale in two
    assert 1.93 < totals["kv_capacity_tokens"] / plain.to_json()["totals"]["kv_capacity_tokens"] < 2
    assert choice(found, "KV cache dtype") == kv_cache_dtype


def test_a_cache_in_another_format_is_refused_with_those_there_are() -> None:
    [error] = small("engine.kv_cache_dtype=fp4").errors
    assert (error.path, error.allowed) == ("engine.kv_cache_dtype", "auto, int8, fp8")


def test_the_demo_shows_nine_heads_cut_over_two_ranks() -> None:
    ranks = checked(CONFIGS / "demo.yaml").to_json()["layout"]
    assert [rank["query_heads"] for rank in ranks] == [[0, 5], [5, 9], [0, 5], [5, 9]]
    assert [rank["kv_heads"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert ranks[0]["layers"] == ranks[1]["layers"]
    assert ranks[0]["layers"][1] == ranks[2]["layers"][0]
    assert ranks[3]["layers"][1] == 30


def test_a_stage_in_the_middle_holds_no_vocabulary() -> None:
    ranks = small("parallel.pipeline=3").to_json()["layout"]
    assert [rank["vocab_rows"] for rank in ranks] == [[0, 49152], None, [0, 49152]]


@pytest.mark.parametrize(
    ("overrides", "machine", "head"),
    [
        (["parallel.pipeline=2"], LAPTOP, "first 50%, last 50%"),
        (["parallel.pipeline=2", "parallel.tensor=2"], LAPTOP, "first 50%, last 50%"),
        (["parallel.pipeline=2", "parallel.head=last"], LAPTOP, "last stage"),
        (["parallel.pipeline=2"], OLD_LAPTOP, "last stage"),
        (["parallel.pipeline=2", "parallel.head=shared"], OLD_LAPTOP, "first 50%, last 50%"),
        (["parallel.pipeline=2"], FOUR_GPUS, "last stage"),
        (["parallel.pipeline=2", "cluster.ray=auto", "cluster.device=cpu"], LAPTOP, "last stage"),
        (["parallel.stages=[{tensor: 2}, {tensor: 1}]"], LAPTOP, "last stage"),
    ],
)
def test_the_head_is_shared_where_that_pays(overrides: list[str], machine: Machine, head: str) -> None:
    report = small("cluster.ray=none", *overrides, machine=machine)
    assert choice(report, "head") == head
    assert report.plan is not None
    rows = [row for stage in report.plan.layout.stages for row in stage.head]
    assert sum(row.size for row in rows) == 49152


def test_a_shared_head_takes_memory_from_the_last_stage_and_none_of_the_first() -> None:
    plans = [
        small("parallel.stages=[{layers: 15}, {layers: 15}]", f"parallel.head={head}").plan
        for head in ("last", "shared")
    ]
    (first, last), (first_sharing, last_sharing) = (plan.ranks for plan in plans if plan is not None)
    assert first_sharing.weight_bytes == first.weight_bytes
    assert last.weight_bytes - last_sharing.weight_bytes == 49152 // 2 * 576 * 2


def test_sharing_a_head_on_gpus_is_exit_code_2() -> None:
    report = small("parallel.pipeline=2", "parallel.head=shared", machine=FOUR_GPUS)
    assert report.exit_code == 2
    assert any("GPUs do not" in str(problem) for problem in report.errors)


def test_replicas_repeat_the_layout_and_multiply_the_totals() -> None:
    one, two = small("parallel.tensor=2").to_json(), small("parallel.tensor=2", "parallel.replicas=2").to_json()
    assert [rank["replica"] for rank in two["layout"]] == [0, 0, 1, 1]
    assert two["totals"]["ranks"] == 4
    for key in ("parameters", "weight_bytes", "kv_bytes", "kv_capacity_tokens"):
        assert two["totals"][key] == 2 * one["totals"][key]
    assert two["totals"]["model_parameters"] == one["totals"]["model_parameters"] == 134_515_008


def test_the_tightest_rank_decides_how_many_tokens_the_cache_holds() -> None:
    report = checked(CONFIGS / "ragged.yaml", "engine.kv_cache=10MB")
    ranks = report.to_json()["layout"]
    per_token = [rank["kv_bytes_per_token"] for rank in ranks]
    totals = report.to_json()["totals"]
    assert totals["kv_tightest_rank"] == per_token.index(max(per_token))
    assert totals["kv_capacity_tokens"] == 10_000_000 // (max(per_token) * 16) * 16
    assert all(rank["kv_bytes"] == totals["kv_capacity_tokens"] * rank["kv_bytes_per_token"] <= 10**7 for rank in ranks)


# Decisions


@pytest.mark.parametrize(
    ("machine", "overrides", "device", "dtype"),
    [
        (LAPTOP, [], "cpu", "bfloat16"),
        (OLD_LAPTOP, [], "cpu", "float32"),
        (OLD_LAPTOP, ["model.dtype=bfloat16"], "cpu", "bfloat16"),
        (LAPTOP, ["model.path=half"], "cpu", "bfloat16"),
        (ONE_GPU, [], "cuda", "bfloat16"),
        (ONE_GPU, ["model.path=half"], "cuda", "float16"),
        (ONE_GPU, ["cluster.device=cpu"], "cpu", "bfloat16"),
        (ONE_GPU, ["cluster.gpus_per_rank=0"], "cpu", "bfloat16"),
        (LAPTOP, ["cluster.ray=auto", "cluster.gpus_per_rank=1"], "cuda", "bfloat16"),
        (LAPTOP, ["cluster.ray=auto", "parallel.stages=[{accelerator: H100}]"], "cuda", "bfloat16"),
    ],
)
def test_device_and_dtype_are_chosen_by_the_machine(
    machine: Machine, overrides: list[str], device: str, dtype: str
) -> None:
    report = small(*overrides, machine=machine)
    assert (choice(report, "device"), choice(report, "dtype")) == (device, dtype)


@pytest.mark.parametrize(
    ("num_ranks", "cpus", "threads"), [(1, 2.0, 2), (2, 1.0, 1), (3, 0.6666, 1), (4, 0.5, 1), (9, 0.2222, 1)]
)
def test_the_cores_of_this_machine_are_dealt_over_its_ranks(num_ranks: int, cpus: float, threads: int) -> None:
    plan = small(f"parallel.tensor={num_ranks}").plan
    assert plan is not None
    assert (plan.cpus_per_rank, plan.num_threads) == (cpus, threads)
    assert plan.cpus_per_rank * num_ranks <= LAPTOP.num_cores


def test_threads_on_a_cluster_elsewhere_are_left_to_the_node_unless_given() -> None:
    left, given = small("cluster.ray=auto").plan, small("cluster.ray=auto", "cluster.cpus_per_rank=4").plan
    assert left is not None
    assert given is not None
    assert (left.cpus_per_rank, left.num_threads) == (1.0, 0)
    assert (given.cpus_per_rank, given.num_threads) == (4.0, 4)


@pytest.mark.parametrize(("num_ranks", "gpus"), [(1, 1.0), (4, 1.0), (5, 0.5), (8, 0.5), (9, 0.3333)])
def test_ranks_share_gpus_only_where_there_are_fewer(num_ranks: int, gpus: float) -> None:
    plan = small(f"parallel.tensor={num_ranks}", machine=FOUR_GPUS).plan
    assert plan is not None
    assert plan.gpus_per_rank == gpus
    assert plan.backend == ("gloo" if gpus < 1 else "auto")


def test_the_longest_sequence_is_bounded_by_the_model_and_the_cache() -> None:
    assert choice(small("engine.kv_cache=1GiB"), "longest sequence") == "8192 tokens"
    assert choice(small("engine.kv_cache=1474560"), "longest sequence") == "64 tokens"
    assert choice(small("model.max_length=100"), "longest sequence") == "100 tokens"


def test_every_group_of_ranks_gets_a_communicator() -> None:
    report = checked(CONFIGS / "ragged.yaml")
    assert choice(report, "comm in stage 1") == "single"
    assert choice(report, "comm in stage 0") == choice(report, "comm between stages") != "single"


def test_every_decision_has_a_reason() -> None:
    assert all(decision.reason for decision in checked(CONFIGS / "h100-8x.yaml").decisions)


def test_a_cluster_elsewhere_is_noted_and_not_an_error() -> None:
    report = checked(CONFIGS / "two-nodes-16x-h100.yaml")
    assert report.ok
    assert any("cluster.ray is auto" in note for note in report.notes)
    assert any("no weights" in note for note in report.notes)


@pytest.mark.skipif(bool(find_obstacle("cpu")), reason=f"shared memory: {find_obstacle('cpu')}")
@pytest.mark.parametrize("ranks", [2, 3])
def test_on_a_cluster_elsewhere_the_backend_depends_on_where_its_ranks_are(ranks: int) -> None:
    elsewhere = ("cluster.ray=auto", "cluster.device=cpu", f"parallel.tensor={ranks}", "parallel.pipeline=1")
    (comm,) = (each for each in checked(CONFIGS / "demo.yaml", *elsewhere).decisions if each.name.startswith("comm"))
    assert comm.choice == "shm or hierarchical"
    assert "shm where its ranks are all on one machine" in comm.reason


# What is wrong, and whose fault it is


def test_a_bad_file_is_exit_code_2_with_every_problem() -> None:
    report = checked({"model": "small", "engine": {"seed": "x", "zebra": 1}})
    assert (report.exit_code, sorted(error_paths(report))) == (2, ["engine.seed", "engine.zebra"])


def test_a_layout_that_cannot_be_cut_is_exit_code_2_with_figures() -> None:
    report = checked(CONFIGS / "demo.yaml", "parallel.pipeline=31")
    assert (report.exit_code, error_paths(report)) == (2, ["parallel"])
    assert "31" in report.errors[0].message
    assert "30" in report.errors[0].message
    assert report.errors[0].line is not None


def test_more_ranks_than_heads_is_exit_code_2() -> None:
    report = small("parallel.tensor=10")
    assert report.exit_code == 2
    assert "9 query heads" in report.errors[0].message


def test_a_model_that_is_not_found_is_exit_code_3() -> None:
    report = checked({"model": "nowhere"})
    assert (report.exit_code, error_paths(report)) == (3, ["model.path"])
    assert "name a directory" in report.errors[0].message


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["model.max_length=8193"], "model.max_length"),
        (["engine.kv_cache=100"], "engine.kv_cache"),
        (["engine.kv_cache=1MiB", "model.max_length=8192"], "engine.kv_cache"),
        (["comm.backend=glo"], "comm.backend"),
        (["comm.backend=glo", "cluster.ray=auto", "cluster.device=cuda"], "comm.backend"),
        (["comm.backend=single", "parallel.tensor=2"], "comm.backend"),
        (["cluster.device_memory=100MB"], "cluster.device_memory"),
    ],
)
def test_figures_that_contradict_the_model_are_exit_code_2(overrides: list[str], path: str) -> None:
    report = small(*overrides)
    assert (report.exit_code, error_paths(report)) == (2, [path])


@pytest.mark.parametrize(
    ("overrides", "machine", "path"),
    [
        (["cluster.device=cuda"], LAPTOP, "cluster.device"),
        (["cluster.device=cuda", "comm.backend=nccl", "parallel.tensor=2"], LAPTOP, "cluster.device"),
        (["cluster.cpus_per_rank=1.5", "parallel.tensor=2"], LAPTOP, "cluster.cpus_per_rank"),
        (["cluster.gpus_per_rank=1", "parallel.tensor=2"], ONE_GPU, "cluster.gpus_per_rank"),
        (["cluster.gpus_per_rank=0.6", "parallel.tensor=8"], FOUR_GPUS, "cluster.gpus_per_rank"),
        (["engine.kv_cache=9GiB"], LAPTOP, "engine.kv_cache"),
        (["engine.kv_cache=2GiB", "parallel.replicas=4"], LAPTOP, "engine.kv_cache"),
        (["engine.kv_cache=80GiB"], ONE_GPU, "engine.kv_cache"),
        (["engine.kv_cache=50GiB", "cluster.gpus_per_rank=0.5"], ONE_GPU, "engine.kv_cache"),
    ],
)
def test_what_this_machine_lacks_is_exit_code_3(overrides: list[str], machine: Machine, path: str) -> None:
    report = small(*overrides, machine=machine)
    assert (report.exit_code, error_paths(report)) == (3, [path])


@pytest.mark.parametrize(("quantization", "bits"), [("fp8", 8), ("w8a8", 8), ("int4", 5)])
def test_quantised_weights_are_counted_on_gpus_as_on_cpus(quantization: str, bits: int) -> None:
    def plan(device: str) -> RankPlan:
        report = small(f"model.quantization={quantization}", f"cluster.device={device}", machine=ONE_GPU)
        assert report.ok
        assert report.plan is not None
        return report.plan.ranks[0]

    on_gpu, on_cpu = plan("cuda"), plan("cpu")
    assert on_gpu.weight_bytes / on_gpu.parameters == pytest.approx(on_cpu.weight_bytes / on_cpu.parameters, rel=1e-3)
    assert bits / 8 <= on_gpu.weight_bytes / on_gpu.parameters < 1.02


def test_plain_processes_may_take_more_cores_than_there_are() -> None:
    assert small("cluster.ray=none", "cluster.cpus_per_rank=2", "parallel.tensor=2").ok


def test_the_cache_that_is_asked_for_is_the_cache_that_is_enough() -> None:
    short = small("engine.kv_cache=1MiB", "model.max_length=8192").errors[0]
    assert short.allowed is not None
    num_bytes = int(short.allowed.split("(")[1].split()[0])
    assert small(f"engine.kv_cache={num_bytes}", "model.max_length=8192").ok
    assert not small(f"engine.kv_cache={num_bytes - 1}", "model.max_length=8192").ok


def test_seventy_billion_parameters_do_not_fit_two_h100s() -> None:
    report = checked(CONFIGS / "h100-8x.yaml", "parallel.tensor=2", "engine.kv_cache=8GiB")
    assert report.exit_code == 2
    assert "weights 65.7 GiB" in report.errors[0].message
    assert checked(CONFIGS / "h100-8x.yaml", "parallel.tensor=4").exit_code == 2
    assert checked(CONFIGS / "h100-8x.yaml", "parallel.tensor=4", "engine.kv_cache=32GiB").ok


def test_faults_of_the_file_come_before_those_of_the_machine() -> None:
    report = small("cluster.device=cuda", "model.max_length=9000")
    assert report.exit_code == 2
    assert set(error_paths(report)) == {"cluster.device", "model.max_length"}


# The command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check", *arguments])


def test_the_command_prints_layout_memory_and_decisions() -> None:
    result = run(str(CONFIGS / "two-nodes-16x-h100.yaml"))
    assert result.exit_code == 0, result.output
    for text in ("40-79", "112256-128255", "20 KiB", "whole stages", "131072 tokens", ": good"):
        assert text in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_the_command_names_the_tightest_rank_and_the_room_of_all() -> None:
    result = run(str(CONFIGS / "ragged.yaml"), "--set", "engine.kv_cache=256MiB")
    text = " ".join(result.output.split())
    # 10 KiB a token on the first two ranks, 5 on the third, 7.5 on the fourth, in pages of 16 tokens
    assert "holds 26208 tokens, as many as fit rank 0 in stage 0, the tightest." in text
    assert "26208 on ranks 0-1, 52416 on rank 2, 34944 on rank 3." in text


def test_the_command_says_what_is_measured_at_start_and_what_is_an_estimate() -> None:
    auto = (str(CONFIGS / "two-nodes.yaml"), "--set", "engine.kv_cache=auto")
    result = run(*auto)
    assert result.exit_code == 0, result.output
    assert "What the KV cache holds is measured at start" in result.output
    assert "rank 0 in stage 0 on place=first is the tightest" in " ".join(result.output.split())
    estimated = run(*auto, "--set", "cluster.device_memory=2GiB")
    assert "is measured at start; by an estimate it holds" in " ".join(estimated.output.split())


def test_the_command_prints_json_with_stable_keys() -> None:
    result = run(str(CONFIGS / "h100-8x.yaml"), "--json")
    report = json.loads(result.stdout)
    assert set(report) == {"ok", "exit_code", "source", "model", "layout", "totals", "choices", "errors", "notes"}
    assert report["ok"] is True
    assert len(report["layout"]) == report["totals"]["ranks"] == 8
    assert report["totals"]["model_parameters"] == 70_553_706_496  # as published
    assert report["totals"]["largest_rank_bytes"] < report["totals"]["device_memory"] == 80_000_000_000
    assert {"name", "choice", "reason"} == set(report["choices"][0])


def test_the_command_takes_overrides_and_returns_exit_code_2_for_a_bad_one() -> None:
    result = run(str(CONFIGS / "h100-8x.yaml"), "--set", "parallel.tensr=2", "--set", "engine.page_size=0", "--json")
    assert result.exit_code == 2
    errors = {problem["path"]: problem for problem in json.loads(result.stdout)["errors"]}
    assert errors["parallel.tensr"]["suggestion"] == "did you mean `tensor`?"
    assert errors["engine.page_size"]["found"] == "0 (from --set)"


def test_the_command_prints_every_problem_of_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: tiny\nparallel: {tensr: 2}\nengine: {seed: x}\n")
    result = run(str(path))
    assert result.exit_code == 2
    for text in (
        "3 problems",
        "model.path",
        "parallel.tensr (line 2)",
        "did you mean `tensor`?",
        "engine.seed (line 3)",
    ):
        assert text in result.output


def test_what_the_model_forbids_is_told_beside_what_the_schema_refuses() -> None:
    result = run(str(CONFIGS / "h100-8x.yaml"), "--set", "parallel.tensor=65", "--set", "engine.kvcache=1")
    assert result.exit_code == 2
    for text in ("2 problems", "did you mean `kv_cache`?", "the model has 64 query heads"):
        assert text in " ".join(result.output.split())


def test_the_command_returns_exit_code_3_for_a_model_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "lost.yaml"
    path.write_text("model: ./no-such-model.gguf\n")
    result = run(str(path))
    assert result.exit_code == 3
    assert "no-such-model" in result.output


def test_this_machine_says_what_it_has() -> None:
    machine = this_machine()
    assert machine.num_cores >= 1
    if machine.memory_bytes is None or machine.free_bytes is None:
        pytest.skip("needs Linux, to know of memory")
    assert 2**20 < machine.free_bytes < machine.memory_bytes


def test_help_and_version_load_neither_torch_nor_ray() -> None:
    script = (
        "import sys\n"
        "from phalanx.cli import app\n"
        "for arguments in (['--help'], ['--version'], ['check', '--help']):\n"
        "    try: app(arguments)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "check" in done.stdout
