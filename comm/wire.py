"""Connections between machines of our own: what each collective sends one way and the other, by TCP, in order.

A receiver is woken when a quarter of a megabyte has come, not for every packet: over a link of 250 Mbit/s that takes a
quarter of the processor time, which the products of the same core have use for.
"""

from __future__ import annotations

import secrets
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from phalanx.comm.lane import LateError
from phalanx.errors import CommError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

HEADER = struct.Struct("<IQ")  # tag and bytes of what follows
WAKE_BYTES = 256 * 1024
HELLO_BYTES = 16
HELLO_S = 5.0  # for one that connects to say who it is


class Wires:
    """A rank's connections to one rank of each other machine, used by one thread at a time; `shut` by any."""

    def __init__(
        self, store: Store, group: str, address: str, machine: int, peers: Sequence[int], timeout_s: float
    ) -> None:
        """All of `peers` at once: a rank of each machine by its number, on this one the caller itself. store: of those
        alone. address: of this machine, for the others to connect to.

        Raises CommError where one does not come within the limit.
        """
        self._group = group
        self._peers = peers
        self._links: dict[int, _Link] = {}
        deadline_s = time.monotonic() + timeout_s
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=len(peers)) as listener:
            mine = secrets.token_bytes(HELLO_BYTES)
            port = listener.getsockname()[1]
            store.set(f"wire/{peers[machine]}", f"{address} {port} {mine.hex()}")
            try:
                for other in range(machine):
                    self._links[other] = self._connect(store, other, machine, deadline_s)
                while len(self._links) < len(peers) - 1:
                    other, connection = self._accept(listener, mine, deadline_s)
                    self._links[other] = _Link(connection, peers[other])
            except BaseException:
                self.close()
                raise

    def _connect(self, store: Store, other: int, machine: int, deadline_s: float) -> _Link:
        peer = self._peers[other]
        try:
            host, port, secret = store.get(f"wire/{peer}").decode().split()
            left_s = max(0.1, deadline_s - time.monotonic())
            connection = socket.create_connection((host, int(port)), timeout=left_s)
        except (OSError, RuntimeError) as error:
            raise CommError(
                f"group {self._group!r}: rank {self._peers[machine]} found no connection to rank {peer} ({error}). See "
                "that it runs, and that its machine lets connections in on all ports of its interface"
            ) from error
        connection.sendall(bytes.fromhex(secret) + struct.pack("<I", machine))
        return _Link(connection, peer)

    def _accept(self, listener: socket.socket, secret: bytes, deadline_s: float) -> tuple[int, socket.socket]:
        """The number and connection of a machine; whoever does not know the secret is sent away."""
        while True:
            listener.settimeout(max(0.01, deadline_s - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                missing = [str(peer) for other, peer in enumerate(self._peers) if other not in self._links]
                raise CommError(
                    f"group {self._group!r}: not all ranks connected in time; of ranks {', '.join(missing)} at most "
                    "this one is here"
                ) from error
            connection.settimeout(HELLO_S)
            hello = b""
            with suppress(OSError):
                while len(hello) < HELLO_BYTES + 4 and (more := connection.recv(HELLO_BYTES + 4 - len(hello))):
                    hello += more
            if secrets.compare_digest(hello[:HELLO_BYTES], secret) and len(hello) == HELLO_BYTES + 4:
                return struct.unpack("<I", hello[HELLO_BYTES:])[0], connection
            connection.close()

    def swap(
        self, sent: Mapping[int, torch.Tensor], received: Mapping[int, torch.Tensor], tag: int, deadline_s: float
    ) -> None:
        """Sends and receives at once, by number of the other machine, contiguous tensors of one dimension; nothing is
        sent of those without elements.

        Raises LateError past the deadline, ConnectionError where a connection was lost, RuntimeError where the other
        end is at another call.
        """
        busy: dict[int, _Link] = {}
        for other, tensor in received.items():
            if tensor.numel():
                link = self._links[other]
                link.expect(tensor, tag)
                busy[link.number] = link
        for other, tensor in sent.items():
            if tensor.numel():
                link = self._links[other]
                link.give(tensor, tag)
                busy[link.number] = link
        poll = select.poll()
        for number, link in busy.items():
            if wanted := link.go_on(select.POLLOUT):
                poll.register(number, wanted)
        busy = {number: link for number, link in busy.items() if link.wants}
        while busy:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise LateError
            for number, events in poll.poll(left_s * 1000):
                before = busy[number].wants
                wanted = busy[number].go_on(events)
                if not wanted:
                    poll.unregister(number)
                    del busy[number]
                elif wanted != before:
                    poll.modify(number, wanted)

    def shut(self) -> None:
        """Ends all that is under way, here and at the other ends."""
        for link in self._links.values():
            link.shut()

    def close(self) -> None:
        for link in self._links.values():
            link.close()


class _Link:
    """One connection, and the messages that are on their way through it: at most one each way."""

    def __init__(self, connection: socket.socket, peer: int) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._peer = peer
        self._wake_bytes = 1
        self._header = bytearray(HEADER.size)
        self._expected = b""
        self._unsent: list[memoryview] = []
        self._unfilled: list[memoryview] = []
        self.number = connection.fileno()

    @property
    def wants(self) -> int:
        """Events to wait for; 0 for none."""
        return (select.POLLOUT if self._unsent else 0) | (select.POLLIN if self._unfilled else 0)

    def give(self, x: torch.Tensor, tag: int) -> None:
        self._unsent = [memoryview(HEADER.pack(tag, x.nbytes)), _bytes_of(x)]

    def expect(self, x: torch.Tensor, tag: int) -> None:
        self._expected = HEADER.pack(tag, x.nbytes)
        self._unfilled = [memoryview(self._header), _bytes_of(x)]

    def go_on(self, events: int) -> int:
        """Moves what can be moved, by the events that were seen; what to wait for next."""
        if events & ~(select.POLLIN | select.POLLOUT) and not events & select.POLLIN:
            raise ConnectionError(f"the connection to rank {self._peer} has ended")
        with suppress(BlockingIOError):
            if events & select.POLLOUT and self._unsent:
                _drop(self._unsent, self._connection.sendmsg(self._unsent))
        with suppress(BlockingIOError):
            if events & select.POLLIN and self._unfilled:
                # Up to the message's end only: what follows is of the next.
                count = self._connection.recvmsg_into(self._unfilled)[0]
                if count == 0:
                    raise ConnectionError(f"rank {self._peer} has closed the connection")
                _drop(self._unfilled, count)
                if len(self._unfilled) < 2 and self._header != self._expected:
                    raise RuntimeError(self._unlike())
        if self._unfilled:
            self._wake_at(sum(map(len, self._unfilled)))
        return self.wants

    def _wake_at(self, num_missing: int) -> None:
        """Lets this end be woken when a good part of what is missing has come, and at first by the header."""
        wanted = 1 if len(self._unfilled) == 2 or num_missing < WAKE_BYTES // 4 else min(WAKE_BYTES, num_missing)
        if wanted != self._wake_bytes:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            self._wake_bytes = wanted

    def _unlike(self) -> str:
        (tag, num_bytes), (own_tag, own_bytes) = HEADER.unpack(self._header), HEADER.unpack(self._expected)
        return (
            f"rank {self._peer} sent {num_bytes:,} bytes for call {tag:#x}, this one expects {own_bytes:,} for "
            f"{own_tag:#x}: the ranks do not make the same calls in the same order"
        )

    def shut(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self._connection.close()


def _drop(parts: list[memoryview], count: int) -> None:
    """Removes so many bytes from the beginning."""
    while parts and count >= len(parts[0]):
        count -= len(parts.pop(0))
    if count:
        parts[0] = parts[0][count:]


def _bytes_of(x: torch.Tensor) -> memoryview:
    return x.view(torch.uint8).numpy().data
