"""AWQ: scales of input channels that make the rounding of weights matter less (Lin et al. 2023, arXiv 2306.00978).

The inputs of a product that are large in magnitude lose most by what their weights are rounded by. Each input's weights
are multiplied by s = mean|x|^alpha before they are rounded, and what the input comes from (a norm, the values, `up`) is
divided by it, so that the model computes the same but for the rounding. alpha is searched so that what the block puts
out errs least on calibration tokens; alpha = 0, no scales, is among those tried.

Shapes: T calibration tokens, H hidden size, N outputs, K inputs of a matrix, Q query heads, G KV heads, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from phalanx.comm.group import GroupSpec
from phalanx.comm.single import SingleCommunicator
from phalanx.kernels import WeightFormat, dequantise, linear, plan_attention, quantise, rms_norm, rope_table, silu_mul
from phalanx.models.batch import KVCache, Part
from phalanx.models.config import DecoderConfig
from phalanx.models.decoder import FeedForward, Layer, Share, rope_frequencies_of
from phalanx.parallel.layout import StageRequest, build_layout

_ALPHAS = tuple(step / 20 for step in range(0, 20, 2))
_PAGE_SIZE = 16
_LEAST = 1e-4  # of a channel's mean magnitude, as AWQ has it
_CPU = torch.device("cpu")

Weights = dict[str, torch.Tensor]


class Scaled(NamedTuple):
    """What was found for a matrix. scales: [K], importance: [K], mean square of each input once it is divided by its
    scale. error, plain_error: mean squared error of what the block puts out, of this alpha and of alpha = 0.
    """

    alpha: float
    scales: torch.Tensor
    importance: torch.Tensor
    error: float
    plain_error: float


class ActivationAware:
    """Calibration tokens on their way through a model, layer by layer, in float32.

    tokens: [sequences, tokens] int64. held: how matrices will be quantised. dtype: that norms will be saved in.
    """

    def __init__(
        self,
        config: DecoderConfig,
        tokens: torch.Tensor,
        embedding: torch.Tensor,
        held: WeightFormat,
        dtype: torch.dtype,
    ) -> None:
        self._config, self._held, self._dtype = config, held, dtype
        self._x_TH = embedding[tokens.flatten()].float()
        shape = config.shape
        num_sequences, length = tokens.shape
        pages = -(-length // _PAGE_SIZE)
        table = torch.arange(num_sequences * pages).view(num_sequences, pages)
        attention = plan_attention(
            table,
            [length] * num_sequences,
            [length] * num_sequences,
            page_size=_PAGE_SIZE,
            window=config.sliding_window,
            device=_CPU,
        )
        positions = torch.arange(length).repeat(num_sequences)
        slots = torch.arange(length) + _PAGE_SIZE * pages * torch.arange(num_sequences).unsqueeze(1)
        self._part = Part(positions, slots.flatten(), attention)
        cache = KVCache(1, num_sequences * pages, _PAGE_SIZE, shape.num_kv_heads, shape.head_dim, torch.float32, _CPU)
        [self._pages] = cache
        self._table = rope_table(positions, rope_frequencies_of(config), torch.float32)
        self._stage = build_layout(shape, [StageRequest()]).stages[0]
        self._comm = SingleCommunicator(GroupSpec(0, 1))

    def pass_layer(self, number: int, weights: Weights) -> dict[str, Scaled]:
        """Takes the tokens through a layer as it is, and scales its weights in their place. Returns what was found, by
        the names of the matrices. The layer must have a feed-forward, not a mixture of experts.
        """
        name, eps = f"layers.{number}", self._config.norm_eps
        layer = Layer(Share(self._config, self._stage, 0, self._comm, weights), name)
        attention, ffn = layer.attention, layer.ffn
        assert isinstance(ffn, FeedForward)
        normed_TH = rms_norm(self._x_TH, weights[f"{name}.attention_norm"], eps)

        def attend() -> torch.Tensor:
            return attention(normed_TH, self._table, self._part, self._pages)

        attended_TK = attend()
        found: dict[str, Scaled] = {}

        def attention_with(candidate: torch.Tensor) -> torch.Tensor:
            plain, attention.qkv = attention.qkv, replace(attention.qkv, weight=candidate)
            try:
                return attention.o.part(attend())
            finally:
                attention.qkv = plain

        qkv, o = weights[f"{name}.qkv"], weights[f"{name}.o"]
        found[f"{name}.qkv"] = self._search(qkv, normed_TH, attention_with, attention.o.part(attended_TK))
        found[f"{name}.o"] = self._search(
            o,
            attended_TK,
            lambda weight: linear(attended_TK, weight),
            linear(attended_TK, o),
            self._config.shape.num_kv_heads,
        )
        residual_TH = self._x_TH + attention.o(attended_TK)
        ffn_normed_TH = rms_norm(residual_TH, weights[f"{name}.ffn_norm"], eps)
        gated_TK = silu_mul(ffn.gate_up(ffn_normed_TH))
        gate_up, down = weights[f"{name}.gate_up"], weights[f"{name}.down"]
        out_TH = linear(gated_TK, down)
        found[f"{name}.gate_up"] = self._search(
            gate_up,
            ffn_normed_TH,
            lambda weight: linear(silu_mul(linear(ffn_normed_TH, weight, ffn.gate_up.bias)), down),
            out_TH,
        )
        found[f"{name}.down"] = self._search(down, gated_TK, lambda weight: linear(gated_TK, weight), out_TH)
        self._x_TH = residual_TH + ffn.out.biased(out_TH)
        self._fold(name, weights, found)
        return found

    def _search(
        self,
        weight_NK: torch.Tensor,
        x_TK: torch.Tensor,
        output: Callable[[torch.Tensor], torch.Tensor],
        exact: torch.Tensor,
        num_kv_heads: int | None = None,
    ) -> Scaled:
        """The best scales of a weight. output: of the block, with the weight in another's place. exact: with itself.
        num_kv_heads: of inputs that are attention's, where those of query heads with one KV head have one scale.
        """
        magnitudes_K, squares_K = x_TK.abs().mean(0), x_TK.square().mean(0)
        if num_kv_heads is not None:
            dim = self._config.shape.head_dim
            heads_GQD = magnitudes_K.view(num_kv_heads, -1, dim)
            magnitudes_K = heads_GQD.mean(1, keepdim=True).expand_as(heads_GQD).flatten()
        best: Scaled | None = None
        for alpha in _ALPHAS:
            scales_K = magnitudes_K.clamp_min(_LEAST) ** alpha
            scales_K /= (scales_K.max() * scales_K.min()).sqrt()
            importance_K = squares_K / scales_K.square()
            rounded = dequantise(quantise(weight_NK * scales_K, self._held, importance_K), self._held) / scales_K
            error = float((output(rounded) - exact).square().mean())
            if best is None or error < best.error:
                best = Scaled(alpha, scales_K, importance_K, error, error if best is None else best.plain_error)
        assert best is not None
        return best

    def _fold(self, name: str, weights: Weights, found: dict[str, Scaled]) -> None:
        """Into the norms, and into the rows of values and `up`: a row's factor does not change how it is rounded."""
        shape = self._config.shape
        for norm, matrix in (("attention_norm", "qkv"), ("ffn_norm", "gate_up")):
            before = weights[f"{name}.{norm}"]
            after = (before / found[f"{name}.{matrix}"].scales).to(self._dtype).float()
            # By what the norm has become once it is rounded: then nothing is lost by that.
            scales = torch.where(after != 0, before / after, torch.ones(()))
            weights[f"{name}.{norm}"] = torch.where(after != 0, after, before)
            weights[f"{name}.{matrix}"] = weights[f"{name}.{matrix}"] * scales
        o, down = found[f"{name}.o"].scales, found[f"{name}.down"].scales
        weights[f"{name}.o"] = weights[f"{name}.o"] * o
        weights[f"{name}.down"] = weights[f"{name}.down"] * down
        of_values = o.view(shape.num_kv_heads, -1, shape.head_dim)[:, 0].flatten()
        for suffix in ("qkv", "qkv_bias"):
            _divide_last_rows(weights.get(f"{name}.{suffix}"), of_values)
        for suffix in ("gate_up", "gate_up_bias"):
            _divide_last_rows(weights.get(f"{name}.{suffix}"), down)


def _divide_last_rows(rows: torch.Tensor | None, scales: torch.Tensor) -> None:
    if rows is not None:
        rows[-len(scales) :] /= scales if rows.dim() == 1 else scales.unsqueeze(1)
