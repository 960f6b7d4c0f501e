"""`make gpu` away from a GPU: how its parts are run, what is made of their figures, and what a CPU can run of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu import MOST_LINES, ROOT, STAND_IN, bring_out, slug, summary, the_parts, write_results
from benchmarks.gpu_parts.end_to_end import MODELS, Machine
from benchmarks.gpu_parts.kernels import NormInputs, measure, norm_to_fp8
from benchmarks.gpu_parts.limits import Outcome, Part, limit_s, run_parts
from benchmarks.gpu_parts.promises import promises
from benchmarks.gpu_parts.readings import Readings

from phalanx.engine.messages import StepPlan, StepResult
from phalanx.kernels.ceilings import Ceilings
from phalanx.launcher.bench_kernels.cases import Case, Maker, Sizes

HEAD: dict[str, Any] = {
    "device": "NVIDIA H100 80GB HBM3",
    "versions": {"torch": "2.11"},
    "date": "2026-01-01",
    "commit": None,
}


def shell(name: str, script: str, weight: float = 1.0) -> Part:
    """A part that is a few words of shell: $1 is where its figures go."""
    return Part(name, name, weight, lambda path, seconds: ["sh", "-c", script, "sh", str(path)])


def run(tmp_path: Path, parts: list[Part], total_s: float = 60.0) -> list[Outcome]:
    return run_parts(parts, total_s, tmp_path, os.environ, tmp_path)


def test_a_part_that_fails_says_why_and_the_next_one_runs(tmp_path: Path) -> None:
    broken, fine = run(tmp_path, [shell("broken", "echo no luck; exit 3"), shell("fine", """echo '{"us": 2}' > $1""")])
    assert (broken.ended, broken.figures, broken.said) == ("failed", {}, "no luck")
    assert (fine.ended, fine.figures, fine.said) == ("done", {"us": 2}, "")


def test_a_part_that_hangs_is_killed_with_what_it_started_and_leaves_what_it_wrote(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"""trap "" INT; echo '{{"us": 2}}' > $1; sleep 60 & echo $! > {pid}; wait; wait"""
    [hung, after] = run(tmp_path, [shell("hung", script, 1.0), shell("after", "true", 9.0)], 20.0)
    assert (hung.ended, hung.figures) == ("stopped", {"us": 2})
    assert after.ended == "done"
    assert ended(int(pid.read_text()))


def ended(pid: int) -> bool:
    """Whether a process is gone within ten seconds, or waits to be buried by whoever inherited it."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(1000):
        try:
            if stat.read_text().rpartition(") ")[2][0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_part_at_its_limit_may_write_down_what_it_has(tmp_path: Path) -> None:
    script = """trap 'echo "{\\"us\\": 7}" > $1; exit 0' INT; while :; do sleep 0.05; done"""
    [asked] = run(tmp_path, [shell("asked", script)], 2.0)
    assert (asked.ended, asked.figures) == ("stopped", {"us": 7})


def test_time_that_a_part_leaves_is_shared_by_all_that_come() -> None:
    parts = [shell("a", "", 1), shell("b", "", 2), shell("c", "", 1)]
    assert limit_s(parts, 40.0) == 10
    assert limit_s(parts[1:], 39.0) == 26
    assert limit_s(parts[2:], -1.0) == 0


def test_every_part_has_a_name_of_its_own_and_runs_what_is_there() -> None:
    parts = the_parts()
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        command = part.command(Path("figures.json"), 30.0)
        assert command[0] == sys.executable
        module = command[2].replace(".", "/") + ".py" if command[1] == "-m" else command[1]
        assert (ROOT / module).exists() or (ROOT / "src" / module).exists(), command
        assert all((ROOT / option).exists() for option in command if option.startswith("tests/"))


def outcome(part: str, ended: str = "done", **figures: Any) -> Outcome:
    return Outcome(part, part.split(maxsplit=1)[0], ended, 5.0, 10.0, "python ...", figures)


def decode(way: str, batch: int, share: float) -> dict[str, object]:
    return {"model": "1b", "batch": batch, "context": 1024, "way": way, "tokens_per_s": 800.0, "share_of_copy": share}


def test_the_table_is_short_and_tells_both_what_held_and_what_ran() -> None:
    steps = [decode(way, batch, 0.7) for batch in (1, 8, 64) for way in ("eager", "graphs", "captured")]
    prompts = [{"model": "1b", "prompt": n, "tokens_per_s": 9e4, "share_of_products": 0.4} for n in (512, 2048, 8192)]
    ends = [outcome(f"end to end {model}", decode=steps, prefill=prompts, ceilings={}) for model in ("1b", "8b")]
    lines = summary(HEAD, [*ends, outcome("nccl", "failed")])
    assert len(lines) <= MOST_LINES
    assert "nccl 5 s failed" in lines[1]
    told = "\n".join(lines)
    assert "0.70 (graphs)" in told
    assert "800 tok/s, 70%" in told
    assert "90000 tok/s, 40% of products" in lines[-1]


def test_promises_of_quantised_weights_are_beside_the_peers_they_name() -> None:
    def row(operator: str, load: str, peer: str, us: float, ratio: float) -> dict[str, object]:
        found = {"operator": operator, "load": load, "peer": peer, "us": us, "peer_over_this": ratio}
        return {"model": "8b", "share": 0.5, **found}

    rows = [
        row("linear_w4a16 o", "16 x 8192 x 8192", "torch", 20.0, 2.5),
        row("linear_w4a16 o", "16 x 8192 x 8192", "torch._weight_int4pack_mm", 20.0, 0.5),
        row("linear_fp8_w8a8 o", "1 x 4096 x 4096", "torch", 5.8, 2.0),
        row("linear_fp8_w8a8 o", "8192 x 8192 x 8192", "torch._scaled_mm", 900.0, 0.9),
    ]
    told = {each.promise: each for each in promises({"operators 8b": {"operators": rows}})}
    held = {name.split(":")[0]: each.held for name, each in told.items() if name.startswith(("W4A16", "fp8"))}
    assert held == {
        "W4A16, m 8-64, 8192^2": True,
        "W4A16, m 8-64, 4096^2": None,
        "fp8, m 1": True,
        "fp8 8192^3": False,
    }


def test_results_say_where_when_and_of_what_they_are_and_are_brought_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / slug(HEAD["device"])
    folder.mkdir()
    write_results(folder, HEAD, [outcome("tests a", passed=1), outcome("tests b", "failed", passed=2), outcome("nccl")])
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    bring_out(folder, time.time() + 60)
    brought = tmp_path / "out" / "nvidia-h100-80gb-hbm3"
    assert sorted(path.name for path in brought.iterdir()) == ["nccl.json", "tests.json"]
    read = json.loads((brought / "tests.json").read_text())
    assert {key: read[key] for key in HEAD} == HEAD
    assert {name: (part["ended"], part["passed"]) for name, part in read["parts"].items()} == {
        "tests a": ("done", 1),
        "tests b": ("failed", 2),
    }


def test_the_run_prints_its_table_last_and_fails_with_any_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [shell("nccl", "exit 1"), shell("tuning", "true"), shell("tests", "true")]
    monkeypatch.setattr(gpu, "device_name", lambda: "A GPU/2")
    monkeypatch.setattr(gpu, "the_parts", lambda: parts)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    for only, code in (("n", 1), ("t", 0)):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", only, "--minutes", "1"])
        if code:
            with pytest.raises(SystemExit) as failed:
                gpu.main()
            assert failed.value.code == code
        else:
            gpu.main()
        table = (tmp_path / "a-gpu-2" / "summary.md").read_text()
        assert capsys.readouterr().out.endswith("\n" + table)
    assert "parts: tuning" in table
    read = json.loads((tmp_path / "a-gpu-2" / "tuning.json").read_text())
    assert (read["device"], read["parts"]["tuning"]["ended"]) == ("A GPU/2", "done")
    assert {"python", "torch"} <= set(read["versions"])


ENDED = """
import sys
from pathlib import Path
from benchmarks import gpu
from benchmarks.gpu_parts.limits import Part

def part(name, script):
    return Part(name, name, 1.0, lambda path, seconds: ["sh", "-c", script, "sh", str(path)])

gpu.device_name = lambda: "A GPU"
gpu.the_parts = lambda: [part("one", "echo '{\\"us\\": 2}' > $1; exec sleep 60"), part("two", "true")]
gpu.RESULTS = Path(sys.argv.pop())
gpu.main()
"""


def test_a_run_that_is_ended_leaves_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", ENDED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "TMPDIR": str(tmp_path)}
    environment.pop("OUT", None)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        while not list(tmp_path.glob("*/one.json")):  # what the part has written
            assert run.poll() is None
            time.sleep(0.02)
        run.terminate()
        table = run.stdout.read()
    assert run.returncode == 1
    read = json.loads((tmp_path / "a-gpu" / "one.json").read_text())
    assert (read["parts"]["one"]["ended"], read["parts"]["one"]["us"]) == ("interrupted", 2)
    assert "== one: interrupted" in table
    assert not (tmp_path / "a-gpu" / "two.json").exists()


def test_the_step_that_is_captured_draws_what_the_runner_does() -> None:
    fp32, cpu = torch.float32, torch.device("cpu")
    with torch.inference_mode():
        torch.manual_seed(3)
        machine = Machine(MODELS["tiny"], cpu, fp32)
        drawn = machine.fixed_step(3)()
        runner = machine.runner(machine.decoder())
        runner.run(machine.begin(3))
        result = runner.run(StepPlan(1, decodes=(0, 1, 2))).result
    assert isinstance(result, StepResult)
    assert tuple(drawn.tolist()) == result.tokens
    assert len(set(result.tokens)) > 1


def test_an_operator_that_fails_or_cannot_be_made_is_written_down_and_the_next_one_is_measured(tmp_path: Path) -> None:
    cpu = torch.device("cpu")

    def refused(_: int) -> None:
        raise RuntimeError("no room")

    rounded = norm_to_fp8(*NormInputs.make(Maker(Sizes(64, 1, 1, 64, 64, 1), torch.float32, cpu), 4096))

    def broken_and_unmade() -> Iterator[Case]:
        yield Case("broken", "1 row", refused, None, 1, 1.0)
        raise MemoryError("no weights")

    groups = [broken_and_unmade(), iter([rounded])]
    path = tmp_path / "figures.json"
    measure(Readings(path, 60.0), "8b", groups, Ceilings(1e9, 1e9), cpu)
    figures = json.loads(path.read_text())
    broken, measured = figures["operators"]
    assert figures["unmade"] == ["MemoryError: no weights"]
    assert broken["error"] == "RuntimeError: no room"
    assert measured["share"] == pytest.approx(measured["least_us"] / measured["us"])
    assert measured["least_us"] == pytest.approx(1e6 * (3 * 4 + 1) * 4096 * 64 / 1e9)


def test_no_reading_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    readings = Readings(tmp_path / "figures.json", 0.0)
    time.sleep(0.001)
    assert not readings.take("operators", {}, lambda: {"us": 1.0})
    assert json.loads((tmp_path / "figures.json").read_text()) == {"left_out": 1}


def test_tests_are_counted_with_why_they_failed_or_were_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_fine(): pass\n"
        "def test_wrong(): assert 1 == 2, 'one is not two'\n"
        "def test_absent(): pytest.skip('needs a GPU')\n"
    )
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu_parts.run_tests", "--json", str(path), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    counted = json.loads(path.read_text())
    assert (counted["passed"], counted["failed"], counted["skipped"]) == (1, 1, 1)
    [why] = counted["failures"].values()
    assert "one is not two" in why
    [skip] = counted["skips"]
    assert "needs a GPU" in skip


# What the machine with the GPU need not have. The end-to-end part also runs there, on its CPU.
WITHOUT = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        absent = "msgspec zmq pydantic typer rich ray tokenizers gguf huggingface_hub jinja2 yaml cupy triton".split()
        if name.partition(".")[0] in absent and not (name == "msgspec" and stand_in):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

stand_in = sys.argv.pop(1)
sys.path.insert(0, stand_in)
sys.meta_path.insert(0, Refuse())
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def test_whole_steps_are_measured_with_only_what_the_gpu_machine_has(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["--model", "tiny", "--device", "cpu", "--json", str(path)]
    command = [sys.executable, "-c", WITHOUT, str(STAND_IN), "benchmarks.gpu_parts.end_to_end", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert [(row["batch"], row["way"]) for row in figures["decode"]] == [(1, "eager"), (3, "eager")]
    assert [row["prompt"] for row in figures["prefill"]] == [24]
    # Two layers of 64 x 96 and 64 x 64, gate, up and down of 64 x 96, three norms, and the embedding, in float32.
    assert figures["weight_bytes"] == 4 * (2 * (64 * (64 + 64) + 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64 + 200 * 64)
    one, three = figures["decode"]
    length = 20 - 1 + 1 + 2  # behind the first token, a step to warm up, and two of three timed ones
    assert three["bytes"] - one["bytes"] == 2 * length * 2 * 2 * 2 * 16 * 4  # sequences, K and V, layers, heads, size


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_make_gpu_says_so_in_a_line_and_does_nothing() -> None:
    done = subprocess.run(
        ["make", "-s", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stdout == ""
    first = done.stderr.splitlines()[0]
    assert first.startswith("make gpu needs an NVIDIA GPU")
