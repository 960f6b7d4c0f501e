from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from phalanx.comm import connect_store, create_communicator, host_store, local_address, parse_rendezvous
from phalanx.comm.rendezvous import Rendezvous, meet
from phalanx.errors import CommError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1:29500", Rendezvous("node1", 29500)),
        ("tcp://10.0.0.1:80", Rendezvous("10.0.0.1", 80)),
        ("[fd00::2]:4000", Rendezvous("fd00::2", 4000)),
        ("file:///shared/run/meet", Rendezvous(path="/shared/run/meet")),
    ],
)
def test_a_rendezvous_is_a_host_and_port_or_a_file(text: str, expected: Rendezvous) -> None:
    assert parse_rendezvous(text) == expected
    assert parse_rendezvous(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "node1", "node1:", "node1:port", "node1:99999", "http://a:1", ":123", "file://relative/x", "file:///dir/"],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(CommError, match=r"write host:port, such as .* or file:///"):
        parse_rendezvous(text)


def test_a_store_opens_on_a_free_port_of_the_address_given_and_no_other() -> None:
    first, at_first = host_store("127.0.0.1")
    second, at_second = host_store("127.0.0.1")
    first.set("who", "first")
    second.set("who", "second")
    assert at_first != at_second
    assert connect_store(at_first, 10).get("who") == b"first"
    assert connect_store(f"tcp://{at_second}", 10).get("who") == b"second"
    other = local_address()
    if other != "127.0.0.1":
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, int(at_first.rpartition(":")[2])), timeout=5)


def test_a_store_cannot_open_on_the_address_of_another_machine() -> None:
    with pytest.raises(
        CommError, match=r"cannot open a rendezvous store on '203\.0\.113\.9'.*use an address of this .*127"
    ):
        host_store("203.0.113.9")


def test_a_store_that_does_not_open_is_named_with_the_time_waited() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(CommError, match=rf"no rendezvous store at 127\.0\.0\.1:{port} within 0\.3 s"):
        connect_store(f"127.0.0.1:{port}", 0.3)


def test_a_file_in_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommError, match=f"there is no folder {tmp_path}/nowhere"):
        connect_store(f"file://{tmp_path}/nowhere/meet")


def test_the_loopback_interface_and_the_route_to_it_have_the_loopback_address() -> None:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    assert local_address(interface=loopback) == "127.0.0.1"
    assert local_address(towards="127.0.0.1") == "127.0.0.1"


def test_an_unknown_interface_is_refused_with_those_there_are() -> None:
    with pytest.raises(CommError, match=r"'nope0' does not exist; there are .*lo\w* \(127\.0\.0\.1\)"):
        local_address(interface="nope0")


def test_a_host_that_cannot_be_resolved_is_named() -> None:
    with pytest.raises(CommError, match=r"host 'no-such-host\.invalid'"):
        local_address(towards="no-such-host.invalid")


def test_a_rank_that_does_not_come_is_named() -> None:
    store = HashStore()
    store.set("size/2", "4")
    with pytest.raises(CommError, match=r"rank 0 of group 'tp' waited 0\.1 s for all 4 ranks; not arrived: 1, 3"):
        meet(store, "tp", 0, 4, 0.1)


def test_a_rank_number_given_twice_is_refused() -> None:
    store = HashStore()
    store.add("joined/1", 1)
    with pytest.raises(CommError, match="rank 1 of group 'tp' has joined before"):
        meet(store, "tp", 1, 2, 1)


def test_ranks_that_disagree_about_the_size_are_refused() -> None:
    store = HashStore()
    store.set("size/1", "3")
    with pytest.raises(CommError, match=r"disagree about its size: \{0: 2, 1: 3\}"):
        meet(store, "tp", 0, 2, 1)


def test_ranks_meet_through_a_file(tmp_path: Path) -> None:
    results: dict[int, float] = {}

    def run(rank: int) -> None:
        with create_communicator(rank=rank, size=2, rendezvous=f"file://{tmp_path}/meet", timeout_s=20) as comm:
            results[rank] = comm.all_reduce(torch.tensor([rank + 1.0])).item()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {0: 3.0, 1: 3.0}
