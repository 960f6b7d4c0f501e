"""The decoder-only transformer, written once; families differ by the rows of `models/families.py`.

Shapes: T tokens of a step, H hidden size, N query heads and K KV heads of this rank, D head dimension, F feed-forward
columns of this rank, V vocabulary rows of this rank, B rows whose next token is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import (
    group_heads,
    paged_attention,
    rms_norm,
    rope_and_write_kv,
    rope_frequencies,
    rope_table,
    silu_mul,
)
from phalanx.models.batch import Batch, KVCache, Part
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from phalanx.parallel.layout import Stage
from phalanx.parallel.overlap import Overlap, StageWork
from phalanx.parallel.stream import PendingStream, ResidualStream

Weights = Mapping[str, Any]  # by name: `kernels.Weight` where it is multiplied by, a tensor elsewhere
RopeTable = tuple[torch.Tensor, torch.Tensor]


class Share(NamedTuple):
    """What a rank builds its layers from. comm: the tensor-parallel group of the stage."""

    config: DecoderConfig
    stage: Stage
    tensor_rank: int
    comm: Communicator
    weights: Weights


class Attention:
    """Grouped-query attention over this rank's heads."""

    def __init__(self, share: Share, name: str) -> None:
        config, stage, weights = share.config, share.stage, share.weights
        shape = config.shape
        queries, keys = stage.query_heads[share.tensor_rank], stage.kv_heads[share.tensor_rank]
        self.scale = shape.head_dim**-0.5
        self.norm_eps = config.norm_eps
        self.qkv = ColumnParallelLinear(weights[f"{name}.qkv"], weights.get(f"{name}.qkv_bias"))
        self.q_norm = weights.get(f"{name}.q_norm")
        self.k_norm = weights.get(f"{name}.k_norm")
        self.o = RowParallelLinear(weights[f"{name}.o"], share.comm, weights.get(f"{name}.o_bias"))
        self.heads = group_heads(
            [head // shape.queries_per_kv_head - keys.start for head in range(queries.start, queries.stop)],
            keys.size,
            self.qkv.weight.device,
        )

    def __call__(
        self, x_TH: torch.Tensor, table: RopeTable, part: Part, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """What goes into the row-parallel product `o`, [T, N * D]."""
        q_TND = rope_and_write_kv(
            self.qkv(x_TH),
            table,
            keys,
            values,
            part.slots,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.norm_eps,
        )
        out_TND = paged_attention(q_TND, keys, values, part.attention, self.heads, scale=self.scale)
        return out_TND.flatten(1)


class FeedForward:
    """SwiGLU feed-forward over this rank's columns."""

    def __init__(self, share: Share, name: str) -> None:
        weights = share.weights
        self.gate_up = ColumnParallelLinear(weights[f"{name}.gate_up"], weights.get(f"{name}.gate_up_bias"))
        self.down = RowParallelLinear(weights[f"{name}.down"], share.comm, weights.get(f"{name}.down_bias"))

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What goes into the row-parallel product `down`, [T, F]."""
        return silu_mul(self.gate_up(x_TH))


class Layer:
    """Attention and feed-forward, each behind its norm. Both give what goes into a row-parallel product, whose sum over
    the ranks is added to the residual stream.
    """

    def __init__(self, share: Share, name: str) -> None:
        self.attention_norm = share.weights[f"{name}.attention_norm"]
        self.attention = Attention(share, name)
        self.ffn_norm = share.weights[f"{name}.ffn_norm"]
        self.ffn = FeedForward(share, name)


class Decoder:
    """One rank's share of the model: the layers of its stage, cut by the stage's splits.

    weights: by the names of `models/weights.py`. comm: the tensor-parallel group of the stage. overlap: decides how the
    sums over the ranks are done; None for one after the other.
    """

    def __init__(
        self,
        config: DecoderConfig,
        stage: Stage,
        tensor_rank: int,
        comm: Communicator,
        weights: Weights,
        overlap: Overlap | None = None,
    ) -> None:
        self.norm_eps = config.norm_eps
        self._comm = comm
        self._first_layer = stage.layers.start
        self._overlap = overlap if overlap is not None and comm.size > 1 else Overlap("none")
        self.embed = None
        if stage.first:
            self.embed = VocabParallelEmbedding(weights["embed"], stage.vocab[tensor_rank], comm)
        share = Share(config, stage, tensor_rank, comm, weights)
        self.layers = [Layer(share, f"layers.{layer}") for layer in range(stage.layers.start, stage.layers.stop)]
        self._next_norms = [*(layer.attention_norm for layer in self.layers[1:]), None]
        self.head = None
        if stage.last:
            self.norm = weights["norm"]
            self.head = ColumnParallelLinear(weights["head"] if "head" in weights else weights["embed"])
        attention = self.layers[0].attention.qkv.weight
        self.frequencies = _rope_frequencies(config.shape.head_dim, config.rope).to(attention.device)

    def num_parts(self, num_tokens: int) -> int:
        """Of the batch of a step of so many tokens; the same on all ranks of the stage."""
        return self._overlap.num_parts(num_tokens)

    def __call__(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states [T, H] after this stage's layers; x is token ids [T] on the first stage, hidden states
        elsewhere. Several parts of a batch pass each block in turns, so that the sums of one travel behind the other.
        """
        streams = self._streams(x, batch)
        dtype = self.layers[0].attention_norm.dtype
        tables = [rope_table(part.positions, self.frequencies, dtype) for part in batch.parts]
        layers = zip(self.layers, cache.keys, cache.values, self._next_norms, strict=True)
        for number, (layer, keys, values, next_norm) in enumerate(layers, start=self._first_layer):
            self._comm.ledger.layer = number
            attention, ffn = layer.attention, layer.ffn
            for stream, part, table in zip(streams, batch.parts, tables, strict=True):
                attended_TI = attention(stream.normed(), table, part, keys, values)
                stream.add(attention.o, attended_TI, layer.ffn_norm)
            for stream in streams:
                stream.add(ffn.down, ffn(stream.normed()), next_norm)
        self._comm.ledger.layer = -1
        done = [stream.whole() for stream in streams]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _streams(self, x: torch.Tensor, batch: Batch) -> list[ResidualStream]:
        embed, norm, eps = self.embed, self.layers[0].attention_norm, self.norm_eps
        if len(batch.parts) == 1:
            return [self._overlap.stream(x if embed is None else embed(x), norm, eps, self._comm)]
        parts = torch.split(x, [len(part.positions) for part in batch.parts])
        return [PendingStream(part if embed is None else embed.start(part), norm, eps) for part in parts]

    def work(self) -> StageWork:
        """What the layers of this stage take; by the first of them, since all are alike."""
        attention, ffn = self.layers[0].attention, self.layers[0].ffn
        hidden, attention_inputs = attention.o.weight.shape
        return StageWork(
            num_layers=len(self.layers),
            attention=math.prod(attention.qkv.weight.shape) + hidden * attention_inputs,
            ffn=math.prod(ffn.gate_up.weight.shape) + math.prod(ffn.down.weight.shape),
            hidden=hidden,
            attention_inputs=attention_inputs,
            ffn_inputs=ffn.down.weight.shape[1],
            itemsize=attention.o.weight.itemsize,
        )

    def logits(self, x_TH: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
        """This rank's vocabulary shard of the logits, [B, V] float32, at `rows_B`. On the last stage only."""
        if self.head is None:
            raise RuntimeError("only the last stage has a head")
        return self.head(rms_norm(x_TH[rows_B], self.norm, self.norm_eps)).float()


def _rope_frequencies(head_dim: int, config: RopeConfig) -> torch.Tensor:
    if config.scaling == "llama3":
        return rope_frequencies(
            head_dim,
            config.theta,
            factor=config.factor,
            low_freq_factor=config.low_freq_factor,
            high_freq_factor=config.high_freq_factor,
            original_max_position=config.original_max_position,
        )
    return rope_frequencies(head_dim, config.theta, factor=config.factor)
