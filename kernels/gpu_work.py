"""What the operators of GPUs have to do, told from their arguments: see `watch`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from phalanx.kernels import watch
from phalanx.kernels.device_plan import DevicePlan
from phalanx.kernels.kv_format import head_bytes
from phalanx.kernels.watch import Work, product_work

# How often an operator moves its first argument, or as much: rows in 8 bits are half as wide as in 16.
MOVED = {
    "rms_norm": 2.0,
    "rms_norm_quantised": 1.5,
    "add_rms_norm": 4.0,
    "add_rms_norm_quantised": 3.5,
    "layer_norm": 2.0,
    "layer_norm_quantised": 1.5,
    "add_layer_norm": 4.0,
    "add_layer_norm_quantised": 3.5,
    "silu_mul": 1.5,
    "silu_mul_quantised": 1.25,
    "gelu_mul": 1.5,
    "gelu_mul_quantised": 1.25,
    "quantise_rows": 1.5,
    "rope_and_write_kv": 2.0,
    "rope_table": 1.0,
    "route": 1.0,
    "token_places": 1.0,
    "argmax": 1.0,
    "top": 1.0,
    "sample": 1.0,
}
# Rows of outputs that a product moves: with a residual twice as many, behind a gate half.
PRODUCTS = {"linear": 1.0, "linear_add": 2.0, "gated_linear": 0.5}


class WatchedOperators:
    """The module `phalanx.kernels.gpu`, its operators told to the watch."""

    def __init__(self, operators: Any) -> None:
        self._operators = operators

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._operators, name)
        count: Callable[..., Work] | None = None
        if name in MOVED:
            count = partial(_rows, name)
        elif name in PRODUCTS:
            count = partial(product_work, name, PRODUCTS[name])
        elif name in _OTHERS:
            count = _OTHERS[name]
        if count is not None:
            found = partial(watch.watched, count, found)
            setattr(self, name, found)
        return found


def _rows(name: str, x: torch.Tensor, *_: Any, **__: Any) -> Work:
    return Work(name, tuple(x.shape), MOVED[name] * x.nbytes)


def _by_quantised(
    name: str, outputs_in: int, x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | int | None
) -> Work:
    """Of activations as they are. outputs_in: the weight's dimension that they are. others: scales, offsets, ..."""
    num_rows, inputs = x.shape
    outputs = weight.shape[outputs_in]
    moved = weight.nbytes + sum(each.nbytes for each in others if isinstance(each, torch.Tensor))
    moved += x.nbytes + num_rows * outputs * x.itemsize
    return Work(name, (num_rows, outputs, inputs), moved, 2.0 * num_rows * outputs * inputs, weight.data_ptr())


def _both_quantised(
    name: str,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Work:
    (num_rows, inputs), outputs = x.shape, len(weight)
    moved = x.nbytes + x_scales.nbytes + weight.nbytes + scales.nbytes + num_rows * outputs * dtype.itemsize
    return Work(name, (num_rows, outputs, inputs), moved, 2.0 * num_rows * outputs * inputs, weight.data_ptr())


def _embedding(tokens: torch.Tensor, weight: torch.Tensor, *_: Any) -> Work:
    sizes = len(tokens), weight.shape[1]
    return Work("embedding", sizes, 2.0 * sizes[0] * sizes[1] * weight.itemsize, 0.0, weight.data_ptr())


def _attention(
    query: torch.Tensor, keys: torch.Tensor, _: torch.Tensor, plan: DevicePlan, *__: Any, **___: Any
) -> Work:
    return _attended("paged_attention", query.shape[1], keys, plan, query.itemsize)


def _rope_and_attend(
    qkv: torch.Tensor, _: Any, keys: torch.Tensor, __: torch.Tensor, plan: DevicePlan, *___: Any, **____: Any
) -> Work:
    num_kv, head_dim = keys.shape[2:]
    return _attended("rope_and_attend", qkv.shape[1] // head_dim - 2 * num_kv, keys, plan, qkv.itemsize)


def _attended(name: str, num_queries: int, keys: torch.Tensor, plan: DevicePlan, itemsize: int) -> Work:
    """Keys and values once, queries and output; a product for each score and one for its value."""
    if watch.current is None:  # a graph may be captured: nothing may wait for the GPU
        return Work(name, (plan.num_tokens,), 0.0)
    num_kv, head_dim = keys.shape[2:]
    num_read = num_pairs = 0
    for num_new, length in plan.lengths:
        before = length - num_new
        first = 0 if plan.window is None else max(0, before - plan.window + 1)
        num_read += length - first
        seen = (position + 1 for position in range(before, length))
        num_pairs += sum(seen if plan.window is None else (min(each, plan.window) for each in seen))
    moved = num_read * num_kv * head_bytes(keys) + plan.num_tokens * num_queries * head_dim * itemsize
    return Work(name, (plan.num_tokens, num_read), 2.0 * moved, 4.0 * num_pairs * num_queries * head_dim)


def _experts(
    x: torch.Tensor, experts: torch.Tensor, _: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> Work:
    """Weights as if the tokens' experts were all different, as far as there are so many."""
    (num_rows, hidden), columns = x.shape, down.shape[2]
    used = min(experts.numel(), len(down))
    moved = used * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes
    return Work("expert_ffn", (num_rows, hidden, columns), moved, 6.0 * experts.numel() * hidden * columns)


def _quantised_experts(x: torch.Tensor, experts: torch.Tensor, _: torch.Tensor, *numbers: Any) -> Work:
    """The same; numbers: of the gates and the down projections, each data, scales, offsets and group size."""
    scales, down_scales = numbers[1], numbers[5]
    num_rows, hidden = x.shape
    columns = scales.shape[2] // 2
    used = min(experts.numel(), len(down_scales))
    held = sum(each[0].nbytes for each in numbers if isinstance(each, torch.Tensor))
    flops = 6.0 * experts.numel() * hidden * columns
    return Work("expert_ffn_quantised", (num_rows, hidden, columns), used * held + 2 * x.nbytes, flops)


_OTHERS: dict[str, Callable[..., Work]] = {
    "embedding": _embedding,
    "expert_ffn": _experts,
    "expert_ffn_quantised": _quantised_experts,
    "linear_fp8_w8a8": partial(_both_quantised, "linear_fp8_w8a8"),
    "linear_fp8_w8a16": partial(_by_quantised, "linear_fp8_w8a16", 0),
    "linear_w4a16": partial(_by_quantised, "linear_w4a16", 1),
    "linear_w8a8": partial(_both_quantised, "linear_w8a8"),
    "linear_w8a16": partial(_by_quantised, "linear_w8a16", 0),
    "paged_attention": _attention,
    "rope_and_attend": _rope_and_attend,
}
