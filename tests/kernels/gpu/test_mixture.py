"""`route` and `expert_ffn` in Triton against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned, relative_error
from tests.kernels.mixtures import Mixture, routed

from phalanx.kernels import PackedExperts, WeightFormat, expert_ffn, make_quantised_on, quantise, route
from phalanx.kernels.gpu.expert_blocks import expert_blocks
from phalanx.kernels.gpu.target import A100, assumed
from phalanx.kernels.quantised_weight import dequantise
from phalanx.kernels.weight_on_gpu import numbers_of

ERROR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}  # gates and outputs are rounded on the way
dtypes = st.sampled_from(list(ERROR))


@given(
    st.integers(0, 20),
    st.sampled_from([(2, 1), (8, 2), (60, 3), (128, 5)]),
    st.sampled_from(["softmax", "sigmoid"]),
    st.booleans(),
)
@settings(max_examples=8)
def test_routing(device: torch.device, tokens: int, sizes: tuple[int, int], score: str, renormalise: bool) -> None:
    experts, chosen = sizes
    logits = torch.randn(tokens, experts + 3, device=device).bfloat16()[:, :experts]  # some of them equal
    with poisoned():
        found, weights = route(logits, chosen, score=score, renormalise=renormalise)  # type: ignore[arg-type]
    expected, exact = routed(logits, chosen, score, renormalise)
    assert torch.equal(found.long(), expected)
    assert torch.allclose(weights.double(), exact, rtol=1e-5)


def test_a_token_without_numbers_goes_to_some_experts_and_spoils_no_other(device: torch.device) -> None:
    logits = torch.randn(3, 8, device=device)
    logits[1] = torch.nan
    experts, weights = route(logits, 3, renormalise=True)
    assert len(set(experts[1].tolist())) == 3
    assert experts.min() >= 0
    assert experts.max() < 8
    assert not weights[[0, 2]].isnan().any()


@given(st.integers(1, 90), st.integers(1, 9), st.data())
@settings(max_examples=10)
def test_every_row_is_in_one_block_of_its_expert(
    device: torch.device, tokens: int, experts: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(1, experts))
    routing = torch.rand(tokens, experts, device=device).argsort(1)[:, :chosen].int()
    with poisoned():
        blocks = expert_blocks(routing, experts, 16)
    slots, owners = blocks.slots.view(-1, 16).cpu(), blocks.experts.cpu()
    assert owners[owners >= 0].tolist() == sorted(owners[owners >= 0].tolist())
    held = [slot for rows, owner in zip(slots, owners, strict=True) if owner >= 0 for slot in rows.tolist()]
    assert sorted(slot for slot in held if slot < routing.numel()) == list(range(routing.numel()))
    assert {slot for slot in held if slot >= routing.numel()} <= {routing.numel()}
    for rows, owner in zip(slots, owners, strict=True):
        if owner >= 0:
            mine = rows[rows < routing.numel()]
            assert len(mine)
            assert (routing.flatten().cpu()[mine] == owner).all()


@given(st.integers(0, 20), st.integers(1, 12), st.integers(1, 12), st.sampled_from([(1, 1), (5, 2), (8, 3)]), dtypes)
@example(1, 8, 8, (8, 3), torch.bfloat16)
@example(9, 5, 4, (5, 2), torch.float16)  # rows that TMA cannot take
@settings(max_examples=8)
def test_experts(
    device: torch.device, tokens: int, hidden: int, columns: int, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    check(Mixture(tokens, 8 * hidden - 3 * (hidden == 5), 8 * columns, *sizes, dtype, device))


@pytest.mark.parametrize(("tokens", "experts"), [(90, 3), (180, 2)])
def test_experts_of_many_rows(device: torch.device, tokens: int, experts: int) -> None:
    check(Mixture(tokens, 72, 40, experts, 2, torch.bfloat16, device))


def test_experts_without_tma(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        pytest.skip("needs a GPU before Hopper, or none")
    with assumed(A100):
        check(Mixture(60, 72, 40, 4, 2, torch.bfloat16, device))


@pytest.mark.parametrize(
    ("held", "tokens", "dtype"),
    [
        (WeightFormat(4, 32, torch.float16, offsets=True), 3, torch.float32),
        (WeightFormat(4, 32, torch.float16), 50, torch.bfloat16),
        (WeightFormat(8), 5, torch.bfloat16),
        (WeightFormat(8, 8, torch.float16), 3, torch.float32),
        (WeightFormat(8, e4m3=True), 120, torch.float32),
    ],
)
def test_experts_by_quantised_weights(
    device: torch.device, held: WeightFormat, tokens: int, dtype: torch.dtype
) -> None:
    mixture = Mixture(tokens, 72, 40, 3, 2, dtype, device)
    packed = []
    for name in ("gate_up", "down"):
        plain = getattr(mixture, name)
        weights = make_quantised_on(device, plain.shape[1:], held, dtype, [None] * 3)
        for weight, each in zip(weights, plain, strict=True):
            weight.put(0, quantise(each, held))
        assert weights[1].on_gpu is not None
        standing_for = [dequantise(quantise(each, held), held) for each in plain]
        setattr(mixture, name, torch.stack(standing_for))
        packed.append(PackedExperts(weights))
    with poisoned():
        actual = expert_ffn(mixture.x, mixture.experts, mixture.weights, *packed)
    assert relative_error(actual, mixture.exact) < (1e-5 if dtype == torch.float32 else 8e-3)


def check(mixture: Mixture) -> None:
    with poisoned():
        actual = expert_ffn(mixture.x, mixture.experts, mixture.weights, mixture.gate_up, mixture.down)
    assert actual.dtype == mixture.x.dtype
    assert relative_error(actual, mixture.exact) < ERROR[mixture.x.dtype]


def test_they_are_registered(device: torch.device) -> None:
    mixture = Mixture(3, 32, 16, 4, 2, torch.bfloat16, device)
    torch.library.opcheck(torch.ops.phalanx.route.default, (torch.randn(3, 8, device=device), 2, "softmax", True))
    arguments = (mixture.x, mixture.experts, mixture.weights, mixture.gate_up, mixture.down)
    torch.library.opcheck(torch.ops.phalanx.expert_ffn.default, arguments)
    held = WeightFormat(8)
    numbers = [
        numbers_of(make_quantised_on(device, shape, held, torch.bfloat16, [None] * 4)) for shape in ((32, 32), (32, 16))
    ]
    assert numbers[0] is not None
    assert numbers[1] is not None
    quantised = (*arguments[:3], *numbers[0], *numbers[1])
    torch.library.opcheck(torch.ops.phalanx.expert_ffn_quantised.default, quantised)
