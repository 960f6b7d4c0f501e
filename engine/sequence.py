"""A sequence as the scheduler sees it."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Sequence

from phalanx.engine.messages import Sampling
from phalanx.engine.pages import PrefixPage


class ScheduledSequence:
    """Its tokens, how far plans have taken it, and the pages it has."""

    __slots__ = (
        "admitted",
        "backlog",
        "capacity",
        "decoding",
        "draws_left",
        "due",
        "end",
        "finished",
        "guided",
        "length",
        "mask",
        "name",
        "num_prompt",
        "order",
        "own",
        "pending",
        "prefix",
        "sampling",
        "slot",
        "spare",
        "stop_tokens",
        "tokens",
    )

    def __init__(
        self,
        name: int,
        order: tuple[int, int],
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop_tokens: Collection[int],
        mask: bytes | None,
    ) -> None:
        self.name = name
        self.order = order  # priority, then arrival
        self.tokens = array("i", prompt)  # those known: the prompt, and what was drawn
        self.num_prompt = len(prompt)
        self.end = len(prompt) + max_tokens
        self.sampling = sampling
        self.stop_tokens = frozenset(stop_tokens)
        self.guided = mask is not None
        self.mask = mask  # of the next draw
        self.slot = -1  # while it waits
        self.admitted = False  # once, be it preempted since
        self.finished = False
        self.backlog = len(prompt)  # known tokens to plan before it decodes
        self.length = 0  # known tokens planned, while it has a backlog
        self.decoding = False  # it has no backlog, and more tokens to draw than steps in flight draw
        self.draws_left = max_tokens  # tokens that no plan draws yet
        self.pending = 0  # tokens that steps in flight draw
        self.due = 0  # number of known tokens from which `_settle` has something to do
        self.capacity = 0  # positions that its pages have room for
        self.prefix: list[PrefixPage] = []  # its full pages, which others may use too
        self.own: deque[int] = deque()  # the pages behind them
        self.spare: list[int] = []  # its copies of pages that another sequence shared first
