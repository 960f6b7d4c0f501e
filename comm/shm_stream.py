"""Streams of transfers: each done in order, by the caller while it waits or by a helper thread behind its back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator

import torch

from phalanx.comm.shm_wait import Waiter, Watch

# A transfer in steps: it yields what it must wait for, the words and the value they must reach, and is then resumed.
Steps = Generator[tuple[Watch, int], None, None]

_SHORTEST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 0.001
_CHECK_S = 0.01


class Task:
    """A transfer in a stream; the `Work` that the communicator waits for."""

    __slots__ = ("_steps", "_stream", "done", "error", "need")

    def __init__(self, stream: Stream, steps: Steps) -> None:
        self._stream = stream
        self._steps = steps
        self.need: tuple[Watch, int] | None = None  # None: not begun
        self.done = False
        self.error: Exception | None = None

    def advance(self) -> None:
        """Goes on, what it needed being there, as far as it can without waiting."""
        reached = self._stream.waiter.reached
        for need in self._steps:
            if not reached(*need):
                self.need = need
                return
        self.done = True

    def wait(self, timeout_s: float) -> bool:
        return self._stream.finish(self, timeout_s)


class Stream:
    """Transfers that happen in the order they were added: the collectives, or one direction between two ranks."""

    def __init__(self, waiter: Waiter, helper: Helper) -> None:
        self.waiter = waiter
        self.queue: deque[Task] = deque()
        self.helped = False  # set by the caller's thread, cleared by the helper
        self._helper = helper

    def add(self, steps: Steps, *, begin: bool, hand_over: bool) -> Task:
        """begin: it may take its first steps before those ahead of it have ended. hand_over: the helper may have it,
        where it cannot be done at once. Raises ConnectionError in a group that was aborted.
        """
        self.waiter.check_aborted()
        task = Task(self, steps)
        if self.helped:
            self._helper.add(self, task)
            return task
        self.queue.append(task)
        if begin:
            task.advance()
            self._drop_done()
        if hand_over and not task.done:
            self._helper.take(self)
        return task

    def finish(self, task: Task, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        if self.helped and not self._helper.wait_for(self, task, deadline_s):
            return False
        while not task.done:
            if task.error is not None:
                raise task.error
            head = self.queue[0]
            if head.need is not None and not self.waiter.wait(*head.need, deadline_s):
                return False
            head.advance()
            self._drop_done()
        return True

    def poll(self) -> bool:
        """Takes the steps that can be taken without waiting; whether there were any."""
        moved = False
        while self.queue and ((head := self.queue[0]).need is None or self.waiter.reached(*head.need)):
            head.advance()
            self._drop_done()
            moved = True
        return moved

    def check(self) -> None:
        """Raises ConnectionError where the transfer at the head will never end."""
        if self.queue and (need := self.queue[0].need) is not None:
            self.waiter.check(*need)

    def fail(self, error: Exception) -> None:
        for task in self.queue:
            task.error = error
        self.queue.clear()

    def _drop_done(self) -> None:
        queue = self.queue
        while queue and queue[0].done:
            queue.popleft()


class Helper:
    """A thread that carries on transfers which nobody waits for yet. It is started by the first of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._streams: list[Stream] = []
        self._thread: threading.Thread | None = None
        self._stopped = False

    def take(self, stream: Stream) -> None:
        """Carries on `stream` until its queue is empty."""
        with self._changed:
            stream.helped = True
            self._streams.append(stream)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def add(self, stream: Stream, task: Task) -> None:
        """Appends to a stream that was taken, or was until just now."""
        with self._changed:
            stream.queue.append(task)
            if not stream.helped:
                stream.helped = True
                self._streams.append(stream)
                self._changed.notify_all()

    def wait_for(self, stream: Stream, task: Task, deadline_s: float) -> bool:
        """Blocks until `task` has ended one way or the other, or its stream is the caller's again; False when late."""
        with self._changed:
            return self._changed.wait_for(
                lambda: task.done or task.error is not None or not stream.helped,
                max(0.0, deadline_s - time.monotonic()),
            )

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    # Results may be inference tensors, which can be written to in that mode only; it is a thread's own.
    @torch.inference_mode()
    def _run(self) -> None:
        pause_s, checked_s = _SHORTEST_PAUSE_S, time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._streams) or self._stopped)
                if self._stopped:
                    return
                streams = list(self._streams)
            now_s = time.monotonic()
            check = now_s - checked_s > _CHECK_S
            checked_s = now_s if check else checked_s
            moved = False
            for stream in streams:
                try:
                    moved |= stream.poll()
                    if check:
                        stream.check()
                except (RuntimeError, ConnectionError) as error:
                    stream.fail(error)
                    moved = True
            if moved:
                pause_s = _SHORTEST_PAUSE_S
                with self._changed:
                    for stream in streams:
                        if not stream.queue:
                            stream.helped = False
                            self._streams.remove(stream)
                    self._changed.notify_all()
            else:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
