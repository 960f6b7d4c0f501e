"""Connections between machines, here between threads of one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore, Store

from phalanx.comm.lane import LateError
from phalanx.comm.wire import WAKE_BYTES, Wires
from phalanx.errors import CommError

HERE = "127.0.0.1"


def on_each(num_machines: int, work: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(num_machines) as pool:
        return list(pool.map(work, range(num_machines)))


@contextmanager
def wired(num_machines: int) -> Iterator[list[Wires]]:
    store, peers = HashStore(), [3 * machine for machine in range(num_machines)]
    with ThreadPoolExecutor(num_machines) as pool:
        wires = list(pool.map(lambda machine: Wires(store, "g", HERE, machine, peers, 10.0), range(num_machines)))
    try:
        yield wires
    finally:
        for each in wires:
            each.close()


def soon() -> float:
    return time.monotonic() + 10.0


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 4),
    st.lists(st.integers(0, 40) | st.integers(0, 3 * WAKE_BYTES), min_size=1, max_size=4),
    st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]),
)
def test_what_is_sent_arrives_at_all_and_in_order(num_machines: int, lengths: list[int], dtype: torch.dtype) -> None:
    def held(machine: int, to: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * machine + 10 * to + length)
        return torch.randint(0, 200, (length,), generator=generator).to(dtype)

    with wired(num_machines) as wires:

        def work(machine: int) -> None:
            others = [other for other in range(num_machines) if other != machine]
            for number, length in enumerate(lengths):
                received = {other: torch.zeros(length, dtype=dtype) for other in others}
                sent = {other: held(machine, other, length) for other in others}
                wires[machine].swap(sent, received, 7 + number, soon())
                for other in others:
                    assert torch.equal(received[other], held(other, machine, length))

        on_each(num_machines, work)


def test_one_may_only_send_and_the_other_only_receive() -> None:
    x = torch.arange(2 * WAKE_BYTES, dtype=torch.float32)
    with wired(2) as wires:
        received = torch.empty_like(x)

        def work(machine: int) -> None:
            if machine == 0:
                wires[0].swap({1: x}, {}, 1, soon())
            else:
                wires[1].swap({}, {0: received}, 1, soon())

        for _ in range(2):
            on_each(2, work)
            assert torch.equal(received, x)
            received.zero_()


@pytest.mark.parametrize(("tag", "length", "told"), [(2, 100, "for call 0x2"), (1, 101, "404 bytes")])
def test_a_message_of_another_call_is_refused(tag: int, length: int, told: str) -> None:
    with wired(2) as wires:
        wires[0].swap({1: torch.zeros(length)}, {}, tag, soon())
        with pytest.raises(RuntimeError, match=rf"rank 0 sent .*{told}.* expects 400 .* do not make the same calls"):
            wires[1].swap({}, {0: torch.zeros(100)}, 1, soon())


def test_one_who_does_not_come_is_late() -> None:
    with wired(2) as wires, pytest.raises(LateError):
        wires[0].swap({}, {1: torch.zeros(4)}, 1, time.monotonic() + 0.1)


@pytest.mark.parametrize("ended_by", ["close", "shut here", "shut there"])
def test_the_end_of_a_connection_ends_the_wait(ended_by: str) -> None:
    with wired(2) as wires:
        end = {"close": wires[1].close, "shut here": wires[0].shut, "shut there": wires[1].shut}[ended_by]
        timer = threading.Timer(0.1, end)
        timer.start()
        with pytest.raises(ConnectionError, match="rank 3"):
            wires[0].swap({}, {1: torch.zeros(10 * WAKE_BYTES)}, 1, soon())
        timer.join()


def test_a_stranger_is_sent_away() -> None:
    class Telling(HashStore):
        """Connects to whoever is told here, and says nonsense, before the one who may."""

        def set(self, key: str, value: str) -> None:
            host, port, _ = value.split()
            if key == "wire/0":
                with socket.create_connection((host, int(port))) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + b" " * 20)
            super().set(key, value)

    store: Store = Telling()
    wires = on_each(2, lambda machine: Wires(store, "g", HERE, machine, [0, 1], 10.0))
    received = torch.zeros(3)
    wires[1].swap({0: torch.ones(3)}, {}, 1, soon())  # type: ignore[attr-defined]
    wires[0].swap({}, {1: received}, 1, soon())  # type: ignore[attr-defined]
    assert received.tolist() == [1.0, 1.0, 1.0]
    for each in wires:
        each.close()  # type: ignore[attr-defined]


def test_a_machine_that_never_connects_is_named() -> None:
    with pytest.raises(CommError, match="of ranks 0, 5 at most this one is here"):
        Wires(HashStore(), "g", HERE, 0, [0, 5], 0.2)
