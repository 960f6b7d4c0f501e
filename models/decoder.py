"""The decoder-only transformer, written once; families differ by the rows of `models/families.py`.

Shapes: T tokens of a step, H hidden size, N query heads and K KV heads of this rank, D head dimension, F feed-forward
columns of this rank, V vocabulary rows of this rank, B rows whose next token is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import (
    Activations,
    Arena,
    Experts,
    Graphs,
    Norm,
    Recording,
    Weight,
    expert_ffn,
    gated_linear,
    group_heads,
    is_native,
    linear,
    plain_norm,
    rms_norm,
    rope_and_attend,
    rope_frequencies,
    rope_table,
    route,
    silu_gated,
    taken_by,
)
from phalanx.kernels.names import profiled
from phalanx.models.batch import Batch, KVCache, LayerPages, Part
from phalanx.models.captured import CapturedSteps
from phalanx.models.config import DecoderConfig
from phalanx.models.recorded import Passed, RecordedSteps
from phalanx.parallel.layers import ColumnParallelLinear, RowParallelLinear, RowParallelSum, VocabParallelEmbedding
from phalanx.parallel.layout import Stage
from phalanx.parallel.overlap import Overlap, StageWork
from phalanx.parallel.shared_head import HeadAsker
from phalanx.parallel.stream import PendingStream, RecordedStream, ResidualStream, WholeStream

RopeTable = tuple[torch.Tensor, torch.Tensor]
Weights = Mapping[str, Any]  # by name: `kernels.Weight` where it is multiplied by, a tensor elsewhere


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
        self.o = RowParallelLinear(share.comm, weights.get(f"{name}.o_bias"), weight=weights[f"{name}.o"])
        self.heads = group_heads(
            [head // shape.queries_per_kv_head - keys.start for head in range(queries.start, queries.stop)],
            keys.size,
            self.qkv.weight.device,
        )

    def __call__(self, x_TH: Activations, table: RopeTable, part: Part, pages: LayerPages) -> torch.Tensor:
        """What goes into the row-parallel product `o`, [T, N * D]."""
        out_TND = rope_and_attend(
            self.qkv(x_TH),
            table,
            pages.keys,
            pages.values,
            part.slots,
            part.attention,
            self.heads,
            scale=self.scale,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.norm_eps,
            kv_scales=pages.scales,
        )
        return out_TND.flatten(1)


class FeedForward:
    """SwiGLU feed-forward over this rank's columns."""

    def __init__(self, share: Share, name: str) -> None:
        weights = share.weights
        self.gate_up = ColumnParallelLinear(weights[f"{name}.gate_up"], weights.get(f"{name}.gate_up_bias"))
        self.out = RowParallelLinear(share.comm, weights.get(f"{name}.down_bias"), weight=weights[f"{name}.down"])
        self._gives = taken_by(self.out.weight)

    def __call__(self, x_TH: Activations) -> Activations:
        """What goes into the row-parallel product `out`, [T, F]."""
        if self._gives is None:
            return gated_linear(x_TH, self.gate_up.weight, "silu", self.gate_up.bias)
        return silu_gated(self.gate_up(x_TH), self._gives)

    @property
    def num_weights(self) -> int:
        """That a token is multiplied by."""
        return self.gate_up.weight.numel() + self.out.weight.numel()


class MixtureOfExperts:
    """A router, the same on all ranks, and this rank's columns of every SwiGLU expert."""

    def __init__(self, share: Share, name: str) -> None:
        config, weights = share.config, share.weights
        self.num_chosen = config.shape.experts_per_token
        self.renormalise = config.renormalise_experts
        self.router: Weight = weights[f"{name}.router"]
        self.gate_up: Experts = weights[f"{name}.gate_up"]
        self.down: Experts = weights[f"{name}.down"]
        self.out = RowParallelSum(share.comm)

    def __call__(self, x_TH: Activations) -> torch.Tensor:
        """This rank's part of the sum, [T, H]."""
        assert isinstance(x_TH, torch.Tensor)
        experts_TK, weights_TK = route(linear(x_TH, self.router), self.num_chosen, renormalise=self.renormalise)
        return expert_ffn(x_TH, experts_TK, weights_TK, self.gate_up, self.down)

    @property
    def num_weights(self) -> int:
        """That a token is multiplied by."""
        return self.router.numel() + self.num_chosen * (self.gate_up[0].numel() + self.down[0].numel())


class Layer:
    """Attention and feed-forward, each behind its norm. Both give what goes into a row-parallel sum, which is added to
    the residual stream.
    """

    def __init__(self, share: Share, name: str) -> None:
        weights = share.weights
        self.attention = Attention(share, name)
        self.attention_norm = self.attention.qkv.norm_before(weights[f"{name}.attention_norm"])
        self.ffn: FeedForward | MixtureOfExperts
        self.ffn_norm: Norm = weights[f"{name}.ffn_norm"]
        if share.config.shape.num_experts:
            self.ffn = MixtureOfExperts(share, name)
        else:
            self.ffn = ffn = FeedForward(share, name)
            self.ffn_norm = ffn.gate_up.norm_before(weights[f"{name}.ffn_norm"])


class Decoder:
    """One rank's share of the model: the layers of its stage, cut by the stage's splits.

    weights: by the names of `models/weights.py`. comm: the tensor-parallel group of the stage. overlap: decides how the
    sums over the ranks are done; None for one after the other. graphs: that steps of a GPU are captured in; None for
    none. head_asker: on a last stage that shares its head with the first.
    """

    def __init__(
        self,
        config: DecoderConfig,
        stage: Stage,
        tensor_rank: int,
        comm: Communicator,
        weights: Weights,
        overlap: Overlap | None = None,
        graphs: Graphs | None = None,
        head_asker: HeadAsker | None = None,
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
        self._recorded: RecordedSteps | CapturedSteps | None = None
        if graphs is not None:
            self._recorded = CapturedSteps(self._run, graphs, comm)
        elif self._recordable():
            self._recorded = RecordedSteps(self._record)
        # Whether recordings begin at the embedding; they begin behind it where that is none of their calls.
        self._records_embedding = graphs is not None or (self.embed is not None and self.embed.native)
        self._passed: Passed | None = None  # by the last step, where it was a recorded one
        self.head = None
        self._head_asker = head_asker
        if stage.head:
            self.head = _head_of(stage, tensor_rank, weights)
            self.head_rows = stage.head[tensor_rank]
        self.norm = weights["norm"] if stage.last else None
        attention = self.layers[0].attention.qkv.weight
        self.frequencies = rope_frequencies_of(config).to(attention.device)

    def num_parts(self, num_tokens: int) -> int:
        """Of the batch of a step of so many tokens; the same on all ranks of the stage."""
        return self._overlap.num_parts(num_tokens)

    def __call__(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Hidden states [T, H] after this stage's layers; x is token ids [T] on the first stage, hidden states
        elsewhere. Several parts of a batch pass each block in turns, so that the sums of one travel behind the other.
        """
        with self._overlap.over(len(x)):
            return self._through_layers(x, batch, cache)

    def _through_layers(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        embed, norm, eps = self.embed, self.layers[0].attention_norm, self.norm_eps
        if len(batch.parts) == 1:
            if embed is not None and not self._records_embedding:
                x = embed(x)
            self._passed = None
            if self._recorded is not None and self._overlap.way(len(x)).name == "none" and not profiled():
                drawn = self.norm is not None and batch.last_rows is None and self._few_logits(len(x))
                self._passed = self._recorded(x, batch.parts[0], cache, drawn)
                if self._passed is not None:
                    self._comm.ledger.layer = -1
                    hidden_TH = self._passed.hidden
                    # What is handed on may be on its way while the next step is computed.
                    return hidden_TH if self.norm is not None else hidden_TH.clone()
            streams: list[ResidualStream] = [self._overlap.stream(self._embedded(x), norm, eps, self._comm)]
        else:
            parts = torch.split(x, [len(part.positions) for part in batch.parts])
            streams = [PendingStream(part if embed is None else embed.start(part), norm, eps) for part in parts]
        self._pass(streams, batch.parts, cache)
        done = [stream.whole() for stream in streams]
        return done[0] if len(done) == 1 else torch.cat(done)

    def forget_steps(self) -> None:
        """Lets go of recorded steps, and so of the cache that they know."""
        self._passed = None
        if self._recorded is not None:
            self._recorded.forget()

    @contextmanager
    def shortened(self, num_layers: int) -> Iterator[None]:
        """Only with the first layers: to try what a step takes beside weights and cache, which all layers do alike."""
        layers = self.layers
        self.layers = layers[:num_layers]
        try:
            yield
        finally:
            self.layers = layers

    def _pass(
        self,
        streams: Sequence[ResidualStream],
        parts: Sequence[Part],
        cache: KVCache,
        arena: Arena | None = None,
        last_norm: torch.Tensor | None = None,
    ) -> None:
        """Through all layers. arena: whose turns they are. last_norm: of what is behind them, if that is wanted."""
        dtype = plain_norm(self.layers[0].attention_norm).dtype
        tables = [rope_table(part.positions, self.frequencies, dtype) for part in parts]
        norms: list[Norm | None] = [*(layer.attention_norm for layer in self.layers[1:]), last_norm]
        layers = zip(self.layers, cache, norms, strict=False)
        for number, (layer, pages, next_norm) in enumerate(layers, start=self._first_layer):
            self._comm.ledger.layer = number
            if arena is not None:
                arena.turn()
            attention, ffn = layer.attention, layer.ffn
            for stream, part, table in zip(streams, parts, tables, strict=True):
                attended_TI = attention(stream.normed(), table, part, pages)
                stream.add(attention.o, attended_TI, layer.ffn_norm)
            for stream in streams:
                stream.add(ffn.out, ffn(stream.normed()), next_norm)
        self._comm.ledger.layer = -1

    def _embedded(self, x: torch.Tensor) -> torch.Tensor:
        """Of token ids, or hidden states as they are."""
        return x if self.embed is None or x.dim() == 2 else self.embed(x)

    def _recordable(self) -> bool:
        """Whether this rank's part of the layers is made of native calls, which a mixture of experts is not."""
        return all(
            isinstance(layer.ffn, FeedForward)
            and all(
                is_native(product.weight)
                for product in (layer.attention.qkv, layer.attention.o, layer.ffn.gate_up, layer.ffn.out)
            )
            for layer in self.layers
        )

    def _record(self, x: torch.Tensor, part: Part, cache: KVCache, recording: Recording, with_logits: bool) -> Passed:
        """x: token ids [T] where the embedding is native, hidden states [T, H] elsewhere."""
        if self.embed is not None and x.dim() == 1:
            x = self.embed.record(x, recording)
        stream = RecordedStream(x, self.layers[0].attention_norm, self.norm_eps, recording)
        return self._passed_through(stream, part, cache, with_logits, recording.arena)

    def _run(self, x: torch.Tensor, part: Part, cache: KVCache, with_logits: bool) -> Passed:
        """x: token ids [T] on the first stage, hidden states [T, H] elsewhere."""
        stream = WholeStream(self._embedded(x), self.layers[0].attention_norm, self.norm_eps)
        return self._passed_through(stream, part, cache, with_logits)

    def _passed_through(
        self, stream: ResidualStream, part: Part, cache: KVCache, with_logits: bool, arena: Arena | None = None
    ) -> Passed:
        """With logits, or what a head that is shared takes in their place."""
        self._pass([stream], [part], cache, arena, self.norm if with_logits else None)
        if not with_logits or self.head is None:
            return Passed(stream.whole())
        normed_TH = stream.normed()
        if self._head_asker is not None:
            assert isinstance(normed_TH, torch.Tensor)
            return Passed(stream.whole(), normed=normed_TH)
        return Passed(stream.whole(), self.head(normed_TH))

    def work(self) -> StageWork:
        """What the layers of this stage take; by the first of them, since all are alike."""
        attention, ffn = self.layers[0].attention, self.layers[0].ffn
        hidden, attention_inputs = attention.o.weight.shape
        return StageWork(
            num_layers=len(self.layers),
            attention=math.prod(attention.qkv.weight.shape) + hidden * attention_inputs,
            ffn=ffn.num_weights,
            hidden=hidden,
            attention_inputs=attention_inputs,
            ffn_inputs=ffn.out.weight.shape[1] if isinstance(ffn, FeedForward) else 0,
            itemsize=attention.o.weight.itemsize,
        )

    @property
    def summed_weight(self) -> Weight:
        """[H, I] of a row-parallel product: the rates of computing and summing are measured by it."""
        layer = self.layers[0]
        return layer.ffn.out.weight if isinstance(layer.ffn, FeedForward) else layer.attention.o.weight

    def logits(self, x_TH: torch.Tensor, rows_B: torch.Tensor | None) -> torch.Tensor:
        """This rank's vocabulary shard of the logits, [B, V] in the model's dtype, at `rows_B`, or all. On the last
        stage only.
        """
        passed = self._passed
        if rows_B is None and passed is not None and passed.hidden is x_TH and passed.logits is not None:
            return passed.logits
        normed_BH = self._normed(x_TH, rows_B)
        assert self.head is not None
        if self._head_asker is not None:
            return self._head_asker.logits(normed_BH, self.head)
        return self.head(normed_BH)

    def largest_keys(self, x_TH: torch.Tensor, rows_B: torch.Tensor | None) -> torch.Tensor:
        """Of each row of `logits` the key of the largest, [B] int64, as `argmax_keys` of all the vocabulary. On a last
        stage that shares its head, where it takes much less than the logits.
        """
        assert self.head is not None
        assert self._head_asker is not None
        return self._head_asker.largest_keys(self._normed(x_TH, rows_B), self.head, self.head_rows.start)

    def _normed(self, x_TH: torch.Tensor, rows_B: torch.Tensor | None) -> torch.Tensor:
        """What the head takes of these rows."""
        if self.norm is None:
            raise RuntimeError("only the last stage has logits")
        passed = self._passed
        if rows_B is None and passed is not None and passed.hidden is x_TH and passed.normed is not None:
            return passed.normed
        return rms_norm(x_TH if rows_B is None else x_TH[rows_B], self.norm, self.norm_eps)

    def _few_logits(self, num_rows: int) -> bool:
        """Whether those of so many rows are few enough to have memory of their own between steps."""
        head, recorded = self.head, self._recorded
        if head is None or recorded is None:
            return False
        return self._head_asker is not None or num_rows * head.num_outputs <= recorded.most_logits


def _head_of(stage: Stage, tensor_rank: int, weights: Weights) -> ColumnParallelLinear:
    """This rank's part of the head, which may be rows of the embedding that it holds."""
    if "head" in weights:
        return ColumnParallelLinear(weights["head"])
    held, rows = stage.vocab[tensor_rank], stage.head[tensor_rank]
    outputs = None if rows == held else slice(rows.start - held.start, rows.stop - held.start)
    return ColumnParallelLinear(weights["embed"], outputs=outputs)


def rope_frequencies_of(config: DecoderConfig) -> torch.Tensor:
    """Of rotation, as `kernels.rope_frequencies` gives them."""
    head_dim, rope = config.shape.head_dim, config.rope
    if rope.scaling == "llama3":
        return rope_frequencies(
            head_dim,
            rope.theta,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_position=rope.original_max_position,
        )
    return rope_frequencies(head_dim, rope.theta, factor=rope.factor)
