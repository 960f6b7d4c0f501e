"""The hosts themselves: whatever else is tested over them stands on this."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.multinode import netlab
from tests.multinode.netlab import Net

SINK = """
import socket, sys
listener = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
connection, _ = listener.accept()
while connection.recv(1 << 16): pass
connection.sendall(b"all")
"""
STREAM = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 5000), 5) as connection:
    started = time.monotonic()
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(3) == b"all"
    print(time.monotonic() - started)
"""
KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 1), float(sys.argv[2]))
except OSError as error:
    print(type(error).__name__)
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, arguments)]


def knock(net: Net, source: str, target: str, limit_s: float = 5.0) -> str:
    """`ConnectionRefusedError` where the target is reached: nothing listens there. limit_s: a host that a test before
    this one cut off is asked for its address once a second.
    """
    return net.exec(source, python(KNOCK, net.hosts[target].address, limit_s)).strip()


def transfer_s(net: Net, source: str, target: str, num_bytes: int) -> float:
    address = net.hosts[target].address
    sink = net.popen(target, python(SINK, address), stdout=subprocess.PIPE, text=True)
    assert sink.stdout is not None
    assert sink.stdout.readline() == "ready\n"
    taken_s = float(net.exec(source, python(STREAM, address, num_bytes)))
    sink.wait(10)
    return taken_s


def test_each_host_has_its_own_name_interfaces_and_ports_and_reaches_the_others(net: Net) -> None:
    for host in net.hosts.values():
        assert net.exec(host.name, ["hostname"]).strip() == host.name
        assert host.address in net.exec(host.name, ["ip", "-4", "-o", "addr"])
        for other in net.hosts.values():
            assert knock(net, host.name, other.name) == "ConnectionRefusedError"
            known = net.exec(
                host.name, python("import socket, sys; print(socket.gethostbyname(sys.argv[1]))", other.name)
            )
            assert known.strip() == other.address
    assert socket.gethostname() not in net.hosts


@pytest.mark.alone
def test_a_link_is_as_fast_as_its_rate_and_follows_a_change(net: Net) -> None:
    num_bytes = 1_000_000
    taken_s = {}
    for rate_mbit in (10.0, 80.0):
        net.set_rate(rate_mbit, "beta")
        for source, target in (("alpha", "beta"), ("beta", "alpha")):
            taken_s[rate_mbit] = transfer_s(net, source, target, num_bytes)
            assert taken_s[rate_mbit] > 0.9 * num_bytes * 8 / (rate_mbit * 1e6)
    net.set_rate(None, "beta")
    taken_s[float("inf")] = transfer_s(net, "alpha", "beta", num_bytes)
    assert max(taken_s[80.0], taken_s[float("inf")]) < taken_s[10.0] / 2


def test_a_cut_host_is_out_of_reach_until_it_is_restored_and_the_others_are_not(net: Net) -> None:
    net.cut("beta")
    try:
        assert knock(net, "alpha", "beta", 0.5) in ("TimeoutError", "OSError")
        assert knock(net, "beta", "alpha", 0.5) in ("TimeoutError", "OSError")
        assert knock(net, "alpha", "gamma") == "ConnectionRefusedError"
    finally:
        net.restore("beta")
    assert knock(net, "alpha", "beta") == "ConnectionRefusedError"


def namespaces(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if name.startswith(f"{netlab.PREFIX}-{pid}-")]


def wait_until_gone(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.02)


def test_an_error_inside_leaves_no_host_and_no_process(needs_hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlab, "_END_S", 0.3)
    before = namespaces(os.getpid())
    stubborn = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    with pytest.raises(ZeroDivisionError), Net(["alpha"]) as net:
        process = net.popen("alpha", python(stubborn), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        assert net.pids("alpha") == [process.pid]
        raise ZeroDivisionError
    assert process.poll() == -signal.SIGKILL
    assert namespaces(os.getpid()) == before


def test_a_host_that_cannot_be_made_takes_the_others_with_it(needs_hosts: None) -> None:
    before = namespaces(os.getpid())
    with pytest.raises(RuntimeError, match=r"ip netns add .* failed"), Net(["alpha", "no/such/name"]):
        pass
    assert namespaces(os.getpid()) == before


@pytest.mark.alone
def test_what_a_killed_program_left_is_removed_by_the_next(needs_hosts: None) -> None:
    code = (
        "import os, signal, subprocess\nfrom tests.multinode.netlab import Net\n"
        "net = Net(['alpha']).__enter__()\n"
        "print(net.popen('alpha', ['sleep', '60']).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    left = int(killed.stdout.readline())
    killed.wait(10)
    assert namespaces(killed.pid)
    with Net(["alpha"]):
        assert not namespaces(killed.pid)
        wait_until_gone(left)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in netlab.find_obstacle()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda tool: None)
    assert "iproute2" in netlab.find_obstacle()
