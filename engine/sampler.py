"""Drawing tokens from logits whose vocabulary is cut over the ranks of a stage.

Every rank draws the same tokens, since all see the same few candidates: of each row only a rank's best entries leave
it, never its whole shard, except where top_p asks for a set that wide.

Shapes: B rows, V vocabulary rows of this rank, R ranks, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator, ReduceOp
from phalanx.engine.messages import NewSequence, SampledToken
from phalanx.kernels import gumbel_noise
from phalanx.parallel.split import Split

FIRST_NUCLEUS = 256  # candidates first asked of each rank for top_p; doubled until their mass suffices


class Candidates(NamedTuple):
    """Entries of the distribution, over all ranks, best first. values: [B, C] float64. tokens: [B, C] int64."""

    values: torch.Tensor
    tokens: torch.Tensor


class Sampler:
    """Draws the next token of each row. `vocab` says which tokens each rank of `comm` holds the logits of."""

    def __init__(self, vocab: Split, comm: Communicator) -> None:
        self._vocab = vocab
        self._rows = vocab[comm.rank]
        self._comm = comm

    def sample(
        self, logits_BV: torch.Tensor, requests: Sequence[NewSequence], positions: Sequence[int]
    ) -> list[SampledToken]:
        """Tokens for `positions`, one a row of this rank's logits [B, V] float32. Called by all ranks of the stage
        alike.
        """
        tokens = [0] * len(requests)
        for draw, rows in (
            (self._greedy, [row for row, request in enumerate(requests) if request.temperature == 0]),
            (
                self._from_all,
                [row for row, request in enumerate(requests) if request.temperature and not _cut(request)],
            ),
            (self._from_best, [row for row, request in enumerate(requests) if request.temperature and _cut(request)]),
        ):
            if rows:
                part = logits_BV if len(rows) == len(requests) else logits_BV[rows]
                drawn = draw(part, [requests[row] for row in rows], [positions[row] for row in rows])
                for row, token in zip(rows, drawn.tolist(), strict=True):
                    tokens[row] = token
        logprobs = self._logprobs(logits_BV, requests, tokens)
        return [
            SampledToken(request.sequence, token, *logprobs.get(row, (None, ())))
            for row, (request, token) in enumerate(zip(requests, tokens, strict=True))
        ]

    def _greedy(self, logits_BV: torch.Tensor, _: Sequence[NewSequence], __: Sequence[int]) -> torch.Tensor:
        return self._best(logits_BV)

    def _from_all(
        self, logits_BV: torch.Tensor, requests: Sequence[NewSequence], positions: Sequence[int]
    ) -> torch.Tensor:
        """Draws from the whole distribution, or what min_p leaves of it: the largest of scaled logit + Gumbel noise."""
        scaled_BV = self._scaled(logits_BV, requests)
        tokens_V = torch.arange(self._rows.start, self._rows.stop, device=logits_BV.device)
        return self._best(scaled_BV + self._noise(requests, positions, tokens_V))

    def _from_best(
        self, logits_BV: torch.Tensor, requests: Sequence[NewSequence], positions: Sequence[int]
    ) -> torch.Tensor:
        """Draws where top_k or top_p leave only the best candidates."""
        scaled_BV = self._scaled(logits_BV, requests)
        best = self._nucleus(scaled_BV, requests)
        order_BC = torch.arange(best.values.shape[1], device=logits_BV.device)
        top_k_B1 = self._column([request.top_k or best.values.shape[1] for request in requests], best.tokens)
        values_BC = best.values.masked_fill(order_BC >= top_k_B1, -math.inf)
        # The mass that top_p counts in: of the k best where top_k cuts, else of all that is left.
        total_B1 = torch.where(
            self._column([request.top_k > 0 for request in requests], best.tokens) > 0,
            values_BC.logsumexp(1, keepdim=True),
            self._logsumexp(scaled_BV),
        )
        before_BC = (values_BC - total_B1).exp().cumsum(1).roll(1, dims=1)
        before_BC[:, 0] = 0  # the most likely candidate is always kept
        values_BC = values_BC.masked_fill(before_BC >= self._column([r.top_p for r in requests], values_BC), -math.inf)
        choice_B = (values_BC + self._noise(requests, positions, best.tokens)).argmax(1)
        return best.tokens.gather(1, choice_B.unsqueeze(1)).squeeze(1)

    def _nucleus(self, scaled_BV: torch.Tensor, requests: Sequence[NewSequence]) -> Candidates:
        """At least as many of the best candidates as any row's top_k and top_p can keep."""
        count = max(request.top_k for request in requests)
        open_rows = [row for row, request in enumerate(requests) if not request.top_k]
        if not open_rows:
            return self._candidates(scaled_BV, count)
        total_B1 = self._logsumexp(scaled_BV)
        count = max(count, FIRST_NUCLEUS)
        while True:
            best = self._candidates(scaled_BV, count)
            mass_B = (best.values - total_B1).exp().sum(1)
            wanted = all(mass_B[row] >= requests[row].top_p for row in open_rows)
            if wanted or best.values.shape[1] == self._vocab.size:
                return best
            count *= 2

    def _candidates(self, values_BV: torch.Tensor, count: int) -> Candidates:
        """The best `count` entries over all ranks, or all there are; equal values in order of their tokens."""
        own = min(count, values_BV.shape[1])
        values_BC, index_BC = _top(values_BV, own)
        tokens_BC = index_BC + self._rows.start
        sizes = [min(count, part) for part in self._vocab.sizes]
        values_BC = self._gather(values_BC, sizes)
        tokens_BC = self._gather(tokens_BC, sizes)
        values_BC, index_BC = _top(values_BC, min(count, self._vocab.size))
        return Candidates(values_BC, tokens_BC.gather(1, index_BC))

    def _best(self, values_BV: torch.Tensor) -> torch.Tensor:
        """The token with the largest value over all ranks, [B]; the first of equals."""
        index_B = values_BV.argmax(1)
        if self._comm.size == 1:
            return index_B
        best_B = values_BV.gather(1, index_B.unsqueeze(1)).squeeze(1).double()
        # Token ids are exact in float64, so that one transfer carries both.
        own_2B = torch.stack((best_B, (index_B + self._rows.start).double()))
        all_R2B = self._comm.all_gather(own_2B).view(self._comm.size, 2, -1)
        winner_B = all_R2B[:, 0].argmax(0, keepdim=True)
        return all_R2B[:, 1].gather(0, winner_B).squeeze(0).long()

    def _scaled(self, logits_BV: torch.Tensor, requests: Sequence[NewSequence]) -> torch.Tensor:
        """Logits over temperature, float64, with what min_p cuts at minus infinity."""
        scaled_BV = logits_BV.double()
        scaled_BV = scaled_BV / self._column([request.temperature for request in requests], scaled_BV)
        if any(request.min_p for request in requests):
            top_B1 = self._reduced(scaled_BV.max(1, keepdim=True).values, "max")
            floor = [math.log(request.min_p) if request.min_p else -math.inf for request in requests]
            scaled_BV = scaled_BV.masked_fill(scaled_BV < top_B1 + self._column(floor, scaled_BV), -math.inf)
        return scaled_BV

    def _logsumexp(self, values_BV: torch.Tensor) -> torch.Tensor:
        """Over the whole vocabulary, [B, 1] float64."""
        own_B1 = values_BV.double().logsumexp(1, keepdim=True)
        if self._comm.size == 1:
            return own_B1
        return self._comm.all_gather(own_B1.unsqueeze(0)).logsumexp(0)

    def _logprobs(
        self, logits_BV: torch.Tensor, requests: Sequence[NewSequence], tokens: Sequence[int]
    ) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """Log-probability of the drawn token and of the most likely ones, for the rows that ask."""
        rows = [row for row, request in enumerate(requests) if request.logprobs >= 0]
        if not rows:
            return {}
        values_BV = logits_BV[rows].double()
        total_B1 = self._logsumexp(values_BV)
        drawn_B1 = self._column(
            [tokens[row] for row in rows], torch.empty(0, dtype=torch.int64, device=logits_BV.device)
        )
        local_B1 = drawn_B1 - self._rows.start
        held_B1 = (local_B1 >= 0) & (local_B1 < self._rows.size)
        chosen_B1 = values_BV.gather(1, local_B1.masked_fill(~held_B1, 0)).masked_fill(~held_B1, -math.inf)
        chosen = (self._reduced(chosen_B1, "max") - total_B1).squeeze(1).tolist()
        best = self._candidates(values_BV, max(1, *(requests[row].logprobs for row in rows)))
        top_values, top_tokens = (best.values - total_B1).tolist(), best.tokens.tolist()
        found = {}
        for index, row in enumerate(rows):
            wanted = requests[row].logprobs
            top = tuple(zip(top_tokens[index][:wanted], top_values[index][:wanted], strict=True))
            found[row] = (chosen[index], top)
        return found

    def _gather(self, part_BC: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Columns of all ranks side by side: [B, sum of sizes]."""
        if self._comm.size == 1:
            return part_BC
        return self._comm.all_gather(part_BC.T.contiguous(), sizes=sizes).T

    def _reduced(self, values: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        return values if self._comm.size == 1 else self._comm.all_reduce(values.contiguous(), op=op)

    def _noise(self, requests: Sequence[NewSequence], positions: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        seeds_B1 = self._column([request.seed for request in requests], tokens)
        return gumbel_noise(seeds_B1, self._column(list(positions), tokens), tokens)

    @staticmethod
    def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _cut(request: NewSequence) -> bool:
    return request.top_k > 0 or request.top_p < 1


def _top(values_BC: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and columns of the best `count` of each row, best first, equal ones in order of their columns.

    `topk` leaves the choice among equals open, and bfloat16 logits are often equal: so it only finds the least value
    that belongs, and the columns at least that large are then taken in order.
    """
    least_B1 = values_BC.topk(count, dim=1).values[:, -1:]
    belongs_BC = values_BC >= least_B1
    order_C = torch.arange(0, -values_BC.shape[1], -1, device=values_BC.device)
    first_BC = torch.where(belongs_BC, order_C, -values_BC.shape[1])
    column_BC = first_BC.topk(int(belongs_BC.sum(1).max()), dim=1).indices
    values_BC, rank_BC = values_BC.gather(1, column_BC).sort(dim=1, descending=True, stable=True)
    return values_BC[:, :count], column_BC.gather(1, rank_BC)[:, :count]
