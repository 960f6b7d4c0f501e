"""What the compiler makes of each kernel for GPUs, on any machine: no GPU is needed.

    python benchmarks/gpu_kernels_compiled.py [--only NAME] [--json FILE]

Compiles each operator's examples for sm_80 and sm_90. Occupancy: warps that fit on a multiprocessor at once, of the 64
it can hold. Exit status 1 where a kernel spills, takes too much shared memory or lacks the instructions it should have.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table

from phalanx.kernels.gpu import ahead_of_time

DEFAULT_JSON = Path(__file__).resolve().parent / "results" / "gpu-kernels-compiled.json"
COLUMNS = ("kernel", "example", "arch", "warps", "registers", "spills", "shared", "occupancy", "instructions", "faults")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels for GPUs and show what they take.")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, help="where the figures go (default: %(default)s)")
    arguments = parser.parse_args()
    table = Table(*COLUMNS, title=f"Kernels as Triton {triton.__version__} compiles them")
    rows: list[dict[str, object]] = []
    cases = [case for case in ahead_of_time.examples() if arguments.only in case.operator]
    for case, making in zip(cases, ahead_of_time.compiled(cases), strict=True):
        for made in making.result():
            faults = made.faults(case.example.instructions)
            rows.append({**asdict(made), "occupancy": made.occupancy, "faults": faults})
            table.add_row(
                made.kernel,
                made.example,
                f"sm_{case.arch}",
                str(made.num_warps),
                str(made.registers),
                str(made.stack_bytes),
                str(made.shared_bytes),
                f"{made.occupancy:.0%}",
                " ".join(made.instructions),
                "; ".join(faults) or "none",
            )
    Console(width=160).print(table)
    arguments.json.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    print(f"written: {arguments.json}")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
