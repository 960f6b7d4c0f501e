"""Tokens per second over real links: layouts over two and three hosts at several rates, with and without overlap.

    sudo python benchmarks/multinode.py [--only pipeline-2 tensor-2 ...] [--rates 100 1000] [--workloads decode prefill]
        [--scale 0.25] [--rounds 2] [--json FILE] [--plot FILE.png]

The hosts are network namespaces of this machine, joined at each of the rates (Mbit/s), a rank with one thread on each,
or two on each in `mixed-2x2` (tensor inside the hosts, pipeline across). `decode` is W2 with lengths times --scale,
`prefill` a prompt of 2048 tokens times --scale, at least 512. By itself each layout and rate takes the scale that shows
what it is to show in good time: all of them take about ten minutes. Every setting of `comm.overlap` has a formation of
its own; they take turns in every round. With --json what is found is put beside what FILE holds of other layouts and
rates, so that a run can be done in pieces.

The limit is max(compute, transfer), both calculated for a whole round:
- compute: every rank runs the steps of the round by itself, without a link and without waiting for anybody, all ranks
  at once; the slowest of them counts. All hosts share the cores of this machine: where there is one for each rank, each
  is kept on its own; where there are more ranks than cores they share them in this run just as beside the link.
- transfer: the bytes that the ledger counted, in the model's dtype, that must cross one link (of an all-reduce over n
  hosts 2 (n-1) / n of them), over the link's rate, and half of a measured round trip for each transfer.
`sent` is what did leave the first host, headers included; small sums over three hosts go whole to both others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from phalanx.launcher.bench.report import machine_facts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.multinode.net_host import Seats  # noqa: E402
from tests.multinode.netlab import Net, find_obstacle  # noqa: E402

CASE = Path(__file__).with_name("multinode_case.py")
WORKLOADS = ("decode", "prefill")
FULL_PREFILL, LEAST_PREFILL = 2048, 512
SCALE, SLOW_SCALE, FULL_SCALE = 0.25, 0.0625, 1.0
SLOW_MBIT, FAST_MBIT = 300.0, 1000.0
ECHO = """
import socket, sys
connection, _ = socket.create_server((sys.argv[1], 5001)).accept()
while data := connection.recv(64): connection.sendall(data)
"""
ASK = """
import socket, sys, time, statistics
connection = socket.create_connection((sys.argv[1], 5001), 5)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(300):
    began = time.perf_counter()
    connection.sendall(b"x")
    connection.recv(64)
    times.append(time.perf_counter() - began)
print(statistics.median(times))
"""


class Layout(NamedTuple):
    """hosts: of each rank, in order. parallel: the section of the YAML file."""

    hosts: tuple[str, ...]
    parallel: dict[str, Any]

    @property
    def num_hosts(self) -> int:
        return len(set(self.hosts))

    @property
    def tensor_across(self) -> bool:
        """Whether a stage lies on several hosts."""
        return "tensor" in self.parallel and len(self.hosts) == self.num_hosts

    def scale_at(self, rate_mbit: float) -> float:
        """Of the workloads: whole where a pipeline is to show its share of the rate without bubbles, and short where a
        step of several requests takes seconds.
        """
        if self.tensor_across:
            return SLOW_SCALE if rate_mbit < SLOW_MBIT else SCALE
        return FULL_SCALE if len(self.hosts) == 2 and rate_mbit >= FAST_MBIT else SCALE


LAYOUTS = {
    "pipeline-2": Layout(("alpha", "beta"), {"pipeline": 2, "head": "shared"}),
    "tensor-2": Layout(("alpha", "beta"), {"tensor": 2}),
    "mixed-2x2": Layout(("alpha", "alpha", "beta", "beta"), {"tensor": 2, "pipeline": 2}),
    "pipeline-3": Layout(("alpha", "beta", "gamma"), {"stages": [{"layers": 12}, {"layers": 11}, {"layers": 7}]}),
    "tensor-3": Layout(("alpha", "beta", "gamma"), {"tensor": 3}),
}


def half_round_trip_s(net: Net, hosts: tuple[str, ...]) -> float:
    """Of a byte over TCP between the first and the last host."""
    command = [sys.executable, "-S", "-c"]
    address = net.hosts[hosts[-1]].address
    echo = net.popen(hosts[-1], [*command, ECHO, address])
    tries = f"import time\nfor _ in range(50):\n  try: exec({ASK!r}); break\n  except OSError: time.sleep(0.1)\n"
    taken_s = float(net.exec(hosts[0], [*command, tries, address])) / 2
    echo.wait(10)
    return taken_s


def transfer_s(layout: Layout, use: dict[str, Any], rate_mbit: float, latency_s: float) -> float:
    """Seconds that what one link must carry takes in a round. use: what the ledger counted, of a step in the mean over
    ranks.
    """
    ops = {each["op"]: each for each in use["ops"]}
    n = layout.num_hosts
    num_ops = num_bytes = 0.0
    if layout.tensor_across:
        for op, parts in (
            ("all_reduce", 2 * (n - 1) / n),
            ("fused_all_reduce_rms_norm", 2 * (n - 1) / n),
            ("all_gather", (n - 1) / n),
        ):
            if op in ops:
                num_ops += ops[op]["per_step"]
                num_bytes += ops[op]["bytes_per_step"] * parts
    elif "send" in ops:  # each of n - 1 borders carries its part of what all ranks send
        borders = n - 1
        num_ops = 1.0
        num_bytes = ops["send"]["bytes_per_step"] * len(layout.hosts) / borders
    return float(use["steps"]) * (num_bytes * 8 / (rate_mbit * 1e6) + num_ops * latency_s)


def measure(name: str, rate_mbit: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One layout at one rate."""
    layout = LAYOUTS[name]
    scale = layout.scale_at(rate_mbit) if arguments.scale is None else arguments.scale
    case = {
        "title": f"{name} at {rate_mbit:g} Mbit/s",
        "parallel": layout.parallel,
        "workloads": arguments.workloads,
        "scale": scale,
        "prefill_tokens": max(LEAST_PREFILL, int(FULL_PREFILL * scale)),
        "rounds": arguments.rounds,
        "plot": str(arguments.plot.resolve()) if arguments.plot else None,
    }
    print(f"{case['title']}:", file=sys.stderr, flush=True)
    with Net(list(dict.fromkeys(layout.hosts)), rate_mbit) as net:
        latency_s = half_round_trip_s(net, layout.hosts)
        case["seats"] = Seats.of(net, layout.hosts).to_json()
        process = net.popen(
            layout.hosts[0],
            [sys.executable, str(CASE), json.dumps(case)],
            env={"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        answer = process.communicate()[0]
    if process.returncode:
        sys.exit(f"{case['title']} failed; its error is above")
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    for name_of, taken in found["workloads"].items():
        for overlap in [key for key, value in taken.items() if isinstance(value, dict) and key != "alone"]:
            add_limit(layout, name_of, taken, overlap, rate_mbit, latency_s)
    return {
        "layout": name,
        "rate_mbit": rate_mbit,
        "half_round_trip_us": latency_s * 1e6,
        "hosts": list(layout.hosts),
        "parallel": layout.parallel,
        **{key: case[key] for key in ("scale", "prefill_tokens", "rounds")},
        **found,
    }


def add_limit(
    layout: Layout, workload: str, taken: dict[str, Any], overlap: str, rate_mbit: float, latency_s: float
) -> None:
    """Puts the calculated limit beside what was measured."""
    compute_s = max(taken["alone"]["rank_s"])
    link_s = transfer_s(layout, taken[overlap]["communication"], rate_mbit, latency_s)
    elapsed_s = statistics.median(taken[overlap]["elapsed_s"])
    limit_s = max(compute_s, link_s)
    tokens = taken["prompt_tokens" if workload == "prefill" else "output_tokens"]
    taken[overlap] |= {
        "compute_s": compute_s,
        "transfer_s": link_s,
        "limit_tokens_per_s": tokens / limit_s,
        "of_limit": limit_s / elapsed_s,
    }


def show(cases: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for heading in ("layout", "Mbit/s", "workload", "overlap"):
        table.add_column(heading)
    for heading in ("tokens/s", "limit", "of it", "compute, s", "transfer, s", "took, s", "busiest stage", "sent, MB"):
        table.add_column(heading, justify="right")
    for case in cases:
        for name, taken in case["workloads"].items():
            for overlap, each in taken.items():
                if not isinstance(each, dict) or overlap == "alone":
                    continue
                busy = each["stage_busy"]
                table.add_row(
                    case["layout"],
                    f"{case['rate_mbit']:g}",
                    name,
                    overlap,
                    f"{each['tokens_per_s']:.1f}",
                    f"{each['limit_tokens_per_s']:.1f}",
                    f"{each['of_limit']:.2f}",
                    f"{each['compute_s']:.2f}",
                    f"{each['transfer_s']:.2f}",
                    f"{statistics.median(each['elapsed_s']):.2f}",
                    f"{max(busy):.1%}" if busy and len(busy) > 1 else "",
                    f"{each['sent_mb']:.1f}",
                )
    Console(width=150).print(table)


def merged(cases: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """With those of other layouts and rates that the file holds, in the order of LAYOUTS."""
    known = json.loads(path.read_text())["cases"] if path.exists() else []
    by_name = {(case["layout"], case["rate_mbit"]): case for case in [*known, *cases]}
    order = list(LAYOUTS)
    return sorted(by_name.values(), key=lambda case: (order.index(case["layout"]), case["rate_mbit"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 1000.0], help="Mbit/s")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--scale", type=float, help="of all layouts and rates; by itself each takes its own")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="when each stage worked, of the last layout")
    arguments = parser.parse_args()
    if obstacle := find_obstacle():
        sys.exit(obstacle)
    command = " ".join(["benchmarks/multinode.py", *(part for part in sys.argv[1:] if part != str(arguments.json))])
    cases = []
    for name in arguments.only:
        for rate_mbit in arguments.rates:
            began_s = time.monotonic()
            found = measure(name, rate_mbit, arguments)
            print(f"  took {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
            taken_at = datetime.now(UTC).isoformat(timespec="seconds")
            cases.append({**found, "command": command.replace(" --json", ""), "date": taken_at})
    if arguments.json is not None:
        cases = merged(cases, arguments.json)
        report = {"benchmark": "multinode", "model": "smollm2-135m", "machine": machine_facts(), "cases": cases}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    show(cases)


if __name__ == "__main__":
    main()
