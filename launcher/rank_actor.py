"""The Ray actor of one rank. Importing this must stay light: torch comes after the thread counts are set."""

from __future__ import annotations

import os

import msgspec

from phalanx.launcher.rank_main import failure_report, limit_threads, run_target


class RankActor:
    """The process of one rank. `run` blocks for the rank's life; `where` answers beside it."""

    def run(self, target: str, spec: bytes, num_threads: int) -> bytes:
        """Runs a rank; returns its `RankReport` in msgpack. Takes what `run_target` takes."""
        # Not by Ray's runtime_env, which would keep Ray from using the workers it has already started.
        try:
            report = run_target(target, spec, limit_threads(num_threads))
        except BaseException as error:
            report = failure_report(error)
        return msgspec.msgpack.encode(report)

    def where(self) -> int:
        """Its process id."""
        return os.getpid()
