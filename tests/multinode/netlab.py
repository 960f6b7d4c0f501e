"""Hosts on one machine: network namespaces joined by veth pairs and a bridge, with links that can be shaped and cut.

Needs root and iproute2; `find_obstacle` says what is missing. What is made has the process id of its maker in its name:
what a killed one left is known by that, and removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PREFIX = "phxnet"
LINK = "eth0"  # the host's link to the others
DEAD_END = "mgmt0"  # a second network, with the default route, that leads to nobody
SUBNET, DEAD_SUBNET = "10.88.0", "10.99.0"
BRIDGE = "bridge"

# What passes at once after a pause is small beside what is measured, but a whole segment of 64 KiB, as network cards
# take them: through a smaller bucket go packets, each by a timer, which takes from the cores what no link does.
_BUCKET_S, _LEAST_BUCKET_BYTES = 0.0005, 68 << 10
_QUEUE = "50ms"
_END_S = 3.0  # that processes have after SIGTERM, and again after SIGKILL

# Other names nobody is asked for: over the default route that takes 6 s, and connections want the name of their peer.
_AS_HOST = (
    'hostname "$0" && mount --bind "$1" /etc/hosts && shift'
    ' && { [ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf; } && exec "$@"'
)

_numbers = count()


@dataclass(frozen=True, slots=True)
class Host:
    """One host. address: IPv4, on its link. port: the other end of its link, at the switch."""

    name: str
    namespace: str
    address: str
    port: str


def find_obstacle() -> str:
    """Why no hosts can be made here, or empty."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"network namespaces need {tool} (on Debian the package iproute2)"
    probe = f"{PREFIX}-{os.getpid()}-{next(_numbers)}-probe"
    made = _attempt("ip", "netns", "add", probe)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    try:
        for arguments in (
            ("link", "add", BRIDGE, "type", "bridge"),
            ("link", "add", "one", "type", "veth", "peer", "name", "two"),
        ):
            made = _attempt("ip", "-n", probe, *arguments)
            if made.returncode:
                return f"this kernel cannot make what joins the hosts ({arguments[-1]}): {made.stderr.strip()}"
        made = _attempt("tc", "-n", probe, "qdisc", "add", "dev", "one", "root", *_shape(100.0))
        return f"this kernel cannot shape links: {made.stderr.strip()}" if made.returncode else ""
    finally:
        _attempt("ip", "netns", "del", probe)


class Net:
    """Hosts on one switch, each by one link of its own. A context manager; on the way out all that ran in it has ended.

    Each host has its own interfaces, loopback, ports and host name, and knows the others by theirs; files and processes
    are seen by all. Beside its link it has an interface that leads nowhere but has the default route, so that who takes
    just any interface fails.
    """

    def __init__(self, hosts: Sequence[str], rate_mbit: float | None = None) -> None:
        """hosts: their names. rate_mbit: of every link, each way, in Mbit/s; None for as fast as the machine."""
        self._tag = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self._switch = f"{self._tag}-switch"
        self._rate_mbit = rate_mbit
        self._processes: list[subprocess.Popen[Any]] = []
        self.hosts = {
            name: Host(name, f"{self._tag}-{name}", f"{SUBNET}.{number}", f"port{number}")
            for number, name in enumerate(hosts, 1)
        }
        self._names = Path(tempfile.gettempdir(), f"{self._tag}-names")

    def __enter__(self) -> Self:
        _sweep()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process in the hosts and removes the hosts. Idempotent."""
        self.end_processes()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        self._processes.clear()
        for namespace in [*(host.namespace for host in self.hosts.values()), self._switch]:
            _attempt("ip", "netns", "del", namespace)
        self._names.unlink(missing_ok=True)

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """`command` as it runs in `host`: replaces itself by it, so that its process id is that of the command."""
        # `ip netns exec` gives it mounts of its own: the file of names is put over /etc/hosts for this command only.
        inside = ["unshare", "--uts", "sh", "-c", _AS_HOST, host, str(self._names)]
        return ["ip", "netns", "exec", self.hosts[host].namespace, *inside, *command]

    def exec(self, host: str, command: Sequence[str], timeout_s: float = 30.0) -> str:
        """Runs `command` in `host`; its standard output. Raises RuntimeError with its error output where it fails."""
        return _checked(*self.command(host, command), timeout_s=timeout_s)

    def popen(
        self, host: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Starts `command` in `host`. env: variables beside this process's own. options: those of subprocess.Popen."""
        process = subprocess.Popen(
            self.command(host, command),
            env={**os.environ, **(env or {})},
            start_new_session=True,  # what ends this program at the terminal leaves the ending to `close`
            **options,
        )
        self._processes.append(process)
        return process

    def pids(self, host: str) -> list[int]:
        """The processes that run in `host`."""
        return _pids(self.hosts[host].namespace)

    def end_processes(self) -> None:
        """Ends every process in the hosts, first in order and then at once."""
        _end_processes([host.namespace for host in self.hosts.values()])

    def set_rate(self, rate_mbit: float | None, host: str | None = None) -> None:
        """Shapes the link of `host`, or every link, to `rate_mbit` each way. None: as fast as the machine."""
        for each in self.hosts.values() if host is None else [self.hosts[host]]:
            for namespace, device in ((each.namespace, LINK), (self._switch, each.port)):
                if rate_mbit is None:
                    _attempt("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
                else:  # of a shaper that is there already only the rate changes: what waits in it is kept
                    _checked("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *_shape(rate_mbit))

    def cut(self, host: str) -> None:
        """Takes the cable of `host` out of the switch: it keeps its address and routes, and nothing passes."""
        self._set_port(host, "down")

    def restore(self, host: str) -> None:
        """Puts the cable back."""
        self._set_port(host, "up")

    def _set_port(self, host: str, state: str) -> None:
        _checked("ip", "-n", self._switch, "link", "set", self.hosts[host].port, state)

    def _build(self) -> None:
        known = [("localhost", "127.0.0.1"), *((host.name, host.address) for host in self.hosts.values())]
        self._names.write_text("".join(f"{address} {name}\n" for name, address in known))
        _checked("ip", "netns", "add", self._switch)
        _checked("ip", "-n", self._switch, "link", "add", BRIDGE, "up", "type", "bridge")
        for number, host in enumerate(self.hosts.values(), 1):
            inside = ("ip", "-n", host.namespace)
            _checked("ip", "netns", "add", host.namespace)
            for device, port, subnet in ((LINK, host.port, SUBNET), (DEAD_END, f"dead{number}", DEAD_SUBNET)):
                ends = ("type", "veth", "peer", "name", port, "netns", self._switch)
                _checked(*inside, "link", "add", device, *ends)
                _checked(*inside, "addr", "add", f"{subnet}.{number}/24", "dev", device)
                _checked(*inside, "link", "set", device, "up")
                _checked("ip", "-n", self._switch, "link", "set", port, "up")
            _checked("ip", "-n", self._switch, "link", "set", host.port, "master", BRIDGE)
            _checked(*inside, "link", "set", "lo", "up")
            _checked(*inside, "route", "add", "default", "dev", DEAD_END)
        self.set_rate(self._rate_mbit)


def _shape(rate_mbit: float) -> tuple[str, ...]:
    bits_per_s = int(rate_mbit * 1e6)
    bucket_bytes = max(int(bits_per_s / 8 * _BUCKET_S), _LEAST_BUCKET_BYTES)
    return ("tbf", "rate", f"{bits_per_s}bit", "burst", f"{bucket_bytes}b", "latency", _QUEUE)


def _sweep() -> None:
    """Removes what killed processes left."""
    listed = _attempt("ip", "netns", "list").stdout.split()
    left = [
        name
        for name in listed
        if name.startswith(f"{PREFIX}-") and not Path("/proc", name.removeprefix(f"{PREFIX}-").split("-")[0]).exists()
    ]
    _end_processes(left)
    for namespace in left:
        _attempt("ip", "netns", "del", namespace)
        Path(tempfile.gettempdir(), f"{namespace.rpartition('-')[0]}-names").unlink(missing_ok=True)


def _end_processes(namespaces: Sequence[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _END_S
        for pid in (pid for namespace in namespaces for pid in _pids(namespace)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while any(_is_running(pid) for namespace in namespaces for pid in _pids(namespace)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _attempt("ip", "netns", "pids", namespace).stdout.split()]


def _is_running(pid: int) -> bool:
    """Whether it runs still; not so for one that has ended and only waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _attempt(*command: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def _checked(*command: str, timeout_s: float = 30.0) -> str:
    done = _attempt(*command, timeout_s=timeout_s)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout
