"""Everything that a GPU is to show, in one run of less than ten minutes: tests, tuning, whole steps, operators, NCCL.

    make gpu        or        PYTHONPATH=src python -m benchmarks.gpu [--minutes 9.5] [--only NAME]

Needs PyTorch, Triton and NumPy, and pytest and hypothesis for the tests; no Ray, nothing installed of Phalanx, no
network. Each part is a process of its own within its share of the time, and the next one runs whatever becomes of it.
Writes benchmarks/results/DEVICE/*.json and summary.md, a table printed last; copies them to the folder that the
variable OUT names, if it is set. The table of tuned products, kernels/gpu/tuned/DEVICE.json, is brought up to date too.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.limits import Outcome, Part, run_parts
from benchmarks.gpu_parts.promises import promises, steps

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TUNED_TABLES = ROOT / "kernels" / "gpu" / "tuned"
STAND_IN = ROOT / "benchmarks" / "gpu_parts" / "stand_in"
NEEDED = ("torch", "triton", "numpy")
WANTED = {
    "pytest": "no test is run",
    "hypothesis": "no test is run",
    "cupy": "NCCL through CuPy is not measured",
    "msgspec": "plans of steps are made of a stand-in",
    "rich": "what NCCL takes is not printed",
    "xdist": "tests run one after another",
}
VERSIONS = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x")
MOST_LINES = 44

# (rows, outputs, inputs, and how weights are quantised if they are) of the products to be tuned first, for `make gpu`
# has no time for all.
TUNED = (
    *((m, n, n) for n in (2048, 4096) for m in (1, 16)),
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (16, 8192, 8192, "w4a16"),
    (16, 4096, 4096, "fp8_w8a8"),
    *((m, n, k) for m in (1, 64) for n, k in ((3072, 2048), (2048, 8192), (6144, 4096), (4096, 14336))),
)


def the_parts(python: str = sys.executable) -> list[Part]:
    """In order. Correctness first; then what later parts choose kernels by."""

    def module(name: str, *options: str) -> list[str]:
        return [python, "-m", name, *options]

    def measured(name: str, model: str) -> Any:
        return lambda path, seconds: module(name, "--model", model, "--json", str(path), "--seconds", f"{seconds:.0f}")

    def tests(processes: int, *where: str) -> Any:
        options = ("--processes", str(processes), *where)
        return lambda path, _: module("benchmarks.gpu_parts.run_tests", "--json", str(path), *options)

    products = [each for product in TUNED for each in ("--product", ",".join(map(str, product)))]
    processes = min(8, len(os.sched_getaffinity(0)))
    return [
        Part("tests of the comm layer", "tests", 40, tests(1, "tests/gpu")),
        Part("tests of operators", "tests", 130, tests(processes, "tests/kernels/gpu")),
        Part(
            "tuning",
            "tuning",
            80,
            lambda _, seconds: module("phalanx.kernels.tune_linear", *products, "--minutes", f"{seconds / 90:.2f}"),
        ),
        Part("end to end 1b", "end-to-end", 55, measured("benchmarks.gpu_parts.end_to_end", "1b")),
        Part("end to end 8b", "end-to-end", 70, measured("benchmarks.gpu_parts.end_to_end", "8b")),
        Part("operators 8b", "operators", 90, measured("benchmarks.gpu_parts.kernels", "8b")),
        Part("operators 1b", "operators", 50, measured("benchmarks.gpu_parts.kernels", "1b")),
        Part("nccl", "nccl", 45, lambda path, _: [python, "benchmarks/nccl.py", "--rounds", "5", "--json", str(path)]),
    ]


def slug(device: str) -> str:
    """Of a device's name, for a path."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def header(device: str) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": device,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "commit": commit(),
    }


def commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_results(folder: Path, head: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """A JSON for each file that parts name, with all that it knows of them."""
    for file in dict.fromkeys(outcome.file for outcome in outcomes):
        parts = {
            outcome.part: {
                "ended": outcome.ended,
                "seconds": round(outcome.seconds, 1),
                "limit_s": round(outcome.limit_s, 1),
                "command": outcome.command,
                **({"said": outcome.said} if outcome.said else {}),
                **outcome.figures,
            }
            for outcome in outcomes
            if outcome.file == file
        }
        (folder / f"{file}.json").write_text(json.dumps({**head, "parts": parts}, indent=1) + "\n")


def summary(head: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[str]:
    """The table for the README, of at most `MOST_LINES` lines."""
    figures = {outcome.part: {**outcome.figures, "ended": outcome.ended} for outcome in outcomes}
    versions = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    lines = [f"{head['device']}; {versions}; {head['date'][:10]}; {head['commit'] or 'no commit known'}"]
    ends = [f"{each.part} {each.seconds:.0f} s{'' if each.ended == 'done' else ' ' + each.ended}" for each in outcomes]
    lines += ["parts: " + ", ".join(ends), ""]
    rows = [[each.promise, each.measured, each.told] for each in promises(figures)]
    lines += markdown(["promise", "measured", "held"], rows)
    ran = steps(figures)
    if ran:
        lines += ["", *markdown(["", "eager", "graphs", "captured step"], ran)]
    return lines[:MOST_LINES]


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (names, *rows)]
    head, *body = [f"| {' | '.join(row)} |" for row in padded]
    return [head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *body]


def device_name() -> str:
    """Of the GPU; ends the program, in a line, where it cannot run."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if "torch" in lacking:
        sys.exit("make gpu needs PyTorch with CUDA, which this Python does not have; choose one by PYTHON=...")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"make gpu needs an NVIDIA GPU, and PyTorch {torch.__version__} sees none here")
    if lacking:
        sys.exit(f"make gpu needs {', '.join(lacking)}, which this Python does not have; choose one by PYTHON=...")
    return torch.cuda.get_device_name()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="NAME", help="parts whose name begins so")
    arguments = parser.parse_args()
    device = device_name()
    missing = [name for name in WANTED if importlib.util.find_spec(name) is None]
    if missing:
        print("missing here: " + "; ".join(f"{name} ({WANTED[name]})" for name in missing))
    paths = [str(ROOT / "src"), *([str(STAND_IN)] if "msgspec" in missing else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(":")}
    folder = RESULTS / slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    head, ended, began_s = header(device), list[Outcome](), time.time()

    def keep(outcome: Outcome) -> None:
        ended.append(outcome)
        write_results(folder, head, ended)
        lines = summary(head, ended)
        (folder / "summary.md").write_text("\n".join(lines) + "\n")
        bring_out(folder, began_s)

    parts = [part for part in the_parts() if part.name.startswith(arguments.only)]
    if not parts:
        sys.exit(
            f"--only {arguments.only}: no part begins so; there are {', '.join(part.name for part in the_parts())}"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends the run gets what it has
    with tempfile.TemporaryDirectory() as scratch:
        run_parts(parts, 60 * arguments.minutes, Path(scratch), environment, ROOT, keep)
    print("\n" + "\n".join(summary(head, ended)))
    if any(outcome.ended != "done" for outcome in ended):
        sys.exit(1)


def bring_out(folder: Path, since_s: float) -> None:
    """To where a machine that is given back afterwards leaves what is wanted of it; tables tuned since then with it."""
    if os.environ.get("OUT"):
        target = Path(os.environ["OUT"]) / folder.name
        shutil.copytree(folder, target, dirs_exist_ok=True)
        for tuned in TUNED_TABLES.glob("*.json"):
            if tuned.stat().st_mtime >= since_s:
                shutil.copy(tuned, target / f"tuned-{tuned.name}")


if __name__ == "__main__":
    main()
