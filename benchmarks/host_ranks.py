"""The ranks of a benchmark in hosts of their own: the program itself, started again in each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.multinode.netlab import Net

PORT = 29555  # of the rendezvous, on the first rank's host; those after it are free too


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run_ranks` gives a rank beside its caller's arguments: `rank`, None in the program that starts the others,
    `size`, and `address` of the first rank's host.
    """
    for name, kind in (("--rank", int), ("--size", int), ("--address", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)


def run_ranks(program: str, hosts: Sequence[str], rate_mbit: float | None, arguments: Sequence[object]) -> list[Any]:
    """What each rank printed, as JSON. Ends this program where one failed.

    program: path of the calling file. hosts: of each rank, network namespaces of this machine, joined at the rate.
    """
    with Net(list(dict.fromkeys(hosts)), rate_mbit) as net:
        own = ["--size", len(hosts), "--address", net.hosts[hosts[0]].address, *arguments]
        ranks = [
            net.popen(
                host,
                [sys.executable, program, *map(str, ["--rank", rank, *own])],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, host in enumerate(hosts)
        ]
        printed = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed; its error is above")
    return [json.loads(text) for text in printed]
