"""Waiting for words of shared memory: at hand, by yielding the core, asleep; and noticing who will never come."""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
import weakref
from typing import NamedTuple

from phalanx.comm.group import GroupSpec
from phalanx.comm.shm_segment import ABORTED, Segment
from phalanx.errors import CommError

_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1  # x86-64; linux/futex.h
_BELL_MASK = 0x7FFFFFFF  # the kernel compares 32 bits

# How long a wait goes on giving its core away before it sleeps. Falling asleep and being woken costs 20 to 50 us;
# giving the core away costs 0.5 us where nobody wants it, and lets the others on where there are more ranks than cores:
# 5 ranks on 2 cores take 290 us from one all-reduce to the next with anything from 100 us, 400 us with nothing.
YIELD_S = 200e-6
# A rank that falls asleep just as another publishes may miss the bell once; then the first nap bounds what it costs.
_FIRST_NAP_S = 0.001
_LONGEST_NAP_S = 0.02


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class Watch(NamedTuple):
    """Words that a wait is for, and the ranks that raise them."""

    words: tuple[int, ...]
    ranks: tuple[int, ...]


class Waiter:
    """One rank's eyes on the words of the others, and its hand on their bells.

    `wait` is for one thread at a time; everything else for any.
    """

    def __init__(self, segment: Segment, spec: GroupSpec) -> None:
        """segment: that all ranks hold. spec: of this rank. Raises CommError where one of them has ended already."""
        self._words = segment.words
        self._rank = rank = spec.rank
        self._called = spec.called
        self._address = segment.address
        self._bells = [segment.bell(other) for other in range(segment.size)]
        self._awaited = [segment.awaited(other) for other in range(segment.size)]
        self._left = [segment.left(other) for other in range(segment.size)]
        self._mark = rank + 1
        self._timespec = _Timespec()
        self._syscall = ctypes.CDLL(None).syscall
        pids = [segment.words[segment.pid(other)] for other in range(segment.size)]
        self.pidfds: list[int] = []  # by rank
        weakref.finalize(self, _close_files, self.pidfds)
        self._ends: list[select.poll] = []
        self._ends_turn = threading.Lock()  # the helper looks too, and `poll` refuses a second thread (RuntimeError)
        try:
            for pid in pids:
                self.pidfds.append(os.pidfd_open(pid))
                self._ends.append(select.poll())
                self._ends[-1].register(self.pidfds[-1], select.POLLIN)
        except OSError as error:
            self.close()
            raise CommError(
                f"rank {pids.index(pid)} of group {spec.name!r} (process {pid}) ended while the group was formed: "
                "its own error is the cause"
            ) from error
        # Threads of one process take turns anyway: giving the core away would keep the interpreter's lock.
        self._yield_s = 0.0 if pids.count(pids[rank]) > 1 else YIELD_S

    def reached(self, watch: Watch, target: int) -> bool:
        """Whether all words of `watch` are at `target` or past it."""
        words = self._words
        for word in watch.words:  # noqa: SIM110 - a generator would take twice the time
            if words[word] < target:
                return False
        return True

    def wait(self, watch: Watch, target: int, deadline_s: float) -> bool:
        """Blocks until `reached`, or returns False at `deadline_s` of the monotonic clock.

        Raises ConnectionError where a rank that is waited for has ended, has closed its end, or the group was aborted.
        """
        words = self._words
        for word, rank in zip(watch.words, watch.ranks, strict=True):
            if words[word] < target and not self._wait_for(word, rank, target, deadline_s):
                return False
        return True

    def check(self, watch: Watch, target: int) -> None:
        """Raises ConnectionError where `target` will never be reached."""
        for word, rank in zip(watch.words, watch.ranks, strict=True):
            if self._words[word] < target:
                self._check(word, rank, target)

    def wake_if_awaiting(self, rank: int) -> None:
        """To be called after every write that `rank` may wait for."""
        if self._words[self._awaited[rank]] == self._mark:
            self._ring(rank)

    def wake_all_awaiting(self) -> None:
        """The same for all ranks."""
        words, mark = self._words, self._mark
        for rank, awaited in enumerate(self._awaited):
            if words[awaited] == mark:
                self._ring(rank)

    def abort(self) -> None:
        """Ends the waits of all ranks."""
        if not self._words[ABORTED]:
            self._words[ABORTED] = self._mark
        for rank in range(len(self._bells)):
            self._ring(rank)

    def leave(self) -> None:
        """Tells the others that nothing more comes from this rank."""
        self._words[self._left[self._rank]] = 1
        self.wake_all_awaiting()

    def close(self) -> None:
        """Releases the files by which the ends of the others are noticed."""
        _close_files(self.pidfds)

    def _wait_for(self, word: int, rank: int, target: int, deadline_s: float) -> bool:
        words, clock_s, sched_yield = self._words, time.monotonic, os.sched_yield
        until_s = clock_s() + self._yield_s
        while clock_s() < until_s:
            sched_yield()
            if words[word] >= target:
                return True
        awaited, bell = self._awaited[self._rank], self._bells[self._rank]
        nap_s = _FIRST_NAP_S
        words[awaited] = rank + 1
        try:
            while True:
                rung = words[bell]
                if words[word] >= target:
                    return True
                self._check(word, rank, target)
                left_s = deadline_s - clock_s()
                if left_s <= 0:
                    return False
                self._timespec.nanoseconds = int(min(nap_s, left_s) * 1e9)
                self._syscall(
                    _SYS_FUTEX,
                    ctypes.c_void_p(self._address + 8 * bell),
                    _FUTEX_WAIT,
                    ctypes.c_uint32(rung),
                    ctypes.byref(self._timespec),
                    None,
                    0,
                )
                nap_s = min(2 * nap_s, _LONGEST_NAP_S)
        finally:
            words[awaited] = 0

    def check_aborted(self) -> None:
        """Raises ConnectionError where a rank has aborted the group."""
        if self._words[ABORTED]:
            raise ConnectionError(f"rank {self._called(self._words[ABORTED] - 1)} ended the group")

    def _check(self, word: int, rank: int, target: int) -> None:
        words = self._words
        self.check_aborted()
        with self._ends_turn:
            ended = bool(self._ends[rank].poll(0))
        gone = "closed its end" if words[self._left[rank]] else "ended" if ended else ""
        # What it wrote before it went still counts.
        if gone and words[word] < target:
            raise ConnectionError(f"rank {self._called(rank)} has {gone}")

    def _ring(self, rank: int) -> None:
        bell = self._bells[rank]
        self._words[bell] = (self._words[bell] + 1) & _BELL_MASK
        self._syscall(_SYS_FUTEX, ctypes.c_void_p(self._address + 8 * bell), _FUTEX_WAKE, 1, None, None, 0)


def _close_files(files: list[int]) -> None:
    while files:
        os.close(files.pop())
