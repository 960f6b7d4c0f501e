"""Quantised weights of Phalanx beside llama.cpp's: workloads of `phalanx bench` on smollm2-135m, greedy.

    python benchmarks/peers/quantised.py [--python PATH] [--ours none stored int8 int4] [--theirs bfloat16 Q8_0 Q4_1]
        [--workloads W1 W2] [--rounds 3] [--retakes 0] [--threads N] [--json FILE]

Ours are schemes of `model.quantization`, each in bfloat16; `none` is bfloat16 itself. Theirs are forms of the GGUF
file, all of the same weights (export_model.py): Q4_1 is the built-in file, which `stored` reads as well. llama.cpp
multiplies blocks with activations in 8 bits, ours where the scheme says so.

All take turns in every round, as in compare.py beside it, whose columns these are. A ratio is the median over the
rounds of the peer's time over ours, or our rate over the peer's, in one round, with the least and the most: above 1,
ours is faster. On a machine that is not quiet, `--retakes` has readings taken again beside which other processes took
more than a tenth of a core: a thread that shares its core holds up all that wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

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
    Reading,
    agreement_with,
    exported,
    medians_of,
    spelt_out,
    take_readings,
    versions_of,
)

from phalanx.launcher.bench.report import processor  # noqa: E402

PEER = "llama_cpp"
REFERENCE = "none"  # our scheme that quantises nothing
SCHEMES = (REFERENCE, "stored", "int8", "int4")
FORMS = ("bfloat16", "Q8_0", "Q4_1")


class Ratio(NamedTuple):
    """Over the rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"


def ratios(ours: Sequence[Reading], theirs: Sequence[Reading]) -> dict[str, Ratio]:
    """By figure."""
    found = {}
    for name in ours[0].figures:
        rounds = [
            FIGURES[name].ratio(mine.figures[name], other.figures[name])
            for mine, other in zip(ours, theirs, strict=True)
        ]
        found[name] = Ratio(statistics.median(rounds), min(rounds), max(rounds))
    return found


def arguments_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="that llama.cpp is installed for")
    parser.add_argument("--ours", nargs="+", default=SCHEMES, metavar="SCHEME", help="of model.quantization")
    parser.add_argument("--theirs", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--workloads", nargs="+", choices=CHOICES, default=("W1", "W2"))
    parser.add_argument("--requests", type=int, metavar="N", help="only the first N of a workload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--retakes", type=int, default=0, metavar="N", help="of a reading that others disturbed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores of each engine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def contestants_of(arguments: argparse.Namespace) -> dict[str, Contestant]:
    common = {"dtype": "bfloat16", "num_threads": arguments.threads}
    ours = {
        f"{OURS} {scheme}": Contestant(OURS, sys.executable, {**common, "model": MODEL, "quantization": scheme})
        for scheme in arguments.ours
    }
    theirs = {
        f"{PEER} {form}": Contestant(PEER, arguments.python, {**common, "model": exported("gguf", form, MODEL)})
        for form in arguments.theirs
    }
    return ours | theirs


def tables(
    medians: Mapping[str, Mapping[str, float]],
    compared: Mapping[str, Mapping[str, Mapping[str, Ratio]]],
    agreement: Mapping[str, str],
) -> tuple[Table, Table]:
    titles = [FIGURES[name].title for name in next(iter(medians.values()))]
    measured = Table("weights", *titles, "same start", box=None)
    for name, figures in medians.items():
        measured.add_row(name, *(FIGURES[each].shown(value) for each, value in figures.items()), agreement[name])
    times = Table("times faster", "than", *titles, box=None)
    for name, others in compared.items():
        for other, ratios in others.items():
            times.add_row(name, other, *map(str, ratios.values()))
    return measured, times


def repeatable_command(arguments: argparse.Namespace) -> str:
    """The command line without what belongs to one machine."""
    command = ["benchmarks/peers/quantised.py", "--ours", *arguments.ours, "--theirs", *arguments.theirs]
    command += ["--workloads", *arguments.workloads, "--rounds", str(arguments.rounds)]
    command += ["--retakes", str(arguments.retakes), "--threads", str(arguments.threads)]
    if arguments.requests is not None:
        command += ["--requests", str(arguments.requests)]
    return shlex.join(command)


def main() -> None:
    arguments = arguments_given()
    versions = {OURS: versions_of(OURS, sys.executable), PEER: versions_of(PEER, arguments.python)}
    if versions[PEER][ENGINES[PEER].distributions[0]] is None:
        raise SystemExit(f"{PEER} is not installed: {ENGINES[PEER].install}; name its Python after --python")
    contestants = contestants_of(arguments)
    load_before = os.getloadavg()
    readings = take_readings(contestants, arguments.workloads, arguments.requests, arguments.rounds, arguments.retakes)
    medians = medians_of(readings)
    agreement = agreement_with(next(iter(readings)), readings)
    reference = f"{OURS} {REFERENCE}"
    compared = {
        name: {
            other: ratios(taken, readings[other])
            for other in readings
            if contestants[other].engine == PEER or (other == reference and other != name)
        }
        for name, taken in readings.items()
        if contestants[name].engine == OURS
    }
    for table in tables(medians, compared, agreement):
        Console().print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "peers-quantised",
            "command": repeatable_command(arguments),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"processor": processor(), "threads": arguments.threads, "load_before": load_before},
            "model": MODEL,
            "model_files": {name: Path(each.settings["model"]).name for name, each in contestants.items()},
            "versions": versions,
            "rounds": arguments.rounds,
            "medians": medians,
            "ratios": {
                name: {
                    other: {figure: ratio._asdict() for figure, ratio in figures.items()}
                    for other, figures in others.items()
                }
                for name, others in compared.items()
            },
            "same_first_tokens": agreement,
            "readings": spelt_out(readings),
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
