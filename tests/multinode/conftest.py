"""Three hosts, kept for the whole run, and ranks in them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from tests.comm.rank_pool import RankPool
from tests.multinode.netlab import Net, find_obstacle

SEATS = ("alpha", "alpha", "beta", "gamma", "beta", "alpha")  # the host of each worker of `host_pool`
STORE = """
import sys
from phalanx.comm import host_store
store, rendezvous = host_store(sys.argv[1])
print(rendezvous, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def needs_hosts() -> None:
    if obstacle := find_obstacle():
        pytest.skip(obstacle)


@pytest.fixture(scope="session")
def shared_net(needs_hosts: None) -> Iterator[Net]:
    with Net(["alpha", "beta", "gamma"]) as net:
        yield net


@pytest.fixture
def net(shared_net: Net) -> Iterator[Net]:
    """The hosts, afterwards put back as they were: joined, and as fast as the machine."""
    yield shared_net
    shared_net.set_rate(None)
    for host in shared_net.hosts:
        shared_net.restore(host)


@pytest.fixture(scope="session")
def host_pool(shared_net: Net) -> Iterator[RankPool]:
    """Ranks in the hosts, as `SEATS` says; their store is on alpha."""

    def popen(worker: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        return shared_net.popen(SEATS[worker], command, **options)

    store = shared_net.popen(
        "alpha",
        [sys.executable, "-c", STORE, shared_net.hosts["alpha"].address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert store.stdout is not None
    ranks = RankPool(store.stdout.readline().strip(), popen)
    try:
        ranks.start(len(SEATS))
        yield ranks
    finally:
        ranks.close()
        store.communicate(timeout=10)
