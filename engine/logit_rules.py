"""What a request wants changed in the logits before a token is drawn: penalties, biases, and tokens ruled out.

Shapes: B rows, V vocabulary rows of this rank, E entries of the logits, M rows under a mask, N
bytes of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from phalanx.engine.guide import mask_of
from phalanx.engine.messages import Sampling
from phalanx.engine.penalties import Penalties
from phalanx.engine.vocab_shard import VocabShard, blocks, on_device

Bits = npt.NDArray[np.uint8]  # a mask of the whole vocabulary, laid out as `Guide.allowed` says


@dataclass(frozen=True, slots=True)
class Rule:
    """What is fixed for the sequence of a slot.

    bias_columns, biases: columns of this rank, int64, and what is added to them, float32. allowed: bits of the only
    tokens that may be drawn, None for all. stops: tokens that may not be drawn for positions before `stops_from`.
    """

    bias_columns: npt.NDArray[np.int64]
    biases: npt.NDArray[np.float32]
    allowed: Bits | None = None
    stops: tuple[int, ...] = ()
    stops_from: int = 0


NO_RULE = Rule(np.zeros(0, np.int64), np.zeros(0, np.float32))


class LogitRules:
    """The rules of each slot, on this rank's vocabulary rows. Slots without any cost nothing."""

    def __init__(self, shard: VocabShard, device: torch.device) -> None:
        self._rows = shard.rows
        self._vocab_size = shard.vocab_size
        self._every = np.packbits(np.ones(shard.vocab_size, np.uint8), bitorder="little")
        self._rules: dict[int, Rule] = {}
        self._penalties = Penalties(shard, device)

    def admit(self, slot: int, sampling: Sampling) -> None:
        """A sequence takes a slot; what held it before is forgotten."""
        self._penalties.admit(slot, sampling)
        stops = tuple(set(sampling.stop_tokens))
        held = [(token, bias) for token, bias in sampling.logit_bias if self._holds(token)]
        rule = Rule(
            bias_columns=np.array([token - self._rows.start for token, _ in held], np.int64),
            biases=np.array([bias for _, bias in held], np.float32),
            allowed=None if sampling.allowed is None else self._bits(sampling.allowed),
            stops=stops,
            # Where every token is a stop token, one of them has to be drawn.
            stops_from=sampling.num_prompt + sampling.min_tokens if 0 < len(stops) < self._vocab_size else 0,
        )
        self._rules.pop(slot, None)
        if held or rule.allowed is not None or rule.stops_from:
            self._rules[slot] = rule

    def concern(self, slots: Sequence[int]) -> bool:
        """Whether any of these slots has a rule."""
        return not self._rules.keys().isdisjoint(slots) or self._penalties.concern(slots)

    def apply(
        self, logits_BV: torch.Tensor, slots: Sequence[int], positions: Sequence[int], masks: Mapping[int, bytes]
    ) -> None:
        """Changes the logits, in place. Arguments as for `Sampler.sample`, which says what is raised."""
        self._penalties.apply(logits_BV, slots)
        biased: list[tuple[int, Rule]] = []
        stopped: list[tuple[int, int]] = []
        masked: list[tuple[int, Bits]] = []
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            rule = self._rules.get(slot, NO_RULE)
            if rule.biases.size:
                biased.append((row, rule))
            if slot in masks or rule.allowed is not None:
                masked.append((row, self._permitted(slot, position, rule, masks.get(slot))))
            elif position < rule.stops_from:
                stopped.extend((row, token - self._rows.start) for token in rule.stops if self._holds(token))
        if biased:
            rows_E = np.concatenate([np.full(rule.biases.size, row) for row, rule in biased])
            columns_E = np.concatenate([rule.bias_columns for _, rule in biased])
            biases_E = np.concatenate([rule.biases for _, rule in biased])
            index = (on_device(rows_E, logits_BV), on_device(columns_E, logits_BV))
            logits_BV.index_put_(index, on_device(biases_E, logits_BV), accumulate=True)
        if stopped:
            rows_E, columns_E = np.array(stopped).T
            logits_BV[on_device(rows_E, logits_BV), on_device(columns_E, logits_BV)] = -math.inf
        if masked:
            self._mask(logits_BV, [row for row, _ in masked], np.stack([bits for _, bits in masked]))

    def record(self, slots: Sequence[int], tokens_B: torch.Tensor) -> None:
        """A token was drawn for each of these slots."""
        self._penalties.record(slots, tokens_B)

    def _permitted(self, slot: int, position: int, rule: Rule, mask: bytes | None) -> Bits:
        """The tokens that may be drawn. Every rank sees all of them, so that all come to the same end."""
        bits = self._every if rule.allowed is None else rule.allowed
        if mask is not None:
            part = np.frombuffer(mask, np.uint8)[: self._every.size]
            bits = np.concatenate((bits[: part.size] & part, np.zeros(self._every.size - part.size, np.uint8)))
        if not bits.any():
            raise ValueError(
                f"slot {slot}: none of the {self._vocab_size} tokens may be drawn for position {position}; a mask must "
                "leave one"
            )
        if position < rule.stops_from:
            longer = bits & ~self._bits(rule.stops)
            return longer if longer.any() else bits
        return bits

    def _mask(self, logits_BV: torch.Tensor, rows: Sequence[int], bits_MN: Bits) -> None:
        """Minus infinity wherever a row's bit is not set."""
        first, last = self._rows.start // 8, -(-self._rows.stop // 8)
        own = slice(self._rows.start - 8 * first, self._rows.stop - 8 * first)
        own_MN = on_device(bits_MN[:, first:last], logits_BV)
        weight_8 = on_device(1 << np.arange(8, dtype=np.uint8), logits_BV)
        rows_M = on_device(np.array(rows), logits_BV)
        for block in blocks(len(rows), logits_BV):
            refused_MV = ((own_MN[block].unsqueeze(2) & weight_8) == 0).flatten(1)[:, own]
            logits_BV[rows_M[block]] = logits_BV[rows_M[block]].masked_fill(refused_MV, -math.inf)

    def _bits(self, tokens: Sequence[int]) -> Bits:
        return np.frombuffer(mask_of(tokens, self._vocab_size), np.uint8)

    def _holds(self, token: int) -> bool:
        return self._rows.start <= token < self._rows.stop
