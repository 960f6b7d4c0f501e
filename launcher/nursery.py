"""The process that imports everything once and forks one rank after another from itself.

`python -P -m phalanx.launcher.nursery MODULE:FUNCTION VERBOSE`, started by `ProcessHost`. Commands come on standard
input, reports leave on standard output, both as frames: four bytes of length (big-endian) and a msgpack message. The
end of standard input means that the engine is gone, however it went, and ends every rank.

Importing torch takes over a second of a core; a fork takes a few milliseconds. Nothing here may start a thread or touch
CUDA, for neither survives a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import selectors
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from phalanx.launcher.pinning import MachineShare
from phalanx.launcher.rank_main import RankReport, failure_report, load_target, run_target, settle_threads

PR_SET_PDEATHSIG = 1  # linux/prctl.h
TAIL_BYTES = 8192  # kept of what a rank wrote to standard error
TERMINATE_GRACE_S = 2.0  # for `finally` blocks of a rank that is asked to end


class StartRank(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Fork a rank. spec: RankSpec in msgpack. num_threads: 0 for its share. environment: variables to set in it."""

    rank: int
    spec: bytes
    num_threads: int
    share: MachineShare
    environment: dict[str, str] = {}


class StopRanks(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End what still runs: SIGTERM now, SIGKILL after TERMINATE_GRACE_S."""


class NurseryReady(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Everything is imported. num_threads: of the nursery itself, which must be 1."""

    imports_s: float
    num_threads: int


class NurseryFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The imports failed; no rank can ever start."""

    report: RankReport


class RankStarted(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank was forked."""

    rank: int
    pid: int


class RankEnded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's process ended. exit_code: negative for a signal. report: None where it could not make one.

    stderr: the last lines it wrote.
    """

    rank: int
    exit_code: int
    report: RankReport | None
    stderr: str


Command = StartRank | StopRanks
Report = NurseryReady | NurseryFailed | RankStarted | RankEnded


class FrameBuffer:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames completed by `data`."""
        self._data += data
        frames = []
        while len(self._data) >= 4:
            end = 4 + int.from_bytes(self._data[:4], "big")
            if len(self._data) < end:
                break
            frames.append(bytes(self._data[4:end]))
            del self._data[:end]
        return frames


def frame(message: Command | Report) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "big") + data


class _TerminatedError(BaseException):
    """Raised in a rank by SIGTERM, so that its `finally` blocks run."""


@dataclass(slots=True)
class _Child:
    rank: int
    stderr: int
    report: int
    tail: bytes = b""


class Nursery:
    """Forks, watches and ends ranks. commands, reports: file descriptors. verbose: pass on what ranks write."""

    def __init__(self, target: str, commands: int, reports: int, verbose: bool) -> None:
        self._target = target
        self._commands = commands
        self._reports = reports
        self._verbose = verbose
        self._children: dict[int, _Child] = {}
        self._kill_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._wake, wake_write = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake_write, False)
        self._inherited = [commands, reports, self._wake, wake_write]
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._selector.register(commands, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def serve(self) -> None:
        """Until standard input ends; then no rank is left."""
        frames = FrameBuffer()
        decoder = msgspec.msgpack.Decoder(Command)
        while True:
            timeout = None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.fd == self._commands:
                    data = os.read(self._commands, 1 << 16)
                    if not data:
                        self._end_all()
                        return
                    for each in frames.feed(data):
                        self._obey(decoder.decode(each))
                elif key.fd == self._wake:
                    os.read(self._wake, 4096)
                elif isinstance(key.data, _Child):
                    self._drain(key.data)
            self._reap()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._kill_at = None
                self._signal_all(signal.SIGKILL)

    def _obey(self, command: Command) -> None:
        match command:
            case StartRank():
                self._fork(command)
            case StopRanks():
                self._signal_all(signal.SIGTERM)
                self._kill_at = time.monotonic() + TERMINATE_GRACE_S

    def _fork(self, command: StartRank) -> None:
        stderr_read, stderr_write = os.pipe()
        report_read, report_write = os.pipe()
        nursery = os.getpid()
        pid = os.fork()
        if pid == 0:
            for descriptor in (*self._inherited, stderr_read, report_read):
                os.close(descriptor)
            for child in self._children.values():
                os.close(child.stderr)
                os.close(child.report)
            self._selector.close()
            _be_rank(self._target, command, nursery, stderr_write, report_write)
        os.close(stderr_write)
        os.close(report_write)
        os.set_blocking(stderr_read, False)
        os.set_blocking(report_read, False)
        child = _Child(command.rank, stderr_read, report_read)
        self._children[pid] = child
        self._selector.register(stderr_read, selectors.EVENT_READ, child)
        self.tell(RankStarted(command.rank, pid))

    def _drain(self, child: _Child) -> None:
        """Takes what a rank wrote to standard error, so that it never waits for a reader."""
        while True:
            try:
                data = os.read(child.stderr, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                # Closed by the rank itself: nothing more can come, and a closed pipe would be readable for ever.
                with contextlib.suppress(KeyError):
                    self._selector.unregister(child.stderr)
                return
            child.tail = (child.tail + data)[-TAIL_BYTES:]
            if self._verbose:
                with contextlib.suppress(OSError):
                    os.write(
                        2, b"".join(b"[rank %d] %s" % (child.rank, line) for line in data.splitlines(keepends=True))
                    )

    def _reap(self) -> None:
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            child = self._children.pop(pid)
            self._drain(child)
            with contextlib.suppress(KeyError):
                self._selector.unregister(child.stderr)
            report: RankReport | None = None
            with contextlib.suppress(BlockingIOError, msgspec.DecodeError):
                report = msgspec.msgpack.decode(os.read(child.report, 1 << 17), type=RankReport)
            os.close(child.stderr)
            os.close(child.report)
            stderr = child.tail.decode(errors="replace")
            self.tell(RankEnded(child.rank, os.waitstatus_to_exitcode(status), report, stderr))

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._children:  # unreaped, so no pid can have passed to another process
            os.kill(pid, number)

    def _end_all(self) -> None:
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + TERMINATE_GRACE_S
        while self._children and time.monotonic() < deadline:
            time.sleep(0.02)
            self._reap()
        self._signal_all(signal.SIGKILL)

    def tell(self, report: Report) -> None:
        """Writes a report to the engine's process."""
        data = frame(report)
        with contextlib.suppress(BrokenPipeError):  # an engine that is gone is noticed on standard input
            while data:
                data = data[os.write(self._reports, data) :]


def _be_rank(target: str, command: StartRank, nursery: int, stderr: int, report: int) -> NoReturn:
    """The rest of a forked process's life."""
    exit_code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if sys.platform == "linux":
            # Should the nursery be killed, nobody is left to end this process in a gentler way.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != nursery:
                os._exit(1)
        os.dup2(stderr, 1)
        os.dup2(stderr, 2)
        os.close(stderr)
        faulthandler.enable()
        signal.signal(signal.SIGTERM, _raise_terminated)
        threads = settle_threads(command.num_threads, command.share, command.environment)
        _adopt_threads(threads.num_threads)
        result = run_target(target, command.spec, threads)
        exit_code = 0 if result.message is None else 1
        _write_report(report, result)
    except _TerminatedError:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        _write_report(report, failure_report(error))
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit: destructors of communication libraries are known to hang or crash at interpreter exit, and
        # what a rank holds outside its process has been released by `run_rank`.
        os._exit(exit_code)


def _raise_terminated(number: int, stack: object) -> NoReturn:
    raise _TerminatedError


def _adopt_threads(num_threads: int) -> None:
    """torch was imported, with its thread counts, before the fork."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads)


def _write_report(descriptor: int, report: RankReport) -> None:
    data = msgspec.msgpack.encode(report)
    os.set_blocking(descriptor, False)  # read only after this process ended, so waiting for a reader would be for ever
    with contextlib.suppress(BlockingIOError):
        os.write(descriptor, data)


def main() -> None:
    target, verbose = sys.argv[1], sys.argv[2] == "verbose"
    # A library that prints must not end up in the frames.
    commands, reports = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    nursery = Nursery(target, commands, reports, verbose)
    start = time.perf_counter()
    try:
        load_target(target)
    except Exception as error:
        nursery.tell(NurseryFailed(failure_report(error)))
        return
    tasks = len(list(Path("/proc/self/task").iterdir())) if sys.platform == "linux" else 1
    nursery.tell(NurseryReady(time.perf_counter() - start, tasks))
    nursery.serve()


if __name__ == "__main__":
    main()
    os._exit(0)  # taking torch apart would cost half a second, and there is nothing to take apart
