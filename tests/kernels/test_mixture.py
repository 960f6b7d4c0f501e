"""`route` and `expert_ffn` on CPUs, by PyTorch and by packed weights, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.mixtures import Mixture, routed

from phalanx.kernels import PackedExperts, PackedWeight, choose_packing, expert_ffn, route

CPU = torch.device("cpu")
PACKING = choose_packing(torch.bfloat16, CPU)
needs_packing = pytest.mark.skipif(not PACKING.usable, reason=f"needs native products: {PACKING.told}")

scores = st.sampled_from(["softmax", "sigmoid"])


@given(st.integers(1, 9), st.integers(1, 40), st.data(), scores, st.booleans())
@settings(max_examples=15)
def test_the_largest_logits_choose_and_weigh(
    tokens: int, experts: int, data: st.DataObject, score: str, renormalise: bool
) -> None:
    chosen = data.draw(st.integers(1, experts))
    logits = torch.randn(tokens, experts).bfloat16()  # some of them equal
    found, weights = route(logits, chosen, score=score, renormalise=renormalise)  # type: ignore[arg-type]
    expected, exact = routed(logits, chosen, score, renormalise)
    assert torch.equal(found.long(), expected)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.double(), exact, rtol=1e-5)


def test_of_equal_logits_the_first_experts_are_chosen() -> None:
    experts, weights = route(torch.zeros(2, 6), 3, renormalise=False)
    assert experts.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full((2, 3), 1 / 6))


@given(st.integers(0, 20), st.integers(1, 8), st.data())
@example(1, 4, None)
@settings(max_examples=15)
def test_the_sum_over_a_tokens_experts(tokens: int, experts: int, data: st.DataObject | None) -> None:
    chosen = data.draw(st.integers(1, experts)) if data is not None else 2
    mixture = Mixture(tokens, 24, 20, experts, chosen, torch.float32, CPU)
    actual = expert_ffn(mixture.x, mixture.experts, mixture.weights, mixture.gate_up, mixture.down)
    assert actual.shape == (tokens, 24)
    assert torch.allclose(actual.double(), mixture.exact, rtol=1e-4, atol=1e-5)


def test_columns_of_experts_on_several_ranks_add_up() -> None:
    mixture = Mixture(5, 24, 20, 4, 2, torch.float32, CPU)
    parts = [
        expert_ffn(mixture.x, mixture.experts, mixture.weights, mixture.gate_up[:, rows], mixture.down[:, :, columns])
        for columns, rows in (
            (slice(0, 13), [*range(13), *range(20, 33)]),
            (slice(13, 20), [*range(13, 20), *range(33, 40)]),
        )
    ]
    assert torch.allclose(sum(parts).double(), mixture.exact, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@needs_packing
def test_packed_experts_give_a_token_the_same_bits_in_any_batch() -> None:
    mixture = Mixture(40, 96, 72, 6, 2, torch.bfloat16, CPU)
    gate_up, down = (PackedExperts(map(PackedWeight.pack, weight)) for weight in (mixture.gate_up, mixture.down))
    together = expert_ffn(mixture.x, mixture.experts, mixture.weights, gate_up, down)
    assert together.dtype == torch.bfloat16
    error = (together.double() - mixture.exact).norm() / mixture.exact.norm()
    assert error < 6e-3  # gates, outputs and sums are rounded to 8 bits
    for token in range(0, 40, 13):
        one = slice(token, token + 1)
        alone = expert_ffn(mixture.x[one], mixture.experts[one], mixture.weights[one], gate_up, down)
        assert torch.equal(alone, together[one])
