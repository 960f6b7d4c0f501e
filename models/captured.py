"""Steps of one token a sequence as CUDA graphs: launched one by one, their kernels would wait for the interpreter.

A graph stands for the steps of up to so many sequences; what a step lacks of them are places without tokens, which
attend to nothing and store nothing.

Shapes: T tokens of a step, H hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import CudaGraphs, DevicePlan, Graph, Graphs, PlanRoom, planned_places
from phalanx.kernels.triton_gpu import find_triton
from phalanx.models.batch import KVCache, Part
from phalanx.models.recorded import Passed

MOST_PLACES = 256  # with more, kernels take their time and the interpreter is ahead of them

Run = Callable[[torch.Tensor, Part, KVCache, bool], Passed]


def num_places_for(num_tokens: int, most_places: int) -> int:
    """Of the graph for a step of so many tokens: 1, 2, 4, 8, then multiples of 8."""
    places = 1 << (num_tokens - 1).bit_length() if num_tokens <= 8 else -(-num_tokens // 8) * 8
    return min(places, most_places)


def graph_places(max_sequences: int) -> list[int]:
    """Of each graph that steps of up to so many sequences may want, the smallest first."""
    most_places = min(max_sequences, MOST_PLACES)
    return sorted({num_places_for(num_tokens, most_places) for num_tokens in range(1, most_places + 1)})


@dataclass
class _Step:
    """run: the step as it is. graph: once it is captured."""

    run: Callable[[], None]
    graph: Graph | None = None


class CapturedSteps:
    """The way of a step's tokens through a stage, captured for each number of places that comes again: the first time
    it is run as it is, which compiles what is to be captured.

    run: makes that way with what it is given; its logits may be of any dtype. comm: whose transfers are in it.
    """

    most_logits: ClassVar[float] = math.inf

    def __init__(self, run: Run, graphs: Graphs, comm: Communicator) -> None:
        self._run = run
        self._comm = comm
        self._graphs = graphs
        self._cache: KVCache | None = None
        self._room: PlanRoom | None = None
        self._most_places = 0
        self._steps: dict[tuple[int, bool], _Step] = {}  # by number of places, and whether logits are asked for
        # Of all steps, which take the first rows; outside of the memory that graphs share.
        self._input: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, part: Part, cache: KVCache, with_logits: bool) -> Passed | None:
        """What is behind the layers, in memory of the next steps too; None for a step that is not captured.

        x: one row a token, of the same shape and dtype in all steps.
        """
        plan, num_tokens = part.attention, len(x)
        if not isinstance(plan, DevicePlan) or plan.most_new != 1 or num_tokens > MOST_PLACES:
            return None
        if self._cache is not cache or self._room is not plan.room:
            self.forget()
            self._cache, self._room, self._most_places = cache, plan.room, min(plan.room.max_sequences, MOST_PLACES)
        self._input = self._kept(self._input, x)
        like = num_places_for(num_tokens, self._most_places), with_logits
        step = self._steps.get(like)
        if step is None:
            step = _Step(partial(self._pass, self._input[: like[0]], plan.standing_for(like[0]), cache, with_logits))
            step.run()
            self._steps[like] = step
        else:
            if step.graph is None:
                step.graph = self._comm.captured(self._graphs, step.run)
            step.graph.replay()
        assert self._hidden is not None
        logits_TV = self._logits[:num_tokens] if with_logits and self._logits is not None else None
        return Passed(self._hidden[:num_tokens], logits_TV)

    def forget(self) -> None:
        """Lets go of all steps, and of the memory that they know."""
        self._graphs.reset()
        self._cache = self._room = None
        self._steps.clear()
        self._input = self._hidden = self._logits = None

    def _pass(self, x: torch.Tensor, plan: DevicePlan, cache: KVCache, with_logits: bool) -> None:
        passed = self._run(x, Part(*planned_places(plan), plan), cache, with_logits)
        self._hidden = self._kept(self._hidden, passed.hidden)
        if passed.logits is not None:
            self._logits = self._kept(self._logits, passed.logits)

    def _kept(self, kept: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """x in the first rows of what is kept of its kind, or from now on."""
        if kept is None:
            kept = x.new_zeros((self._most_places, *x.shape[1:]))
        kept[: len(x)].copy_(x)
        return kept


class GraphChoice(NamedTuple):
    """graphs: None for steps that are not captured. told: which are, or why none."""

    graphs: Graphs | None
    told: str


def choose_graphs(comm: Communicator, max_sequences: int, *, wanted: bool) -> GraphChoice:
    """For a rank on a GPU. comm: of its stage. wanted: as `engine.cuda_graphs` says."""
    if not wanted:
        return GraphChoice(None, "launched one by one, because engine.cuda_graphs is false")
    if find_triton().operators is None:
        return GraphChoice(None, "launched one by one, because attention cannot be captured without Triton")
    if not comm.capturable:
        return GraphChoice(None, f"launched one by one, because transfers by {comm.backend} cannot be captured")
    most_places = min(max_sequences, MOST_PLACES)
    few = graph_places(min(8, most_places))
    told = "CUDA graphs for " + ", ".join(map(str, few))
    if most_places > 8:
        told += f" and, in steps of 8, up to {most_places}"
    told += " sequences, each captured when it is needed again"
    if max_sequences > MOST_PLACES:
        told += "; more are launched one by one"
    return GraphChoice(CudaGraphs(), told)
