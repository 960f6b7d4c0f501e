"""How busy stages are while their pipeline is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from phalanx.engine.messages import StageStep
from phalanx.engine.timeline import busy_share


class Span(NamedTuple):
    """On the clock of the steps."""

    from_s: float
    until_s: float


def full_span(stages: Sequence[Sequence[StageStep]]) -> Span | None:
    """While every stage of a replica can have work: from the moment the last of them begins its first step to the
    moment the first of them ends its last. None where there is no such time, as in a pipeline that ran a single step.

    stages: the steps of each, oldest first.
    """
    if not stages or not all(stages):
        return None
    span = Span(max(steps[0].started_s for steps in stages), min(steps[-1].ended_s for steps in stages))
    return span if span.from_s < span.until_s else None


def busy_shares(stages: Sequence[Sequence[StageStep]]) -> tuple[float, ...] | None:
    """The share of `full_span` that each stage spent inside steps. The rest is bubbles."""
    span = full_span(stages)
    if span is None:
        return None
    return tuple(busy_share(steps, *span) for steps in stages)
