"""The life of a rank: made, at work, closed; and what the engine is told where that fails."""

from __future__ import annotations

import time

_IMPORTING_SINCE = time.perf_counter()  # before the imports that take seconds, so that they can be told

import gc
import socket
import threading
import traceback

from phalanx.comm.work import GroupBrokenError
from phalanx.engine.channel import RankChannel
from phalanx.engine.clock import ClockKeeper
from phalanx.engine.messages import RankFailed, RankSpec
from phalanx.engine.rank import Rank
from phalanx.engine.step_loop import StepLoop
from phalanx.errors import PhalanxError

IMPORT_S = time.perf_counter() - _IMPORTING_SINCE


def run_rank(spec: RankSpec) -> None:
    """Starts a rank and serves steps until the engine says `Shutdown`.

    Reports `Progress`, then `RankReady`, then a `StepResult` a step (one rank of the last stage) and now and then
    a `StageReport` (the first rank of each stage) and a `CommReport` over the engine's channel, and a `TraceReport`
    where all is traced. A failure is reported there as `RankFailed` and raised. Blocks; the caller's process is the
    rank.
    """
    with RankChannel(spec.engine, spec.rank, spec.secret) as channel:
        try:
            rank = Rank(spec, channel.send, imports_s=IMPORT_S)
            try:
                _serve(rank, channel)
            finally:
                rank.close()
        except Exception as error:
            channel.send(
                RankFailed(
                    rank=spec.rank,
                    node=socket.gethostname(),
                    message=f"{error}" if isinstance(error, PhalanxError) else f"{type(error).__name__}: {error}",
                    traceback=traceback.format_exc(),
                    symptom=isinstance(error, GroupBrokenError),
                )
            )
            raise


def _serve(rank: Rank, channel: RankChannel) -> None:
    if threading.current_thread() is threading.main_thread():  # else this process is the caller's own
        # What start-up made stays: a full collection that walks it stalled steps for 100 ms and more.
        gc.collect()
        gc.freeze()
    clock = ClockKeeper(channel.ask_time)
    try:
        channel.send(rank.ready())
        StepLoop(rank, channel, clock).run()
    finally:
        clock.close()
