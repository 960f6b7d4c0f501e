"""What an all-reduce between hosts with several ranks each takes, hierarchical and by gloo alone, over real links.

    sudo python benchmarks/hierarchical.py [--rates 1000] [--ranks 2 2] [--rounds 15] [--json FILE]

The hosts are network namespaces of this machine, joined at each of the rates (Mbit/s); so many ranks on each. The two
are taken in turns. Beside them the least that the link allows: each host must hear the other's sum once, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from phalanx.comm import create_communicator
from phalanx.launcher.bench.report import processor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.multinode.netlab import Net, find_obstacle  # noqa: E402

PORT = 29555
BACKENDS = ("hierarchical", "gloo")
SHAPES = ((1, 576), (32, 2048), (512, 2048))


def rank_main(rank: int, size: int, address: str, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"rank": rank, "size": size}
    comms = {
        backend: create_communicator(backend, rendezvous=f"tcp://{address}:{PORT + number}", group=backend, **settings)
        for number, backend in enumerate(BACKENDS)
    }
    found = []
    for shape in SHAPES:
        times_s: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for number in range(rounds + 2):  # the first two warm up
            for backend, comm in comms.items():
                x = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
                comm.barrier()
                began_s = time.perf_counter()
                comm.all_reduce(x)
                if number > 1:
                    times_s[backend].append(time.perf_counter() - began_s)
        found.append({"shape": list(shape), "times_s": times_s})
    for comm in comms.values():
        comm.close()
    return found


def measure(rate_mbit: float, ranks: list[int], rounds: int) -> list[dict[str, Any]]:
    """On hosts with so many ranks at this rate; of each operation the rank that it took longest counts."""
    hosts = [f"host{number}" for number in range(len(ranks))]
    seats = [host for host, count in zip(hosts, ranks, strict=True) for _ in range(count)]
    with Net(hosts, rate_mbit) as net:
        arguments = ["--address", net.hosts[hosts[0]].address, "--rounds", str(rounds), "--size", str(len(seats))]
        processes = [
            net.popen(
                host, [sys.executable, __file__, "--rank", str(rank), *arguments], stdout=subprocess.PIPE, text=True
            )
            for rank, host in enumerate(seats)
        ]
        answers = [json.loads(process.communicate()[0] or "[]") for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank failed; its error is above")
    found = []
    for number, (rows, columns) in enumerate(SHAPES):
        slowest = {
            backend: [max(each) for each in zip(*(a[number]["times_s"][backend] for a in answers), strict=True)]
            for backend in BACKENDS
        }
        found.append(
            {
                "shape": [rows, columns],
                "limit_ms": rows * columns * 2 * 8 / rate_mbit / 1e3,
                **{f"{backend}_ms": 1e3 * statistics.median(taken) for backend, taken in slowest.items()},
                "ratio": statistics.median(
                    one / other for one, other in zip(slowest["gloo"], slowest["hierarchical"], strict=True)
                ),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1000.0], help="Mbit/s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 2], help="on each host")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(rank_main(arguments.rank, arguments.size, arguments.address, arguments.rounds)))
        return
    if obstacle := find_obstacle():
        sys.exit(obstacle)
    links = {f"{rate:g}": measure(rate, arguments.ranks, arguments.rounds) for rate in arguments.rates}
    table = Table(box=None)
    for name in ("Mbit/s", "bf16", "link, ms", *(f"{backend}, ms" for backend in BACKENDS), "x"):
        table.add_column(name, justify="right")
    for rate, found in links.items():
        for each in found:
            figures = [f"{each[f'{name}_ms']:.2f}" for name in ("limit", *BACKENDS)]
            table.add_row(rate, "x".join(map(str, each["shape"])), *figures, f"{each['ratio']:.2f}")
    Console().print(table)
    if arguments.json is not None:
        ranks = " ".join(map(str, arguments.ranks))
        report = {
            "benchmark": "hierarchical",
            "command": f"benchmarks/hierarchical.py --rates {' '.join(links)} --ranks {ranks} "
            f"--rounds {arguments.rounds}",
            "processor": processor(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "ranks": arguments.ranks,
            "links_mbit": links,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
