"""The decoder-only transformer, written once; families differ by the rows of `models/families.py`.

Shapes: T tokens of a step, H hidden size, N query heads and K KV heads of this rank, D head dimension, F feed-forward
columns of this rank, V vocabulary rows of this rank, B rows whose next token is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from phalanx.models.batch import Batch, KVCache
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from phalanx.parallel.layout import Stage
from phalanx.parallel.overlap import Overlap

Weights = Mapping[str, Any]  # by name: `kernels.Weight` where it is multiplied by, a tensor elsewhere
RopeTable = tuple[torch.Tensor, torch.Tensor]


class Attention:
    """Grouped-query attention over this rank's heads."""

    def __init__(
        self,
        config: DecoderConfig,
        stage: Stage,
        tensor_rank: int,
        comm: Communicator,
        weights: Weights,
        name: str,
        overlap: Overlap | None,
    ) -> None:
        shape = config.shape
        queries, keys = stage.query_heads[tensor_rank], stage.kv_heads[tensor_rank]
        self.scale = shape.head_dim**-0.5
        self.norm_eps = config.norm_eps
        self.qkv = ColumnParallelLinear(weights[f"{name}.qkv"], weights.get(f"{name}.qkv_bias"))
        self.q_norm = weights.get(f"{name}.q_norm")
        self.k_norm = weights.get(f"{name}.k_norm")
        self.o = RowParallelLinear(weights[f"{name}.o"], comm, weights.get(f"{name}.o_bias"), overlap)
        self.heads = group_heads(
            [head // shape.queries_per_kv_head - keys.start for head in range(queries.start, queries.stop)],
            keys.size,
            self.qkv.weight.device,
        )

    def __call__(
        self, x_TH: torch.Tensor, table: RopeTable, batch: Batch, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """What goes into the row-parallel product `o`, [T, N * D]."""
        q_TND = rope_and_write_kv(
            self.qkv(x_TH),
            table,
            keys,
            values,
            batch.slots,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.norm_eps,
        )
        out_TND = paged_attention(q_TND, keys, values, batch.attention, self.heads, scale=self.scale)
        return out_TND.flatten(1)


class FeedForward:
    """SwiGLU feed-forward over this rank's columns."""

    def __init__(self, comm: Communicator, weights: Weights, name: str, overlap: Overlap | None) -> None:
        self.gate_up = ColumnParallelLinear(weights[f"{name}.gate_up"], weights.get(f"{name}.gate_up_bias"))
        self.down = RowParallelLinear(weights[f"{name}.down"], comm, weights.get(f"{name}.down_bias"), overlap)

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What goes into the row-parallel product `down`, [T, F]."""
        return silu_mul(self.gate_up(x_TH))


class Layer:
    """Attention and feed-forward, each behind its norm and added to the residual stream.

    A layer gets the stream and its norm, and gives both on: the sum over the ranks, the addition and the next norm are
    one operation of the communicator.
    """

    def __init__(
        self,
        config: DecoderConfig,
        stage: Stage,
        tensor_rank: int,
        comm: Communicator,
        weights: Weights,
        name: str,
        overlap: Overlap | None,
    ) -> None:
        self.norm_eps = config.norm_eps
        self.attention_norm = weights[f"{name}.attention_norm"]
        self.attention = Attention(config, stage, tensor_rank, comm, weights, name, overlap)
        self.ffn_norm = weights[f"{name}.ffn_norm"]
        self.ffn = FeedForward(comm, weights, name, overlap)

    def __call__(
        self,
        normed_TH: torch.Tensor,
        x_TH: torch.Tensor,
        table: RopeTable,
        batch: Batch,
        keys: torch.Tensor,
        values: torch.Tensor,
        next_norm: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """normed_TH: the stream x_TH behind `attention_norm`. next_norm: of the layer that follows, None for the last
        one, after which only the stream is meant.
        """
        attended_TI = self.attention(normed_TH, table, batch, keys, values)
        normed_TH, x_TH = self.attention.o.add_and_norm(attended_TI, x_TH, self.ffn_norm, self.norm_eps)
        hidden_TF = self.ffn(normed_TH)
        if next_norm is None:
            x_TH = x_TH + self.ffn.down(hidden_TF)
            return x_TH, x_TH
        return self.ffn.down.add_and_norm(hidden_TF, x_TH, next_norm, self.norm_eps)


class Decoder:
    """One rank's share of the model: the layers of its stage, cut by the stage's splits.

    weights: by the names of `models/weights.py`. comm: the tensor-parallel group of the stage. overlap: of its
    row-parallel products, None for none.
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
        self._ledger = comm.ledger
        self._first_layer = stage.layers.start
        self.embed = None
        if stage.first:
            self.embed = VocabParallelEmbedding(weights["embed"], stage.vocab[tensor_rank], comm)
        layers = range(stage.layers.start, stage.layers.stop)
        self.layers = [Layer(config, stage, tensor_rank, comm, weights, f"layers.{layer}", overlap) for layer in layers]
        self._next_norms = [*(layer.attention_norm for layer in self.layers[1:]), None]
        self.head = None
        if stage.last:
            self.norm = weights["norm"]
            self.head = ColumnParallelLinear(weights["head"] if "head" in weights else weights["embed"])
        attention = self.layers[0].attention.qkv.weight
        self.frequencies = _rope_frequencies(config.shape.head_dim, config.rope).to(attention.device)

    def __call__(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states [T, H] after this stage's layers; x is token ids [T] on the first stage, hidden states
        elsewhere.
        """
        x_TH = x if self.embed is None else self.embed(x)
        table = rope_table(batch.positions, self.frequencies, x_TH.dtype)
        normed_TH = rms_norm(x_TH, self.layers[0].attention_norm, self.norm_eps)
        parts = zip(self.layers, cache.keys, cache.values, self._next_norms, strict=True)
        for number, (layer, keys, values, next_norm) in enumerate(parts, start=self._first_layer):
            self._ledger.layer = number
            normed_TH, x_TH = layer(normed_TH, x_TH, table, batch, keys, values, next_norm)
        self._ledger.layer = -1
        return x_TH

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
