"""Log-probabilities of tokens, from logits whose vocabulary is cut over the ranks of a stage.

Shapes: B rows, V vocabulary rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from phalanx.engine.messages import TokenLogprobs
from phalanx.engine.vocab_shard import VocabShard, blocks


def token_logprobs(
    shard: VocabShard, logits_BV: torch.Tensor, tokens_B: torch.Tensor, num_top: Sequence[int]
) -> tuple[TokenLogprobs, ...]:
    """Of one token a row, int64, with as many of the row's most likely tokens as `num_top` says for it.

    logits_BV: this rank's shard, float32. Called by all ranks of the stage alike.
    """
    column_B = tokens_B - shard.rows.start
    held_B = (column_B >= 0) & (column_B < shard.rows.size)
    value_B1 = logits_BV.gather(1, column_B.masked_fill(~held_B, 0).unsqueeze(1))
    value_B = shard.max(value_B1.squeeze(1).double().masked_fill(~held_B, -math.inf))
    parts = [logits_BV[block].double().logsumexp(1) for block in blocks(len(num_top), logits_BV)]
    total_B = shard.logsumexp(torch.cat(parts))
    tokens, logprobs = tokens_B.tolist(), (value_B - total_B).tolist()
    count = max(num_top)
    if count == 0:
        return tuple(TokenLogprobs(token, logprob, ()) for token, logprob in zip(tokens, logprobs, strict=True))
    best = shard.candidates(logits_BV, count)
    top_tokens, top_logprobs = best.tokens.tolist(), (best.values - total_B.unsqueeze(1)).tolist()
    return tuple(
        TokenLogprobs(token, logprob, tuple(zip(top_tokens[row][:wanted], top_logprobs[row][:wanted], strict=True)))
        for row, (token, logprob, wanted) in enumerate(zip(tokens, logprobs, num_top, strict=True))
    )
