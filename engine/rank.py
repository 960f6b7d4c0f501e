"""One rank: from its specification to the last step."""

from __future__ import annotations

from phalanx.engine.messages import RankSpec


def run_rank(spec: RankSpec) -> None:
    """Starts a rank and serves steps until the engine says `Shutdown` or goes away.

    Reports `Progress`, then `RankReady`, then a `StepResult` a step (the first rank of the last stage) over the engine's
    channel. A failure is reported there as `RankFailed` and raised. Blocks; the caller's process is the rank.
    """
    raise NotImplementedError
