"""Log-probabilities of tokens, from logits whose vocabulary is cut over the ranks of a stage.

Shapes: B rows, V vocabulary rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from phalanx.engine.messages import TokenLogprobs
from phalanx.engine.vocab_shard import VocabShard, blocks


class LogprobRows(NamedTuple):
    """Log-probabilities of a token in each of B rows, where its logits are.

    tokens: [B] int64. logprobs: [B] float64. top_tokens, top_logprobs: [B, C], of the most likely tokens, best first.
    num_top: how many of those each row is to have.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    top_tokens: torch.Tensor
    top_logprobs: torch.Tensor
    num_top: tuple[int, ...]

    def read(self) -> tuple[TokenLogprobs, ...]:
        """One a row. Waits for the device."""
        top = zip(self.top_tokens.tolist(), self.top_logprobs.tolist(), self.num_top, strict=True)
        return tuple(
            TokenLogprobs(token, logprob, tuple(zip(tokens[:wanted], logprobs[:wanted], strict=True)))
            for token, logprob, (tokens, logprobs, wanted) in zip(
                self.tokens.tolist(), self.logprobs.tolist(), top, strict=True
            )
        )


def token_logprobs(
    shard: VocabShard, logits_BV: torch.Tensor, tokens_B: torch.Tensor, num_top: Sequence[int]
) -> LogprobRows:
    """Of one token a row, int64, with as many of the row's most likely tokens as `num_top` says for it.

    logits_BV: this rank's shard, float32. Called by all ranks of the stage alike.
    """
    column_B = tokens_B - shard.rows.start
    held_B = (column_B >= 0) & (column_B < shard.rows.size)
    value_B1 = logits_BV.gather(1, column_B.masked_fill(~held_B, 0).unsqueeze(1))
    value_B = shard.max(value_B1.squeeze(1).double().masked_fill(~held_B, -math.inf))
    parts = [logits_BV[block].double().logsumexp(1) for block in blocks(len(num_top), logits_BV)]
    total_B = shard.logsumexp(torch.cat(parts))
    count = max(num_top)
    if count:
        top_tokens, top_values = shard.candidates(logits_BV, count)[::-1]
    else:
        top_tokens, top_values = tokens_B.new_empty((len(tokens_B), 0)), value_B.new_empty((len(value_B), 0))
    return LogprobRows(tokens_B, value_B - total_B, top_tokens, top_values - total_B.unsqueeze(1), tuple(num_top))
