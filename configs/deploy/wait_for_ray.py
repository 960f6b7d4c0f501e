"""Waits until a Ray cluster is large enough: `python -m phalanx.configs.deploy.wait_for_ray --nodes 2 --gpus 8`.

Nodes join one after the other, in minutes where machines have to boot first, and `phalanx serve` refuses a cluster in
which its ranks find no room now. Imports Ray alone, to be ready soon.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ray

POLL_S = 2.0


class Size(NamedTuple):
    """Of a cluster: its live nodes, and their GPUs and CPU cores."""

    nodes: int
    gpus: float
    cpus: float

    def __str__(self) -> str:
        return f"{self.nodes} nodes, {self.gpus:g} GPUs, {self.cpus:g} CPU cores"


def size_of(nodes: Sequence[Mapping[str, Any]]) -> Size:
    """The size of a cluster whose nodes are as `ray.nodes()` lists them."""
    live = [node["Resources"] for node in nodes if node["Alive"]]
    return Size(len(live), sum(each.get("GPU", 0) for each in live), sum(each.get("CPU", 0) for each in live))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 once the cluster is as large as asked for, 1 where it is not in time."""
    parser = argparse.ArgumentParser(description="Wait until a Ray cluster has the nodes and resources asked for.")
    parser.add_argument("--address", default="auto", help="host:port; else the cluster that this machine belongs to")
    parser.add_argument("--nodes", type=int, default=1, help="live nodes")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of all nodes together")
    parser.add_argument("--cpus", type=float, default=0, help="CPU cores of all nodes together")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds to wait")
    options = parser.parse_args(arguments)
    wanted = Size(options.nodes, options.gpus, options.cpus)
    deadline = time.monotonic() + options.timeout
    ray.init(address=options.address, log_to_driver=False, configure_logging=False)
    try:
        while True:
            found = size_of(ray.nodes())
            if all(have >= want for have, want in zip(found, wanted, strict=True)):
                return 0
            if time.monotonic() > deadline:
                print(f"wanted {wanted}; after {options.timeout:g} s there are {found}", file=sys.stderr)
                return 1
            time.sleep(POLL_S)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
