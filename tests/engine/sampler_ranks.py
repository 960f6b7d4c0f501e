"""Samplers of all ranks of a stage, as threads, their transfers real; for tests of what they draw together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from tests.rank_threads import Join, run_ranks

from phalanx.comm import Communicator
from phalanx.engine.late_result import Drawn
from phalanx.engine.messages import Sampling, TokenLogprobs
from phalanx.engine.sampler import Sampler
from phalanx.parallel.split import Split

VOCAB = 1000
SPLITS = [Split.even(VOCAB, 1), Split.even(VOCAB, 2), Split.explicit(VOCAB, (0, 613, 700, VOCAB))]

Result = TypeVar("Result")


def each_rank(split: Split, work: Callable[[Communicator, slice], Result]) -> list[Result]:
    """What `work` returned on each rank, given its communicator and its part of the vocabulary."""

    def run(rank: int, join: Join) -> Result:
        return work(join("stage", rank, split.num_parts), split[rank].slice)

    return run_ranks(split.num_parts, run)


def decode(
    split: Split,
    steps: Sequence[torch.Tensor],
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    masks: Mapping[int, bytes] = {},
) -> tuple[list[list[int]], list[dict[int, TokenLogprobs]]]:
    """Tokens of each row drawn from the logits [B, VOCAB] of each step, and the log-probabilities of each step.

    All ranks must agree. positions: in the first step. Row i is in slot 2 * i + 1.
    """
    slots = [2 * row + 1 for row in range(len(samplings))]

    def work(comm: Communicator, part: slice) -> tuple[list[list[int]], list[dict[int, TokenLogprobs]]]:
        sampler = Sampler(split, comm)
        for slot, sampling in zip(slots, samplings, strict=True):
            sampler.admit(slot, sampling)
        drawn = [
            sampler.sample(logits[:, part].clone(), slots, [position + step for position in positions], masks)
            for step, logits in enumerate(steps)
        ]
        tokens = torch.stack([draws.tokens for draws in drawn], 1).tolist()
        return tokens, [dict(Drawn(*draws).result(0).logprobs) for draws in drawn]

    results = each_rank(split, work)
    assert all(result == results[0] for result in results)
    return results[0]


def draw(
    split: Split,
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int] | None = None,
    masks: Mapping[int, bytes] = {},
) -> list[int]:
    """The token of each row of logits [B, VOCAB]."""
    tokens, _ = decode(split, [logits], samplings, positions or [7] * len(samplings), masks)
    return [token for (token,) in tokens]
