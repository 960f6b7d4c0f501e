"""What an all-reduce between hosts takes, hierarchical and by gloo alone, over real links.

    sudo python benchmarks/hierarchical.py [--rates 100 1000] [--ranks 2+2 1+1 1+1+1] [--rounds 15] [--json FILE]

The hosts are network namespaces of this machine, joined at each of the rates (Mbit/s); `2+2` are two of them with two
ranks on each. The two ways are taken in turns. Beside them the least that the link allows: what each host must send,
which is the sum or its part of the sum, in bfloat16; and the CPU time that a rank's process takes meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
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

from benchmarks.host_ranks import PORT, add_rank_arguments, run_ranks  # noqa: E402
from tests.multinode.netlab import find_obstacle  # noqa: E402

BACKENDS = ("hierarchical", "gloo")
SHAPES = ((1, 576), (32, 576), (32, 2048), (512, 2048), (2048, 2048))


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
        cpu_s: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for number in range(rounds + 2):  # the first two warm up
            for backend, comm in comms.items():
                x = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
                comm.barrier()
                began_s, busy_s = time.perf_counter(), time.process_time()
                comm.all_reduce(x)
                if number > 1:
                    times_s[backend].append(time.perf_counter() - began_s)
                    cpu_s[backend].append(time.process_time() - busy_s)
        found.append({"shape": list(shape), "times_s": times_s, "cpu_s": cpu_s})
    for comm in comms.values():
        comm.close()
    return found


def measure(rate_mbit: float, ranks: list[int], rounds: int) -> list[dict[str, Any]]:
    """On hosts with so many ranks at this rate; of each operation the rank that it took longest counts."""
    seats = [f"host{number}" for number, count in enumerate(ranks) for _ in range(count)]
    answers = run_ranks(__file__, seats, rate_mbit, ["--rounds", rounds])
    sent_share = 2 * (len(ranks) - 1) / len(ranks)
    found = []
    for number, (rows, columns) in enumerate(SHAPES):
        slowest = {
            (what, backend): [
                max(each) for each in zip(*(answer[number][what][backend] for answer in answers), strict=True)
            ]
            for what in ("times_s", "cpu_s")
            for backend in BACKENDS
        }
        ratios = zip(slowest["times_s", "gloo"], slowest["times_s", "hierarchical"], strict=True)
        found.append(
            {
                "shape": [rows, columns],
                "limit_ms": sent_share * rows * columns * 2 * 8 / rate_mbit / 1e3,
                **{f"{backend}_ms": 1e3 * statistics.median(slowest["times_s", backend]) for backend in BACKENDS},
                **{f"{backend}_cpu_ms": 1e3 * statistics.median(slowest["cpu_s", backend]) for backend in BACKENDS},
                "ratio": statistics.median(one / other for one, other in ratios),
            }
        )
    return found


def show(hosts: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for name in ("ranks", "Mbit/s", "bf16", "link, ms", *(f"{name}, ms" for name in BACKENDS), "x"):
        table.add_column(name, justify="right")
    for name in BACKENDS:
        table.add_column(f"{name}, CPU ms", justify="right")
    for each in hosts:
        for rate, found in each["links_mbit"].items():
            for case in found:
                figures = [f"{case[f'{name}_ms']:.2f}" for name in ("limit", *BACKENDS)]
                busy = [f"{case[f'{name}_cpu_ms']:.2f}" for name in BACKENDS]
                shape = "x".join(map(str, case["shape"]))
                table.add_row(each["ranks"], rate, shape, *figures, f"{case['ratio']:.2f}", *busy)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 1000.0], help="Mbit/s")
    parser.add_argument("--ranks", nargs="+", default=["2+2", "1+1", "1+1+1"], help="on each host")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_rank_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(rank_main(arguments.rank, arguments.size, arguments.address, arguments.rounds)))
        return
    if obstacle := find_obstacle():
        sys.exit(obstacle)
    hosts = []
    for ranks in arguments.ranks:
        counts = [int(count) for count in ranks.split("+")]
        links = {f"{rate:g}": measure(rate, counts, arguments.rounds) for rate in arguments.rates}
        hosts.append({"ranks": ranks, "links_mbit": links})
    show(hosts)
    if arguments.json is not None:
        rates = " ".join(f"{rate:g}" for rate in arguments.rates)
        report = {
            "benchmark": "hierarchical",
            "command": f"benchmarks/hierarchical.py --rates {rates} --ranks {' '.join(arguments.ranks)} "
            f"--rounds {arguments.rounds}",
            "processor": processor(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "hosts": hosts,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
