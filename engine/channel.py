"""The wire between the engine and its ranks: msgpack over ZMQ, over TCP so that one form serves all machines."""

from __future__ import annotations

import contextlib
import socket
import time
from types import TracebackType
from typing import Self

import msgspec
import zmq

from phalanx.engine.clock import ClockExchange
from phalanx.engine.messages import ClockAnswer, ClockAsk, ToEngine, ToRank
from phalanx.errors import PhalanxError

LINGER_MS = 1000  # how long a closing side waits for its last words (Shutdown, RankFailed) to leave


class EngineChannel:
    """The engine's end: one socket for all ranks of a replica.

    A message from anyone who does not know the formation's secret is dropped unread. Ranks that ask for the time are
    answered while something is received. Used from one thread, but for `wake`. woken: whether the last `receive` ended
    because of that.
    """

    def __init__(self, address: str, secret: str) -> None:
        """Binds to a free port of `address`, an address of this machine that every rank can reach."""
        self._secret = secret.encode()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine | ClockAsk)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        port = self._socket.bind_to_random_port(f"tcp://{address}")
        self.address = f"tcp://{address}:{port}"
        self.woken = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_in, zmq.POLLIN)

    def wake(self) -> None:
        """Ends a `receive` that waits, or the next one. From any thread; nothing once the channel is closed."""
        with contextlib.suppress(OSError):  # full: it is awake as it is
            self._wake_out.send(b"!")

    def send(self, rank: int, message: ToRank) -> None:
        """Queues `message` for a rank that has already spoken; raises PhalanxError for one that is not connected."""
        self.send_bytes(rank, self.encode(message))

    def encode(self, message: ToRank) -> bytes:
        return self._encoder.encode(message)

    def send_bytes(self, rank: int, data: bytes) -> None:
        try:
            self._socket.send_multipart([_identity(self._secret, rank), data])
        except zmq.ZMQError as error:
            raise PhalanxError(f"rank {rank} is not connected to the engine at {self.address}: {error}") from error

    def receive(self, timeout_s: float) -> ToEngine | None:
        """The next message of any rank, or None if none came in time or someone called `wake`."""
        until_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, until_s - time.monotonic())
            ready = dict(self._poller.poll(int(left_s * 1000)))
            heard_s = time.perf_counter()
            self.woken = self._wake_in.fileno() in ready
            if self.woken:
                self._wake_in.recv(4096)
            if self._socket not in ready:
                return None
            identity, *parts = self._socket.recv_multipart()
            if len(parts) != 1 or not identity.startswith(self._secret + b":"):
                return None
            message: ToEngine | ClockAsk = self._decoder.decode(parts[0])
            if not isinstance(message, ClockAsk):
                return message
            answer = ClockAnswer(message.asked_s, heard_s, time.perf_counter())
            with contextlib.suppress(zmq.ZMQError):  # who asked is gone
                self._socket.send_multipart([identity, self._encoder.encode(answer)])
            if self.woken:
                return None

    def close(self) -> None:
        self._context.destroy(linger=LINGER_MS)
        self._wake_in.close()
        self._wake_out.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RankChannel:
    """A rank's end."""

    def __init__(self, engine: str, rank: int, secret: str) -> None:
        """Connects to the engine's address; ZMQ keeps trying until it answers."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToRank)
        self._answers = msgspec.msgpack.Decoder(ClockAnswer)
        self._context = zmq.Context()
        self._socket = self._connect(engine, _identity(secret.encode(), rank))
        # Of its own: another thread asks for the time, while the rank computes.
        self._clock = self._connect(engine, _identity(secret.encode(), rank) + b":clock")

    def _connect(self, engine: str, identity: bytes) -> zmq.Socket[bytes]:
        made = self._context.socket(zmq.DEALER)
        made.setsockopt(zmq.IDENTITY, identity)
        made.setsockopt(zmq.LINGER, LINGER_MS)
        made.connect(engine)
        return made

    def send(self, message: ToEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def receive(self, timeout_s: float | None = None) -> ToRank | None:
        """The next message, or None if none came in time; None as limit sleeps until one comes."""
        if not self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        message: ToRank = self._decoder.decode(self._socket.recv())
        return message

    def ask_time(self, timeout_s: float) -> ClockExchange | None:
        """Asks for the engine's time; None where no answer comes within the limit. From one thread at a time."""
        asked_s = time.perf_counter()
        self._clock.send(msgspec.msgpack.encode(ClockAsk(asked_s)))
        until_s = time.monotonic() + timeout_s
        while self._clock.poll(int(max(0.0, until_s - time.monotonic()) * 1000)):
            had_s = time.perf_counter()
            answer = self._answers.decode(self._clock.recv())
            if answer.asked_s == asked_s:  # else one that came too late for the question before
                return ClockExchange(asked_s, answer.heard_s, answer.answered_s, had_s)
        return None

    def close(self) -> None:
        self._context.destroy(linger=LINGER_MS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _identity(secret: bytes, rank: int) -> bytes:
    return secret + b":" + str(rank).encode()
