"""Operators of GPUs that are watched: told by their names, with what they have to do."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.attention_steps import make_step, plan_of
from tests.kernels.gpu.test_attention import on

from phalanx.kernels import (
    WeightFormat,
    gated_linear,
    group_heads,
    linear,
    make_quantised_on,
    paged_attention,
    rms_norm,
    triton_gpu,
)
from phalanx.kernels.triton_gpu import operators_watched
from phalanx.kernels.watch import CallWatch, Work

KV_OF_QUERY = (0, 0, 1)
HEAD_DIM = 64
LENGTHS = [(5, 1), (9, 2)]  # in the cache, and new


@pytest.mark.parametrize("window", [None, 4])
def test_calls_are_told_with_bytes_and_operations(device: torch.device, window: int | None) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(48, 64, device=device)
    step = on(make_step(LENGTHS, page_size=16, head_dim=HEAD_DIM, kv_of_query=KV_OF_QUERY, window=window), device)
    plan, heads = plan_of(step), group_heads(list(KV_OF_QUERY), 2, device)
    watch = CallWatch()
    before = triton_gpu.find_triton()
    with operators_watched(), watch.watching():
        rms_norm(x, x[0], 1e-5)
        linear(x, weight)
        gated_linear(x, weight, "silu")
        paged_attention(step.query, step.key_cache, step.value_cache, plan, heads, scale=0.1)
    assert triton_gpu.find_triton() is before
    linear(x, weight)
    item, width = 4, HEAD_DIM
    num_read = 6 + 11 if window is None else 4 + 5  # of the second, two new tokens see one position more than a window
    num_seen = 6 + 10 + 11 if window is None else 3 * 4
    assert [call.work for call in watch.take()] == [
        Work("rms_norm", (3, 64), 2 * 3 * 64 * item),
        Work("linear", (3, 48, 64), item * (48 * 64 + 3 * (64 + 48)), 2 * 3 * 48 * 64, weight.data_ptr()),
        Work("gated_linear", (3, 48, 64), item * (48 * 64 + 3 * (64 + 24)), 2 * 3 * 48 * 64, weight.data_ptr()),
        Work("paged_attention", (3, num_read), 2 * item * width * (num_read * 2 + 3 * 3), 4 * num_seen * 3 * width),
    ]


def test_products_by_quantised_weights_are_told_with_their_bytes(device: torch.device) -> None:
    int4, w8a8 = WeightFormat(4, 32, torch.float16, offsets=True), WeightFormat(8, activations=True)
    weights = [
        weight for held in (int4, w8a8) for weight in make_quantised_on(device, (48, 64), held, torch.float32, [None])
    ]
    x = torch.randn(3, 64, device=device)
    watch = CallWatch()
    with operators_watched(), watch.watching():
        for weight in weights:
            linear(x, weight)
    flops, item = 2 * 3 * 48 * 64, 4
    four = 48 * (64 // 2 + 2 * 2 * 2) + item * 3 * (64 + 48)
    both = 48 * (64 + 4) + 3 * (64 + 4 + item * 48)
    assert [call.work for call in watch.take()] == [
        Work("linear_w4a16", (3, 48, 64), four, flops, weights[0].data_ptr()),
        Work("quantise_rows", (3, 64), 1.5 * item * 3 * 64),
        Work("linear_w8a8", (3, 48, 64), both, flops, weights[1].data_ptr()),
    ]
