"""Communicators between hosts: which backend and interface they take, and that every operation is right over them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.comm.rank_pool import RankPool
from tests.comm.test_operations import (
    filled,
    gathered,
    listed,
    rank_all_gather,
    rank_all_reduce,
    rank_broadcast,
    rank_exchange,
    rank_reduce_scatter,
    value,
)
from tests.multinode.host_ranks import rank_choice, rank_is_cut_off, rank_meets_in_a_file
from tests.multinode.netlab import DEAD_END, DEAD_SUBNET, LINK, SUBNET, Net

SILENT_NAME_SERVER = """
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
server.setblocking(False)
from phalanx.comm import connect_store, host_store
store, rendezvous = host_store(sys.argv[1])
connect_store(rendezvous).set("met", "here")
assert store.get("met") == b"here"
asked = 0
try:
    while server.recv(512): asked += 1
except BlockingIOError:
    print(asked)
"""
APART = {
    "two hosts": [0, 2],
    "three hosts": [0, 2, 3],
    "three hosts, one with two ranks": [0, 1, 2, 3],
    "two hosts with two ranks each": [0, 1, 2, 4],
    "two hosts, their ranks in turn": [0, 2, 1, 4],
    "two hosts with three ranks and one": [0, 1, 5, 2],
}


@pytest.fixture(params=APART, ids=lambda name: name.replace(" ", "-"))
def workers(request: pytest.FixtureRequest) -> list[int]:
    return APART[request.param]


def test_the_backend_follows_from_the_hosts_of_the_ranks_and_says_why(net: Net, host_pool: RankPool) -> None:
    host = net.hosts["alpha"].address
    together = host_pool.run(rank_choice, 2, workers=[0, 1], towards=host)
    for backend, reason, _, _ in together:
        assert backend == "shm"
        assert reason.startswith("memory that processes of one machine share")
    apart = host_pool.run(rank_choice, 3, workers=[0, 1, 2], towards=host)
    for backend, reason, _, _ in apart:
        assert backend == "hierarchical"
        assert "2 + 1 ranks; not shm: ranks in several network namespaces: 0, 1 on alpha; 2 on beta" in reason
    alone = host_pool.run(rank_choice, 2, workers=[0, 2], towards=host)
    for backend, reason, _, _ in alone:
        assert backend == "hierarchical"
        assert "1 + 1 ranks; not shm: ranks in several network namespaces: 0 on alpha; 1 on beta" in reason


def test_the_interface_is_that_of_the_route_to_the_store_not_that_of_the_default_route(
    net: Net, host_pool: RankPool
) -> None:
    # That the ranks of the other tests meet at all says the same: the default route leads nowhere.
    answers = host_pool.run(rank_choice, 2, workers=[2, 3], towards=net.hosts["alpha"].address)
    assert [address for _, _, address, _ in answers] == [net.hosts[name].address for name in ("beta", "gamma")]
    assert all(by_default.startswith(DEAD_SUBNET) for _, _, _, by_default in answers)


def test_ranks_that_meet_in_a_file_use_the_interface_that_is_named(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    # A file leads nowhere: by itself each rank would take the default route.
    met = host_pool.run(rank_meets_in_a_file, 2, workers=[0, 2], path=str(tmp_path / "met"), interface=LINK)
    assert met == [[2.0] * 3] * 2


def test_an_interface_that_leads_nowhere_is_an_error_at_the_limit(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    limit_s = 3.0
    arguments = {"path": str(tmp_path / "met"), "interface": DEAD_END, "limit_s": limit_s}
    for message, after_s in host_pool.run(rank_is_cut_off, 2, workers=[0, 2], **arguments):
        assert f"cannot connect to the others from {DEAD_SUBNET}." in message
        assert "name the network interface that reaches them" in message
        assert after_s < 4 * limit_s  # gloo by itself would wait for five times as long


@pytest.mark.skipif(not Path("/etc/resolv.conf").exists(), reason="needs a file /etc/resolv.conf to put another over")
def test_a_name_server_that_never_answers_is_asked_once_when_a_store_opens(net: Net, tmp_path: Path) -> None:
    """By itself the system asks it again after 5 s, and gives up after 10."""
    servers = tmp_path / "resolv.conf"
    servers.write_text("nameserver 127.0.0.1\n")
    nameless = net.hosts["alpha"].address.replace(SUBNET, DEAD_SUBNET)  # the others are in /etc/hosts
    with_servers = ["sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', str(servers)]
    assert net.exec("alpha", [*with_servers, sys.executable, "-c", SILENT_NAME_SERVER, nameless]).strip() == "1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_reductions_are_right_on_every_element(net: Net, host_pool: RankPool, workers: list[int], dtype: str) -> None:
    size, shape = len(workers), [5, 131]
    for op, combine in (("sum", sum), ("max", max)):
        expected = [combine(value(rank, index) for rank in range(size)) for index in range(5 * 131)]
        answers = host_pool.run(rank_all_reduce, size, workers=workers, shape=shape, dtype=dtype, op=op)
        assert answers == [[expected, expected]] * size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_gathered_and_scattered_also_in_unlike_numbers(
    net: Net, host_pool: RankPool, workers: list[int], dtype: str
) -> None:
    size = len(workers)
    for rows in ([3] * size, list(range(size))):
        arguments = {"workers": workers, "rows": rows, "dtype": dtype, "sized": True}
        assert host_pool.run(rank_all_gather, size, columns=7, **arguments) == [gathered(rows, 7)] * size
        total = [
            [sum(value(rank, row * 3 + column) for rank in range(size)) for column in range(3)]
            for row in range(sum(rows))
        ]
        expected = [total[sum(rows[:rank]) : sum(rows[: rank + 1])] for rank in range(size)]
        assert host_pool.run(rank_reduce_scatter, size, **arguments) == expected


def test_broadcasts_and_sends_arrive_from_every_rank_at_every_other(
    net: Net, host_pool: RankPool, workers: list[int]
) -> None:
    size = len(workers)
    expected = [[value(root, index) for index in range(150)] for root in range(size)]
    assert host_pool.run(rank_broadcast, size, workers=workers, dtype="float32") == [expected] * size
    for rank, answer in enumerate(host_pool.run(rank_exchange, size, workers=workers, dtype="float32")):
        sources = [source for source in range(size) if source != rank]
        assert answer == [
            [listed(filled(source * 4 + rank, shape, "float32").reshape(-1)) for shape in ([2, 9], [31])]
            for source in sources
        ]
