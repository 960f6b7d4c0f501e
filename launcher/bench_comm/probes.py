"""What the machines themselves can do, without a communicator: a word between two cores, a stream between two hosts."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch._C._distributed_c10d import Store

from phalanx.comm.rendezvous import join_host_port, local_address, parse_rendezvous

CHUNK_BYTES = 1 << 20
NUM_ECHOES = 64
_LINE_WORDS = 16  # words apart, so that no two are fetched together


def pass_word(store: Store, key: str, side: int, passes: int, cores: Sequence[int]) -> dict[str, float]:
    """Passes a word to and fro between two processes of one machine through memory that both map.

    side: 0 or 1. key: of this exchange on the store. cores: places among those this process may use, one a side; both
    are held there meanwhile. Returns, in seconds, `word`: from a write on one side until the other sees it, the
    interpreter included; and `interpreter`: what the same loop takes within one process. Nobody gives way while
    waiting, so the two cores must be different ones.
    """
    with _shared_words(store, key, side) as words, _held_on(cores[side]):
        mine, theirs = side * _LINE_WORDS, (1 - side) * _LINE_WORDS
        store.set(f"{key}/ready/{side}", "")
        store.get(f"{key}/ready/{1 - side}")
        started_s = time.perf_counter()
        for number in range(1, passes + 1):
            if side == 0:
                words[mine] = number
            while words[theirs] != number:
                pass
            if side == 1:
                words[mine] = number
        word_s = (time.perf_counter() - started_s) / passes / 2
        own = 2 * _LINE_WORDS + mine
        started_s = time.perf_counter()
        for number in range(1, passes + 1):
            words[own] = number
            while words[own] != number:
                pass
        return {"word": word_s, "interpreter": (time.perf_counter() - started_s) / passes}


@contextlib.contextmanager
def _shared_words(store: Store, key: str, side: int) -> Iterator[memoryview]:
    """Words of a memory file without a name, which side 0 makes: it ends with the last process that maps it."""
    if side == 0:
        file = os.memfd_create("phalanx-bench")
        os.ftruncate(file, mmap.PAGESIZE)
        store.set(f"{key}/file", f"/proc/{os.getpid()}/fd/{file}")
    else:
        file = os.open(store.get(f"{key}/file").decode(), os.O_RDWR | os.O_CLOEXEC)
    memory = mmap.mmap(file, mmap.PAGESIZE)
    words = memoryview(memory).cast("q")
    try:
        yield words
    finally:
        words.release()
        memory.close()
        os.close(file)


@contextlib.contextmanager
def _held_on(place: int) -> Iterator[None]:
    """On one of the cores that this process may use."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[place]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def stream(store: Store, key: str, side: int, seconds: float, towards: str, interface: str | None) -> dict[str, float]:
    """Sends over one plain TCP connection from side 0 to side 1 for so many seconds, after a few echoes of one byte.

    towards, interface: as communicators choose their addresses: the rendezvous, and the interface or None. Returns on
    side 1 `bytes_per_s` as they came in, and on side 0 `one_way_s`, half of an echo.
    """
    if side == 1:
        address = local_address(parse_rendezvous(towards).host, interface)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as server:
            store.set(key, join_host_port(address, server.getsockname()[1]))
            connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return {"bytes_per_s": _receive(connection)}
    place = parse_rendezvous(store.get(key).decode())
    with socket.create_connection((str(place.host), int(place.port or 0))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return {"one_way_s": _send(connection, seconds)}


def _send(connection: socket.socket, seconds: float) -> float:
    echoes_s = []
    for _ in range(NUM_ECHOES):
        started_s = time.perf_counter()
        connection.sendall(b"?")
        connection.recv(1)
        echoes_s.append(time.perf_counter() - started_s)
    data = bytes(CHUNK_BYTES)
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        connection.sendall(data)
    return statistics.median(echoes_s) / 2


def _receive(connection: socket.socket) -> float:
    for _ in range(NUM_ECHOES):
        connection.recv(1)
        connection.sendall(b"!")
    buffer = bytearray(CHUNK_BYTES)
    connection.recv_into(buffer, 1)
    started_s, num_bytes = time.perf_counter(), 0
    while count := connection.recv_into(buffer):
        num_bytes += count
    return num_bytes / (time.perf_counter() - started_s)


def largest_cache_bytes() -> int:
    """The largest cache of the first core, as Linux tells it; 32 MiB where nothing does."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=32 << 20)
