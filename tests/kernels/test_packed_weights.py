"""How `PackedWeight` holds a matrix: in 12 bits a weight where its exponents allow, and with every bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.kernels import PackedWeight, choose_packing, make_packed

PACKING = choose_packing(torch.bfloat16, torch.device("cpu"))

pytestmark = pytest.mark.skipif(not PACKING.usable, reason=f"needs native products: {PACKING.told}")

EVERY_NUMBER = torch.arange(-(2**15), 2**15).to(torch.int16)  # the bits of every bfloat16


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int16)


def assert_held(packed: PackedWeight, weight: torch.Tensor) -> None:
    assert torch.equal(bits(packed[torch.arange(len(weight))]), bits(weight))


def drawn(data: st.DataObject, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """A matrix of ordinary numbers with some of any bits among them: none, a few, or all."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    weight = torch.randn(num_outputs, num_inputs, generator=generator).bfloat16()
    strange = torch.randint(2**16, weight.shape, generator=generator).sub(2**15).to(torch.int16)
    share = data.draw(st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 1.0]))
    return torch.where(torch.rand(weight.shape, generator=generator) < share, strange.view(torch.bfloat16), weight)


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 300), st.data())
def test_rows_that_were_put_piece_by_piece_come_back(num_outputs: int, num_inputs: int, data: st.DataObject) -> None:
    weight = drawn(data, num_outputs, num_inputs)
    cuts = sorted(data.draw(st.lists(st.integers(0, num_outputs), max_size=4)))
    pieces = data.draw(st.permutations(list(zip([0, *cuts], [*cuts, num_outputs], strict=True))))
    packed = PackedWeight(num_outputs, num_inputs)
    for start, stop in pieces:
        packed.put(start, weight[start:stop])
    assert_held(packed, weight)
    rows = torch.randint(num_outputs, (7,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits(packed[rows]), bits(weight[rows]))
    whole = PackedWeight.pack(weight)
    assert packed.nbytes == whole.nbytes
    assert packed.share_in_16_bits == whole.share_in_16_bits


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.data())
def test_rows_may_be_put_anew(num_outputs: int, num_inputs: int, data: st.DataObject) -> None:
    weight = drawn(data, num_outputs, num_inputs)
    packed = PackedWeight.pack(drawn(data, num_outputs, num_inputs))
    assert packed.shape == weight.shape
    middle = data.draw(st.integers(0, num_outputs))
    packed.put(middle, weight[middle:])
    packed.put(0, weight[:middle])
    assert_held(packed, weight)
    assert packed.nbytes == PackedWeight.pack(weight).nbytes


@pytest.mark.parametrize("num_inputs", [256, 2048])
def test_every_number_comes_back(num_inputs: int) -> None:
    weight = EVERY_NUMBER.view(torch.bfloat16).view(-1, num_inputs)
    assert_held(PackedWeight.pack(weight), weight)
    assert_held(PackedWeight.pack(weight.T.contiguous()), weight.T.contiguous())


@pytest.mark.parametrize("exponents", [range(1, 16), range(241, 256), (1, 17, 33, 49, 65, 81, 97, 254, 255)])
def test_every_number_of_fifteen_exponents_and_of_zero_takes_12_bits(exponents: range | tuple[int, ...]) -> None:
    kept = {0, *exponents}
    numbers = torch.tensor([number for number in EVERY_NUMBER.tolist() if number >> 7 & 0xFF in kept]).to(torch.int16)
    weight = numbers.view(torch.bfloat16).repeat(16).view(64, -1)
    packed = PackedWeight.pack(weight)
    assert packed.share_in_16_bits == 0
    assert_held(packed, weight)


def test_a_few_numbers_of_other_exponents_are_kept_beside_the_codes() -> None:
    weight = random(64, 4096, seed=1)
    plain = PackedWeight.pack(weight).nbytes
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e-30, 1e-40]).bfloat16()
    strange = torch.cat([strange, torch.tensor([0x7F81, -1, -0x8000], dtype=torch.int16).view(torch.bfloat16)])
    for number, value in enumerate(strange):
        weight[7 * number, 400 * number : 400 * number + 3] = value
    packed = PackedWeight.pack(weight)
    assert packed.share_in_16_bits == 0
    assert plain < packed.nbytes < plain + 3 * len(strange) * 16
    assert_held(packed, weight)


def test_a_model_like_matrix_takes_three_quarters_of_its_bytes() -> None:
    weight = random(1024, 1024, seed=1) * 0.02
    packed = PackedWeight.pack(weight)
    assert 0.75 * weight.nbytes < packed.nbytes < 0.76 * weight.nbytes


def test_only_the_blocks_that_do_not_fit_take_16_bits() -> None:
    weight = random(96, 1024, seed=1)
    weight[40] *= 2.0 ** torch.arange(1024).remainder(200).sub(100)
    packed = PackedWeight.pack(weight)
    assert packed.share_in_16_bits == pytest.approx(1 / 3)
    assert packed.nbytes > 32 * 1024 * (2 + 1.5 + 1.5)
    assert_held(packed, weight)


def test_weights_side_by_side_keep_to_their_places() -> None:
    shapes = [(33, 7), (64, 100), (1, 1), (100, 33)]
    weights = [random(*shape, seed=number) for number, shape in enumerate(shapes)]
    packed = make_packed(shapes)
    for each, weight in zip(packed, weights, strict=True):
        each.put(0, weight)
    for each, weight in zip(packed, weights, strict=True):
        assert_held(each, weight)
    assert len({each.data.untyped_storage().data_ptr() for each in packed}) == 1


def test_a_packed_weight_tells_of_itself_what_a_tensor_tells() -> None:
    weight = random(70, 65, seed=1)
    packed = PackedWeight.pack(weight)
    for name in ("shape", "dtype", "device", "itemsize"):
        assert getattr(packed, name) == getattr(weight, name), name
    assert packed.numel() == weight.numel()
    assert packed.data.nbytes == 96 * 68 * 12 // 8
    assert packed.data.nbytes < packed.nbytes < packed.data.nbytes + 1000
