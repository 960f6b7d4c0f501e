"""Where ranks find each other: a store without a fixed port, and the address of the interface to be reached at."""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from phalanx.comm.lookups import brief_lookups
from phalanx.errors import CommError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
_ANYWHERE = "198.51.100.1"  # RFC 5737: belongs to nobody, so only the default route leads there
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")


class Rendezvous(NamedTuple):
    """Where a store is: at `host` and `port`, or in the file `path` on a file system that all ranks share."""

    host: str | None = None
    port: int | None = None
    path: str | None = None

    def __str__(self) -> str:
        return f"file://{self.path}" if self.host is None else join_host_port(self.host, self.port or 0)


def parse_rendezvous(text: str) -> Rendezvous:
    """Reads `host:port`, `tcp://host:port`, `[IPv6]:port` or `file:///path`. Raises CommError for anything else."""
    wanted = "write host:port, such as 10.0.0.1:29500, or file:///shared/path"
    if text.startswith("file://"):
        path = text.removeprefix("file://")
        if not path.startswith("/") or path.endswith("/"):
            raise CommError(f"rendezvous {text!r}: a file needs an absolute path; {wanted}")
        return Rendezvous(path=path)
    try:
        parts = urlsplit(text if "://" in text else f"tcp://{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise CommError(f"rendezvous {text!r}: {error}; {wanted}") from error
    if parts.scheme != "tcp" or not host or not port or parts.path or parts.query or parts.username:
        raise CommError(f"rendezvous {text!r} is neither a host with a port nor a file; {wanted}")
    return Rendezvous(host, port)


def join_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_store(address: str) -> tuple[Store, str]:
    """Opens a store on a free port of `address`, one of this machine's own, and returns it and its `host:port`.

    It listens on that address only, and as long as it is referenced. Raises CommError where the address is not ours.
    """
    listener, place = listen_for_store(address)
    return store_on(listener), place


def listen_for_store(address: str) -> tuple[socket.socket, str]:
    """The first half of `host_store`, without torch: who comes to `host:port` from now on waits for `store_on`."""
    listener = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise CommError(
            f"cannot open a rendezvous store on {address!r}: {error.strerror or error}; use an address of this machine "
            f"({_interface_table()})"
        ) from error
    return listener, join_host_port(address, int(listener.getsockname()[1]))


def store_on(listener: socket.socket) -> Store:
    """The store behind a listening socket, which it takes over: no other process can take the port in between."""
    from torch._C._distributed_c10d import TCPStore

    address, port = listener.getsockname()[:2]
    with brief_lookups():
        return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def host_store_at(rendezvous: str) -> Store | None:
    """Opens a store at `host:port`; None where that is no address of this machine, or is in use."""
    place = parse_rendezvous(rendezvous)
    assert place.host is not None
    assert place.port is not None
    try:
        listener = socket.create_server((place.host, place.port), family=_family(place.host), backlog=1024)
    except OSError:
        return None
    return store_on(listener)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def connect_store(rendezvous: str | Rendezvous, timeout_s: float = 60.0) -> Store:
    """The store at `rendezvous`, waiting up to `timeout_s` seconds for it to open. Raises CommError where it does not.

    The limit also holds for later reads of keys that are not there yet. A file that ranks meet in must be new; whoever
    named it removes it.
    """
    from torch._C._distributed_c10d import FileStore, TCPStore

    place = parse_rendezvous(rendezvous) if isinstance(rendezvous, str) else rendezvous
    if place.path is not None:
        if not Path(place.path).parent.is_dir():
            raise CommError(
                f"rendezvous {place}: there is no folder {Path(place.path).parent}; create it on all machines"
            )
        file_store = FileStore(place.path)
        file_store.set_timeout(timedelta(seconds=timeout_s))
        return file_store
    assert place.host is not None
    assert place.port is not None
    address, remaining_s = _wait_until_open(place.host, place.port, timeout_s)
    try:
        with brief_lookups():
            store = TCPStore(
                address,
                place.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(1.0, remaining_s)),
            )
    except RuntimeError as error:
        raise CommError(f"rendezvous {place} accepts connections but is no store: {_first_line(error)}") from error
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _wait_until_open(host: str, port: int, timeout_s: float) -> tuple[str, float]:
    """Tries to connect until it succeeds; the address that answered, and the seconds left. torch's own retry prints C++
    stack traces on failure.
    """
    deadline_s = time.monotonic() + timeout_s
    pause_s = 0.01
    while True:
        left_s = deadline_s - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(0.1, left_s)) as connection:
                return str(connection.getpeername()[0]), deadline_s - time.monotonic()
        except socket.gaierror as error:
            raise CommError(
                f"rendezvous {join_host_port(host, port)}: unknown host {host!r} ({error.strerror})"
            ) from error
        except OSError as error:
            if left_s <= pause_s:
                raise CommError(
                    f"no rendezvous store at {join_host_port(host, port)} within {timeout_s:g} s ({error}); is the "
                    "process that opened it still running, and can this machine reach it?"
                ) from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.5)


def meet(store: Store, group: str, rank: int, size: int, timeout_s: float) -> None:
    """Returns when all ranks of a group have come to its store. store: this group's own prefix of a store.

    Raises CommError naming the ranks that did not come within `timeout_s` seconds, a rank number used twice, or ranks
    that disagree about the size of the group.
    """
    if store.add(f"joined/{rank}", 1) != 1:
        raise CommError(
            f"rank {rank} of group {group!r} has joined before: give each rank its own number, each group its own "
            "name, and each run a new store or rendezvous file"
        )
    store.set(f"size/{rank}", str(size))
    deadline_s = time.monotonic() + timeout_s
    pause_s = 0.001
    missing = list(range(size))
    while missing := [other for other in missing if not store.check([f"size/{other}"])]:
        if time.monotonic() > deadline_s:
            names = ", ".join(str(other) for other in missing)
            raise CommError(
                f"rank {rank} of group {group!r} waited {timeout_s:g} s for all {size} ranks; not arrived: {names}. "
                "Did they start, and were they given the same store, group and size?"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    sizes = {other: int(store.get(f"size/{other}")) for other in range(size)}
    if set(sizes.values()) != {size}:
        raise CommError(f"the ranks of group {group!r} disagree about its size: {sizes} (by rank)")


def local_address(towards: str | None = None, interface: str | None = None) -> str:
    """This machine's address: of the named `interface`, else of the route to host `towards`, else of the default route.

    Without any route it is the loopback address. Raises CommError for an interface that is not there or has no address,
    and for a host that cannot be resolved or reached.
    """
    if interface is not None:
        address = interface_addresses().get(interface)
        if address is None:
            known = any(name == interface for _, name in socket.if_nameindex())
            problem = "has no address" if known else "does not exist"
            raise CommError(f"network interface {interface!r} {problem}; there are {_interface_table()}")
        return address
    try:
        # Connecting a datagram socket sends nothing: it only asks the kernel for the route. The port does not matter.
        target = socket.getaddrinfo(towards or _ANYWHERE, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(target[0], socket.SOCK_DGRAM) as probe:
            probe.connect(target[4])
            return str(probe.getsockname()[0])
    except OSError as error:
        if towards is None:
            return "127.0.0.1"
        raise CommError(
            f"no route to host {towards!r} ({error.strerror}); name the interface to use, one of {_interface_table()}"
        ) from error


def interface_of(address: str) -> str | None:
    """The network interface that has this address; None where none has it as its first."""
    return next((name for name, own in interface_addresses().items() if own == address), None)


def interface_addresses() -> dict[str, str]:
    """Address by interface: IPv4 where it has one, else its first IPv6 one that is not link-local."""
    addresses: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # no IPv4 address
            addresses[name] = socket.inet_ntoa(answer[20:24])
    if _IPV6_ADDRESSES.exists():
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            digits, _, _, scope, _, name = line.split()
            if scope != "20" and name not in addresses:  # 0x20: link-local, useless without a zone
                addresses[name] = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    return addresses


def _interface_table() -> str:
    return ", ".join(f"{name} ({address})" for name, address in interface_addresses().items())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
