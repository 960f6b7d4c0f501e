"""Ranks as plain processes of this machine, forked from one that has imported everything (`cluster.ray: none`)."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from phalanx import errors
from phalanx.engine.messages import RankSpec
from phalanx.errors import PlacementError
from phalanx.launcher.hosts import DEFAULT_TARGET, EXIT_GRACE_S, ClusterSettings, RankExit
from phalanx.launcher.nursery import (
    TERMINATE_GRACE_S,
    FrameBuffer,
    NurseryFailed,
    NurseryReady,
    RankEnded,
    RankStarted,
    Report,
    StartRank,
    StopRanks,
    frame,
)
from phalanx.launcher.placement import Node, plan_placement
from phalanx.launcher.rank_main import OPENMP_SPINS

LOOPBACK = "127.0.0.1"
logger = logging.getLogger(__name__)


class ProcessHost:
    """Forks a process a rank on this machine. The nursery starts importing as soon as the host is made."""

    def __init__(self, settings: ClusterSettings, target: str = DEFAULT_TARGET, *, prefix: Sequence[str] = ()) -> None:
        """prefix: command that runs the ranks' parent process by replacing itself, such as `numactl --membind=0`."""
        self._settings = settings
        self._nodes: dict[int, str] = {}
        self._running: set[int] = set()
        self._exits: list[RankExit] = []
        self._frames = FrameBuffer()
        self._decoder = msgspec.msgpack.Decoder(Report)
        self._stopped = False
        self._failure: RankExit | None = None
        self.pids: dict[int, int] = {}
        self.imports_s: float | None = None
        environment = {**os.environ, "PYTHONPATH": _python_path(), "OPENBLAS_NUM_THREADS": "1"}
        environment.setdefault(*OPENMP_SPINS)  # the nursery has torch imported when it forks
        verbose = "verbose" if logger.isEnabledFor(logging.DEBUG) else "quiet"
        # Isolated from the terminal: an interrupt there is for the engine, which then ends its ranks in order.
        self._nursery = subprocess.Popen(
            [*prefix, sys.executable, "-P", "-m", "phalanx.launcher.nursery", target, verbose],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._commands, self._reports = self._nursery.stdin, self._nursery.stdout
        os.set_blocking(self._reports.fileno(), False)

    @property
    def address(self) -> str:
        return LOOPBACK

    @property
    def startup_s(self) -> Mapping[str, float]:
        return {"ray": 0.0}

    def start(self, specs: Sequence[RankSpec]) -> None:
        node = this_machine(self._settings)
        need = self._settings.rank_needs
        layout = specs[0].layout
        plan_placement(layout, need, [node])
        ranks = layout.num_ranks * layout.replicas  # the other replicas run beside this one, each in a host of its own
        devices = _shares(_visible_gpus(), need["GPU"], ranks) if need["GPU"] else [None] * ranks
        for spec in specs:
            device = devices[spec.replica * layout.num_ranks + spec.rank]
            self._nodes[spec.rank] = node.hostname
            self._running.add(spec.rank)
            environment = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
            encoded = msgspec.msgpack.encode(spec)
            self._command(StartRank(spec.rank, encoded, spec.num_threads, self._settings.share_here(spec), environment))

    def nodes(self) -> dict[int, str]:
        return dict(self._nodes)

    def exits(self) -> list[RankExit]:
        self._read()
        exits, self._exits = self._exits, []
        return exits

    def stop(self, timeout_s: float) -> None:
        if self._stopped:
            return
        self._stopped = True
        try:
            self._wait_for_ranks(timeout_s)
            if self._running:
                self._command(StopRanks())
                self._wait_for_ranks(TERMINATE_GRACE_S + EXIT_GRACE_S)
        finally:
            with contextlib.suppress(OSError):
                self._commands.close()
            try:
                self._nursery.wait(TERMINATE_GRACE_S + EXIT_GRACE_S)
            except subprocess.TimeoutExpired:
                logger.warning("the ranks' parent process %d did not end by itself and is killed", self._nursery.pid)
            # Also what ranks may have started themselves; the group outlives its leader while it has members.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._nursery.pid, signal.SIGKILL)
            self._nursery.wait()
            self._reports.close()

    def _command(self, command: StartRank | StopRanks) -> None:
        data = memoryview(frame(command))
        try:
            while data:
                data = data[self._commands.write(data) or 0 :]
        except BrokenPipeError:
            logger.debug("the ranks' parent process is gone; its end is reported by exits()")

    def _wait_for_ranks(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._reports, selectors.EVENT_READ)
            while self._running and self._failure is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                selector.select(left)
                self._read()

    def _read(self) -> None:
        if self._reports.closed or self._failure is not None:
            return
        while True:
            data = self._reports.read(1 << 16)
            if data is None:  # nothing to read now
                return
            if not data:
                self._lose_nursery()
                return
            for each in self._frames.feed(data):
                self._take(self._decoder.decode(each))

    def _take(self, report: Report) -> None:
        match report:
            case NurseryReady():
                self.imports_s = report.imports_s
                if report.num_threads > 1:
                    logger.warning(
                        "%d threads run before ranks are forked; a lock held by one of them would stay locked",
                        report.num_threads,
                    )
            case NurseryFailed():
                message = f"its imports failed: {report.report.message}"
                self._end_all_running(RankExit(-1, "", "failed", message, report.report.traceback))
            case RankStarted():
                self.pids[report.rank] = report.pid
            case RankEnded():
                self._running.discard(report.rank)
                self._exits.append(self._exit_of(report))

    def _exit_of(self, ended: RankEnded) -> RankExit:
        node = self._nodes[ended.rank]
        if ended.exit_code < 0:
            return RankExit(ended.rank, node, "killed", f"killed by {_signal_name(-ended.exit_code)}", ended.stderr)
        if ended.report is not None and ended.report.message is not None:
            report = ended.report
            return RankExit(ended.rank, node, "failed", report.message or "", report.traceback, report.symptom)
        if ended.exit_code:
            return RankExit(ended.rank, node, "failed", f"exited with code {ended.exit_code}", ended.stderr)
        return RankExit(ended.rank, node, "ended", "returned")

    def _lose_nursery(self) -> None:
        code = self._nursery.wait()
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        self._end_all_running(RankExit(-1, "", "killed", f"the parent process of the ranks {how}"))

    def _end_all_running(self, cause: RankExit) -> None:
        self._failure = cause
        for rank in sorted(self._running):
            self._exits.append(RankExit(rank, self._nodes[rank], cause.kind, cause.message, cause.traceback))
        self._running.clear()


def this_machine(settings: ClusterSettings) -> Node:
    """This machine as a node whose cores may be shared by any number of ranks."""
    need = settings.rank_needs
    amounts = {name: float("inf") for name in need if name != "GPU"}
    if need["GPU"]:
        amounts["GPU"] = float(len(_visible_gpus()))
    hostname = socket.gethostname()
    return Node("this machine", LOOPBACK, hostname, amounts, amounts, _accelerator() if need["GPU"] else None)


def _shares(devices: Sequence[str], gpus: float, ranks: int) -> list[str | None]:
    """`CUDA_VISIBLE_DEVICES` of each rank: a whole number of devices each, or several ranks on each device."""
    if gpus >= 1:
        if gpus != int(gpus):
            raise PlacementError(f"cluster.gpus_per_rank is {gpus:g}; above 1 only whole devices can be given")
        width = int(gpus)
        return [",".join(devices[rank * width : (rank + 1) * width]) for rank in range(ranks)]
    sharing = int(1 / gpus + 1e-6)
    return [devices[rank // sharing] for rank in range(ranks)]


def _visible_gpus() -> list[str]:
    """The devices this process may use, as `CUDA_VISIBLE_DEVICES` names them. Does not initialise CUDA."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [device for device in listed.split(",") if device]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _accelerator() -> str | None:
    """Type of this machine's first GPU as Ray calls it, `H100` of `NVIDIA H100 80GB HBM3`, asked of the driver's files.

    Asking CUDA would cost this process a context on the device.
    """
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = next((line for line in information.read_text().splitlines() if line.startswith("Model:")), "")
        return next((word for word in model.replace("-", " ").split() if any(c.isdigit() for c in word)), None)
    return None


def _python_path() -> str:
    """Makes the same `phalanx` importable in the nursery, however it became importable here."""
    root = str(Path(errors.__file__).parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([root, inherited] if inherited else [root])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
