"""Sends and receives of GPU memory over gloo, through pinned host memory, in pieces, beside compute.

Between GPUs of machines that NCCL does not connect. Each direction to each other rank has a thread, a stream and two
pinned buffers: while one piece is on the network, the next is copied.

    sender    S  ──●ready─ GEMM ─────────────────────────►        the caller's stream: nobody waits
                    ╲
              copy   ╰─[piece 0→A]─[piece 1→B]─┄┄[piece 2→A]──●done   x may be changed
              gloo                 [A ─────────►][B ─────────►]
    receiver  gloo                 [A ─────────►][B ─────────►]
              copy                               [A→piece 0]──[B→piece 1]──●done
              S  ─ GEMM ────────────────────────────────────────────── wait(done) ──►
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import cast

import torch

from phalanx.comm.gpu import CudaGpu, Event, Gpu
from phalanx.comm.group import GroupSpec
from phalanx.comm.torch_backend import PIECE_BYTES, TAG, GlooCommunicator
from phalanx.comm.work import Work

_FOR_EVER_S = 1e8  # a receive may be posted long ahead; who waits for it has the limit
_GLANCE_S = 0.05

Move = Callable[[torch.Tensor], Work]
"""Starts sending, or receiving into, host memory."""


class StagedCommunicator(GlooCommunicator):
    """gloo for GPUs: sends and receives beside compute. Collectives pass through host memory, blocking."""

    def __init__(self, spec: GroupSpec, gpu: Gpu | None = None) -> None:
        super().__init__(spec)
        if gpu is None:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            gpu = CudaGpu(index)
        self._gpu = gpu
        self._couriers: dict[tuple[str, int, int], Courier] = {}  # by direction, other rank and tag

    def _start_send(self, x: torch.Tensor, to: int, tag: int = TAG) -> Work:
        return self._courier("send", to, tag).start(x)

    def _start_recv(self, x: torch.Tensor, source: int, tag: int = TAG) -> Work:
        return self._courier("recv", source, tag).start(x)

    def _courier(self, kind: str, peer: int, tag: int) -> Courier:
        if (kind, peer, tag) not in self._couriers:
            made = Sender if kind == "send" else Receiver

            def move(piece: torch.Tensor) -> Work:
                return self._send_piece(piece, peer, tag) if kind == "send" else self._recv_piece(piece, peer, tag)

            self._couriers[kind, peer, tag] = made(self._gpu, f"phalanx-{kind}-{peer}", move, lambda: self._broken)
        return self._couriers[kind, peer, tag]

    def _close(self) -> None:
        # What has been handed to a sender goes out: its caller was told that it was sent.
        deadline_s = time.monotonic() + (self.timeout_s if self._broken is None else 0.0)
        for courier in self._couriers.values():
            courier.close(deadline_s)
        super()._close()


class Courier:
    """One direction to one other rank."""

    def __init__(self, gpu: Gpu, name: str, move: Move, why_broken: Callable[[], str | None]) -> None:
        self._gpu = gpu
        self._move = move
        self._why_broken = why_broken
        self._stream = gpu.new_stream()
        self._slots = (_Slot(gpu), _Slot(gpu))
        self._turn = 0
        self._jobs: queue.SimpleQueue[StagedWork | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def start(self, x: torch.Tensor) -> StagedWork:
        """Hands over `x`, behind what the current stream has now."""
        ready = self._gpu.new_event(timed=False)
        ready.record(self._gpu.current_stream())
        job = StagedWork(self._gpu, x, ready, self._why_broken)
        self._jobs.put(job)
        return job

    def close(self, deadline_s: float) -> None:
        """Ends the thread when it has done what was handed over, or leaves it at the deadline."""
        self._jobs.put(None)
        self._thread.join(max(0.0, deadline_s - time.monotonic()))

    @torch.inference_mode()  # as its callers: their tensors may be written to in no other mode
    def _serve(self) -> None:
        self._gpu.bind_thread()
        error: Exception | None = None
        while (job := self._jobs.get()) is not None:
            try:
                if error is None:
                    self._stream.wait_event(job.ready)
                    self._carry(job.x.reshape(-1).view(torch.uint8))
            except (RuntimeError, ConnectionError) as failure:
                error = failure
            job.end(self._stream, error)
        try:
            for slot in self._slots:
                slot.settle()
        except (RuntimeError, ConnectionError):
            return  # told by the operations that failed

    def _carry(self, data: torch.Tensor) -> None:
        raise NotImplementedError

    def _next_slot(self) -> _Slot:
        self._turn += 1
        return self._slots[self._turn % 2]


class Sender(Courier):
    def _carry(self, data: torch.Tensor) -> None:
        for piece in torch.split(data, PIECE_BYTES):
            slot = self._next_slot()
            slot.settle()  # its piece before has left
            part = slot.buffer[: piece.numel()]
            self._gpu.copy(part, piece, self._stream)
            slot.copied.record(self._stream)
            slot.copied.synchronize()
            slot.moving = self._move(part)  # goes out while the next piece is copied


class Receiver(Courier):
    def _carry(self, data: torch.Tensor) -> None:
        posted: deque[tuple[_Slot, torch.Tensor]] = deque()
        for piece in torch.split(data, PIECE_BYTES):
            slot = self._next_slot()
            if len(posted) == len(self._slots):
                self._land(*posted.popleft())
            slot.copied.synchronize()  # its piece before has been copied on
            slot.moving = self._move(slot.buffer[: piece.numel()])
            posted.append((slot, piece))
        while posted:
            self._land(*posted.popleft())

    def _land(self, slot: _Slot, piece: torch.Tensor) -> None:
        slot.settle()
        self._gpu.copy(piece, slot.buffer[: piece.numel()], self._stream)
        slot.copied.record(self._stream)


class _Slot:
    """A pinned buffer. copied: recorded behind its last copy. moving: what the network still does with it."""

    def __init__(self, gpu: Gpu) -> None:
        self.buffer = gpu.pinned(PIECE_BYTES)
        self.copied: Event = gpu.new_event(timed=False, sleeps=True)
        self.moving: Work | None = None

    def settle(self) -> None:
        """Returns when the network is through with it."""
        moving, self.moving = self.moving, None
        if moving is not None:
            moving.wait(_FOR_EVER_S)


class StagedWork:
    """`wait` blocks until the copies from or to `x` are enqueued, and makes the current stream wait for them.

    Of a send that is soon; a receive must have arrived.
    """

    def __init__(self, gpu: Gpu, x: torch.Tensor, ready: Event, why_broken: Callable[[], str | None]) -> None:
        self._gpu = gpu
        self._why_broken = why_broken
        self._done = gpu.new_event(timed=False)
        self._ended = threading.Event()
        self._error: Exception | None = None
        self.x = x
        self.ready = ready

    def end(self, stream: object, error: Exception | None) -> None:
        """On the courier's thread."""
        self._error = error
        self._done.record(stream)
        self._ended.set()

    def wait(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not self._ended.wait(min(_GLANCE_S, timeout_s)):
            why = self._why_broken()
            if why is not None:
                raise RuntimeError(why)
            if time.monotonic() > deadline_s:
                return False
        if self._error is not None:
            raise self._error
        self._gpu.current_stream().wait_event(self._done)
        self.x = cast(torch.Tensor, None)  # its memory is the caller's stream's again
        return True
