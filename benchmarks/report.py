"""The file that a benchmark leaves: what was run, on what, and its figures."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from phalanx.launcher.bench.report import processor
from phalanx.launcher.machine import this_machine


def write_report(path: Path, script: str, **figures: object) -> None:
    """script: of this folder, without `.py`, whose command line the report repeats."""
    report = {
        "benchmark": script,
        "command": repeatable_command(script, sys.argv[1:]),
        "processor": processor(),
        "cores": this_machine().num_cores,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **figures,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def repeatable_command(script: str, arguments: Sequence[str]) -> str:
    """Without `--json FILE`, which says nothing but where a file is on one machine."""
    kept = list(arguments)
    while "--json" in kept:
        at = kept.index("--json")
        del kept[at : at + 2]
    kept = [each for each in kept if not each.startswith("--json=")]
    return shlex.join([f"benchmarks/{script}.py", *kept])
