"""The Ray actor of one rank. Importing this must stay light: torch comes after the thread counts are set."""

from __future__ import annotations

import os

import msgspec

from phalanx.launcher.pinning import MachineShare
from phalanx.launcher.rank_main import failure_report, run_target, settle_threads


class RankActor:
    """The process of one rank. `run` blocks for the rank's life; `where` answers beside it."""

    def run(self, target: str, spec: bytes, num_threads: int, share: bytes) -> bytes:
        """Runs a rank; returns its `RankReport` in msgpack. spec, share: RankSpec and MachineShare in msgpack."""
        # Not by Ray's runtime_env, which would keep Ray from using the workers it has already started.
        try:
            decoded = msgspec.msgpack.decode(share, type=MachineShare)
            report = run_target(target, spec, settle_threads(num_threads, decoded))
        except BaseException as error:
            report = failure_report(error)
        return msgspec.msgpack.encode(report)

    def where(self) -> int:
        """Its process id."""
        return os.getpid()
