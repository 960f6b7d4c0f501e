"""Ranks whose clocks are wrong, each by another amount, as those of machines that were started at other times."""

from __future__ import annotations

import time

from phalanx.comm.ledger import Ledger
from phalanx.engine.messages import RankSpec
from phalanx.engine.run_rank import run_rank

SKEWS_S = (0.0, 5000.0, -300.0, 0.75)


def run(spec: RankSpec) -> None:
    """As `run_rank`."""
    true_s, skew_s = time.perf_counter, SKEWS_S[spec.rank]

    def skewed_s() -> float:
        return true_s() + skew_s

    time.perf_counter = skewed_s
    defaults = Ledger.__init__.__defaults__
    assert defaults is not None
    Ledger.__init__.__defaults__ = (*defaults[:-1], skewed_s)
    run_rank(spec)
