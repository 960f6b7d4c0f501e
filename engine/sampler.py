"""Drawing tokens from logits whose vocabulary is cut over the ranks of a stage.

Every rank draws the same tokens, since all see the same few candidates, or sums: of each row only a rank's best entries
leave it, never its whole shard. No rank waits for a GPU to know how to go on.

Shapes: B rows, V vocabulary rows of this rank, C candidates; T tokens of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from phalanx.comm.communicator import Communicator
from phalanx.engine.logit_rules import LogitRules
from phalanx.engine.logprobs import LogprobRows, token_logprobs
from phalanx.engine.messages import Sampling
from phalanx.engine.nucleus import Scaled, find_nucleus
from phalanx.engine.vocab_shard import Candidates, VocabShard, blocks, lags, on_device
from phalanx.kernels import SamplingRows, gumbel_noise, sample, triton_gpu, widen
from phalanx.parallel.split import Split

FIRST_NUCLEUS = 256  # candidates first asked of each rank for top_p; doubled until their mass suffices

# What a draw needs to know of a slot, so that a step takes the facts of all its rows at once; `position` is the row's.
FACTS = np.dtype(
    [
        ("seed", np.int64),
        ("position", np.int64),
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("logprobs", np.int64),
    ]
)
Facts: TypeAlias = npt.NDArray[np.void]  # of FACTS, one a row


class Draws(NamedTuple):
    """Tokens drawn, one a row. tokens: [B] int64 on the logits' device. rows: those that ask for log-probabilities,
    which are in `logprobs`.
    """

    tokens: torch.Tensor
    rows: tuple[int, ...] = ()
    logprobs: LogprobRows | None = None


class Sampler:
    """Draws the next tokens of the sequences in slots. `vocab` says which tokens each rank of `comm` holds the logits
    of. Every rank makes the same calls and gets the same tokens.
    """

    def __init__(self, vocab: Split, comm: Communicator) -> None:
        self._shard = VocabShard(vocab, comm)
        self._rules = LogitRules(self._shard, comm.device)
        self._facts = np.zeros(0, FACTS)  # by slot

    def admit(self, slot: int, sampling: Sampling) -> None:
        """A sequence takes a slot, with the tokens in its history; what held the slot before is forgotten."""
        if slot >= self._facts.size:
            self._facts = np.concatenate((self._facts, np.zeros(slot + 1, FACTS)))
        self._facts[slot] = (
            sampling.seed,
            0,
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.logprobs,
        )
        self._rules.admit(slot, sampling)

    def likeliest(self, logits_BV: torch.Tensor) -> Draws:
        """What `sample` draws for slots that are all plain; the logits stay as they are."""
        return Draws(self._shard.argmax(logits_BV))

    def likeliest_by_keys(self, keys_B: torch.Tensor) -> Draws:
        """The same, of the keys that `argmax_keys` gives for this rank's tokens."""
        return Draws(self._shard.winner_of_keys(keys_B))

    def sample(
        self,
        logits_BV: torch.Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        masks: Mapping[int, bytes] = {},
    ) -> Draws:
        """Tokens for `positions`, that is after so many others, one a row of this rank's logits.

        The logits may be changed in place where they are float32. masks: by slot, bits of the tokens that may be drawn:
        bit t % 8 of byte t // 8 for token t, and none past the last byte.

        Order: penalties, biases, tokens ruled out, temperature, min_p, top_k, top_p. Ruled out are stop tokens before
        `min_tokens`, unless nothing else is left, and what is not allowed or masked out. Raises ValueError, on every
        rank, where that leaves no token of the vocabulary.
        """
        logits_BV = widen(logits_BV)
        facts = self._facts[np.asarray(slots, np.intp)]
        facts["position"] = positions
        asking = np.flatnonzero(facts["logprobs"] >= 0)
        if asking.size:
            plain_BV = logits_BV[on_device(asking, logits_BV)]  # a copy: the model's own, whatever the rules change
        ruled = bool(masks) or self._rules.concern(slots)
        if ruled:
            self._rules.apply(logits_BV, slots, positions, masks)
        tokens_B = self._draw(logits_BV, facts)
        if ruled:
            self._rules.record(slots, tokens_B)
        if not asking.size:
            return Draws(tokens_B)
        num_top = facts["logprobs"][asking].tolist()
        found = token_logprobs(self._shard, plain_BV, tokens_B[on_device(asking, tokens_B)], num_top)
        return Draws(tokens_B, tuple(asking.tolist()), found)

    def prompt_logprobs(self, logits_TV: torch.Tensor, following: Sequence[int], num_top: int) -> LogprobRows:
        """Of the tokens that follow those of a prompt, one at least, with the `num_top` most likely ones. The model's
        own.

        logits_TV: this rank's shard, a row each of `following`.
        """
        logits_TV = widen(logits_TV)
        tokens_T = on_device(np.array(following, np.int64), logits_TV)
        return token_logprobs(self._shard, logits_TV, tokens_T, [num_top] * len(following))

    def _draw(self, logits_BV: torch.Tensor, facts: Facts) -> torch.Tensor:
        sampled = facts["temperature"] > 0
        if not sampled.any():
            return self._shard.argmax(logits_BV)
        if self._shard.whole and (triton_gpu.applies_on(logits_BV.device) or lags(logits_BV)):
            return sample(logits_BV, _sampling_rows(facts, logits_BV))
        limited, nucleus = sampled & (facts["top_k"] > 0), sampled & (facts["top_k"] == 0) & (facts["top_p"] < 1)
        tokens_B = torch.empty(facts.size, dtype=torch.int64, device=logits_BV.device)
        for rows, draw in (
            (~sampled, self._greedy),
            (sampled & ~limited & ~nucleus, self._from_all),
            (limited, self._from_best),
            (nucleus, self._from_nucleus),
        ):
            if rows.all():
                return draw(logits_BV, facts)
            if rows.any():
                index = on_device(np.flatnonzero(rows), logits_BV)
                tokens_B[index] = draw(logits_BV[index], facts[rows])
        return tokens_B

    def _greedy(self, logits_BV: torch.Tensor, _: Facts) -> torch.Tensor:
        return self._shard.argmax(logits_BV)

    def _from_all(self, logits_BV: torch.Tensor, facts: Facts) -> torch.Tensor:
        """Draws from the whole distribution, or what min_p leaves of it."""
        temperature_B1 = _column(facts["temperature"], logits_BV)
        floor_B1 = _floor(self._top(logits_BV) / temperature_B1, facts) if facts["min_p"].any() else None
        return self._likeliest(logits_BV, facts, lambda block: _scaled(logits_BV, temperature_B1, floor_B1, block))

    def _likeliest(self, logits_BV: torch.Tensor, facts: Facts, scaled: Scaled) -> torch.Tensor:
        """Draws from what `scaled` leaves of the rows: the largest of scaled logit + Gumbel noise."""
        tokens_V = torch.arange(self._shard.rows.start, self._shard.rows.stop, device=logits_BV.device)
        best = []
        for block in blocks(facts.size, logits_BV):
            best.append(scaled(block).add_(_noise(facts[block], tokens_V)).max(1))
        value_B = torch.cat([value_B for value_B, _ in best])
        return self._shard.winner(value_B, torch.cat([column_B for _, column_B in best]))

    def _from_best(self, logits_BV: torch.Tensor, facts: Facts) -> torch.Tensor:
        """Draws where top_k leaves only the best candidates; top_p counts in their mass."""
        best = self._shard.candidates(logits_BV, int(facts["top_k"].max()))
        temperature_B1 = _column(facts["temperature"], logits_BV)
        values_BC = _scaled(best.values, temperature_B1, _floor(best.values[:, :1] / temperature_B1, facts))
        order_C = torch.arange(values_BC.shape[1], device=logits_BV.device)
        values_BC = values_BC.masked_fill(order_C >= _column(facts["top_k"], logits_BV), -math.inf)
        return _from_candidates(best, values_BC, values_BC.logsumexp(1, keepdim=True), facts)

    def _from_nucleus(self, logits_BV: torch.Tensor, facts: Facts) -> torch.Tensor:
        """Draws where top_p alone cuts: from as many of the best candidates as hold its mass where asking whether they
        do costs nothing, which is the faster way, else from all that it leaves.
        """
        best = None if lags(logits_BV) else self._shard.candidates(logits_BV, FIRST_NUCLEUS)
        temperature_B1, top_p_B1 = _column(facts["temperature"], logits_BV), _column(facts["top_p"], logits_BV)
        top_B1 = (self._top(logits_BV) if best is None else best.values[:, :1]) / temperature_B1
        floor_B1 = _floor(top_B1, facts)

        def left(block: slice) -> torch.Tensor:
            return _scaled(logits_BV, temperature_B1, floor_B1, block)

        if best is None:
            nucleus = find_nucleus(self._shard, logits_BV, left, top_B1, top_p_B1)
            return self._likeliest(
                logits_BV, facts, lambda block: left(block).masked_fill_(~nucleus.holds(logits_BV, block), -math.inf)
            )
        totals = [left(block).logsumexp(1) for block in blocks(facts.size, logits_BV)]
        total_B1 = self._shard.logsumexp(torch.cat(totals)).unsqueeze(1)
        values_BC, count = _scaled(best.values, temperature_B1, floor_B1), FIRST_NUCLEUS
        while ((values_BC - total_B1).exp().sum(1, keepdim=True) < top_p_B1).any() and count < self._shard.vocab_size:
            count *= 2
            best = self._shard.candidates(logits_BV, count)
            values_BC = _scaled(best.values, temperature_B1, floor_B1)
        return _from_candidates(best, values_BC, total_B1, facts)

    def _top(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The largest logit of each row over all ranks, [B, 1] float64."""
        return self._shard.max(logits_BV.amax(1).double()).unsqueeze(1)


def _from_candidates(best: Candidates, values_BC: torch.Tensor, mass_B1: torch.Tensor, facts: Facts) -> torch.Tensor:
    """Draws from what top_p leaves of the candidates. mass_B1: the logarithm of what it counts in."""
    before_BC = (values_BC - mass_B1).exp().cumsum(1).roll(1, dims=1)
    before_BC[:, 0] = 0  # the most likely candidate is always kept
    values_BC = values_BC.masked_fill(before_BC >= _column(facts["top_p"], values_BC), -math.inf)
    choice_B1 = (values_BC + _noise(facts, best.tokens)).argmax(1, keepdim=True)
    return best.tokens.gather(1, choice_B1).squeeze(1)


def _sampling_rows(facts: Facts, like: torch.Tensor) -> SamplingRows:
    """What the facts say, brought over in one piece."""
    columns = dict(
        zip(FACTS.fields or (), on_device(facts.view(np.int64).reshape(facts.size, -1).T, like), strict=True)
    )
    floats = {name: columns[name].view(torch.float64) for name in ("temperature", "top_p", "min_p")}
    return SamplingRows(**floats, **{name: columns[name] for name in ("top_k", "seed", "position")})


def _scaled(
    values_BV: torch.Tensor, temperature_B1: torch.Tensor, floor_B1: torch.Tensor | None, block: slice = slice(None)
) -> torch.Tensor:
    """A block of rows over their temperatures, float64, with what lies below the floor at minus infinity."""
    scaled_BV = values_BV[block].double() / temperature_B1[block]
    return scaled_BV if floor_B1 is None else scaled_BV.masked_fill_(scaled_BV < floor_B1[block], -math.inf)


def _floor(top_B1: torch.Tensor, facts: Facts) -> torch.Tensor | None:
    """The least that min_p keeps, where the scaled logit of the most likely token is `top`; None where all is kept."""
    return top_B1 + _column(facts["min_p"], top_B1).log() if facts["min_p"].any() else None


def _noise(facts: Facts, tokens: torch.Tensor) -> torch.Tensor:
    return gumbel_noise(_column(facts["seed"], tokens), _column(facts["position"], tokens), tokens)


def _column(values: npt.NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return on_device(values, like).unsqueeze(1)
