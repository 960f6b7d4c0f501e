"""What hiding a row-parallel product's reduction behind the product gains, over real links between two hosts.

    sudo python benchmarks/overlap.py [--rates 100 1000] [--tokens 64 256 1024 2048] [--rounds 7] [--json FILE]

The hosts are network namespaces of this machine, joined at each of the rates (Mbit/s); a rank on each, with one thread.
For each number of tokens the product and its sum over the ranks are taken in turns as they are, and as
`parallel/overlap.py` decides by the rates it measured; beside them the product alone and the transfer alone. eta is
what was hidden of what can be: (serial - overlapped) / min(product, transfer).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from phalanx.comm import create_communicator
from phalanx.kernels import linear
from phalanx.launcher.bench.report import processor
from phalanx.parallel.layers import RowParallelLinear
from phalanx.parallel.overlap import Overlap

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.multinode.netlab import Net, find_obstacle  # noqa: E402

HOSTS = ("alpha", "beta")
PORT = 29555
WAYS = ("product", "transfer", "serial", "overlapped")
NUM_OUTPUTS, NUM_INPUTS = 2048, 1536  # at 1 Gbit/s the transfer takes about as long as one core's product


def rank_main(rank: int, address: str, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    weight = torch.randn(NUM_OUTPUTS, NUM_INPUTS, dtype=torch.bfloat16) / NUM_INPUTS**0.5
    found = []
    with create_communicator(rank=rank, size=2, rendezvous=f"tcp://{address}:{PORT}") as comm, torch.inference_mode():
        overlap = Overlap()
        overlap.measure(comm, weight, max(tokens))
        for num_tokens in tokens:
            x = torch.randn(num_tokens, NUM_INPUTS, dtype=torch.bfloat16)
            y = torch.zeros(num_tokens, NUM_OUTPUTS, dtype=torch.bfloat16)
            whole, cut = RowParallelLinear(weight, comm), RowParallelLinear(weight, comm, overlap=overlap)
            ways: dict[str, Callable[[], object]] = {
                "serial": partial(whole, x),
                "overlapped": partial(cut, x),
                "product": partial(linear, x, weight),
                "transfer": partial(comm.all_reduce, y),
            }
            times_s: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(rounds + 1):  # the first warms up
                for name, work in ways.items():
                    comm.barrier()
                    began_s = time.perf_counter()
                    work()
                    if number:
                        times_s[name].append(time.perf_counter() - began_s)
            medians = {name: statistics.median(taken) for name, taken in times_s.items()}
            gained_s = medians["serial"] - medians["overlapped"]
            found.append(
                {
                    "tokens": num_tokens,
                    "chunks": overlap.cut(num_tokens, weight),
                    **{f"{name}_ms": 1e3 * taken for name, taken in medians.items()},
                    "ratio": statistics.median(
                        one / other for one, other in zip(times_s["serial"], times_s["overlapped"], strict=True)
                    ),
                    "eta": gained_s / min(medians["product"], medians["transfer"]),
                }
            )
    return found


def measure(rate_mbit: float, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """On two hosts at this rate; what the first rank saw."""
    with Net(HOSTS, rate_mbit) as net:
        address = net.hosts[HOSTS[0]].address
        arguments = ["--address", address, "--rounds", str(rounds), "--tokens", *map(str, tokens)]
        ranks = [
            net.popen(
                host, [sys.executable, __file__, "--rank", str(rank), *arguments], stdout=subprocess.PIPE, text=True
            )
            for rank, host in enumerate(HOSTS)
        ]
        answers = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        sys.exit("a rank failed; its error is above")
    found: list[dict[str, Any]] = json.loads(answers[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 1000.0], help="Mbit/s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(rank_main(arguments.rank, arguments.address, arguments.tokens, arguments.rounds)))
        return
    if obstacle := find_obstacle():
        sys.exit(obstacle)
    links = {f"{rate:g}": measure(rate, arguments.tokens, arguments.rounds) for rate in arguments.rates}
    table = Table(box=None)
    for name in ("Mbit/s", "tokens", "chunks", *(f"{way}, ms" for way in WAYS), "x", "eta"):
        table.add_column(name, justify="right")
    for rate, found in links.items():
        for each in found:
            figures = [f"{each[f'{way}_ms']:.1f}" for way in WAYS]
            counts = [rate, str(each["tokens"]), str(each["chunks"])]
            table.add_row(*counts, *figures, f"{each['ratio']:.2f}", f"{each['eta']:.2f}")
    Console().print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "overlap",
            "command": f"benchmarks/overlap.py --rates {' '.join(links)} --rounds {arguments.rounds}",
            "processor": processor(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "shape": {"outputs": NUM_OUTPUTS, "inputs": NUM_INPUTS, "dtype": "bfloat16"},
            "links_mbit": links,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
