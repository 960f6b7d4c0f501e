"""Products from packed weights, in every set of instructions that this processor has for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.kernels import PackedWeight, choose_packing, linear
from phalanx.native import find_native

CPU = torch.device("cpu")
PACKING = choose_packing(torch.bfloat16, CPU)
LIBRARY = find_native().library
NAMES: tuple[str, ...] = LIBRARY.linear_sets if LIBRARY is not None else ()
SETS = range(len(NAMES))

pytestmark = pytest.mark.skipif(not PACKING.usable, reason=f"needs native products: {PACKING.told}")

SPREADS = [0, 3, 30]
ROWS = st.one_of(st.integers(1, 30), st.sampled_from([48, 64, 385, 800]))
SIZES = st.one_of(st.integers(1, 200), st.sampled_from([576, 1536, 2047, 2049, 4100]))
# (rows, inputs, outputs): any two of them large, but not all three, where a reference in float64 takes seconds.
SHAPES = st.tuples(ROWS, SIZES, SIZES).filter(lambda shape: prod(shape) <= 2**30)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    assert LIBRARY is not None
    LIBRARY.resize_pool(2)
    yield
    LIBRARY.resize_pool(1)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_right(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, roundings: int = 1
) -> None:
    """Within what adding in float32 in any order and rounding to bfloat16 so many times may do.

    Products of two bfloat16 are exact in float32; each of K additions errs by 2^-24 of a sum that is nowhere larger
    than that of the magnitudes; the last rounding by 2^-8 (Higham, Accuracy and Stability, 2002, section 3.1).
    """
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitudes = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    added = (weight.shape[1] + 2) * 2.0**-24 * magnitudes
    bound = added + roundings * 2.0**-8 * (magnitudes if roundings > 1 else exact.abs() + added)
    error = (y.double() - exact).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} of the bound"


def spread_weight(num_outputs: int, num_inputs: int, spread: int, seed: int) -> torch.Tensor:
    """Of unlike exponents: with a spread of 3 a block of 32 outputs may have a few that it keeps beside its codes, with
    one of 30 it has too many, in every second block.
    """
    weight = random(num_outputs, num_inputs, seed=seed).float()
    if spread:
        by = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).mul(spread).round()
        rows = torch.arange(num_outputs) // 32 % 2 == 0
        weight[rows] *= 2.0 ** by.clamp(-40, 40)[rows]
    return weight.bfloat16()


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.booleans(), st.sampled_from(SPREADS), st.sampled_from(SETS or [0]), st.integers(0, 99))
def test_products_are_those_of_float64_but_for_rounding(
    shape: tuple[int, int, int], biased: bool, spread: int, chosen: int, seed: int
) -> None:
    num_rows, num_inputs, num_outputs = shape
    x = random(num_rows, num_inputs, seed=seed)
    weight = spread_weight(num_outputs, num_inputs, spread, seed=seed + 1)
    bias = random(num_outputs, seed=seed + 2) if biased else None
    y = PackedWeight.pack(weight).multiply(x, bias, chosen)
    assert_right(y, x, weight, bias)
    assert_right(F.linear(x, weight, bias), x, weight, bias, roundings=3)  # torch rounds before it adds a bias


@pytest.mark.parametrize("chosen", SETS, ids=NAMES)
@pytest.mark.parametrize("num_inputs", [577, 4096])
@pytest.mark.parametrize("spread", SPREADS)
def test_a_row_has_the_same_bits_alone_and_among_others(chosen: int, num_inputs: int, spread: int) -> None:
    weight = PackedWeight.pack(spread_weight(100, num_inputs, spread, seed=1))
    x, bias = random(401, num_inputs, seed=2), random(100, seed=3)
    alone = torch.cat([weight.multiply(row.unsqueeze(0), bias, chosen) for row in x])
    for num_rows in (*range(1, 28), 64, 400, 401):
        assert torch.equal(weight.multiply(x[:num_rows], bias, chosen), alone[:num_rows]), num_rows
        assert torch.equal(weight.multiply(x[-num_rows:], bias, chosen), alone[-num_rows:]), num_rows


@pytest.mark.parametrize("chosen", SETS, ids=NAMES)
def test_the_number_of_threads_changes_no_bit(chosen: int) -> None:
    assert LIBRARY is not None
    weight = PackedWeight.pack(spread_weight(1000, 900, 3, seed=1))
    for num_rows in (1, 9, 40):
        x = random(num_rows, 900, seed=num_rows)
        found = []
        for num_threads in (1, 2, 5):
            LIBRARY.resize_pool(num_threads)
            found.append(weight.multiply(x, None, chosen))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_rows_of_x_may_lie_apart() -> None:
    weight = random(70, 65, seed=1)
    packed, whole = PackedWeight.pack(weight), random(9, 200, seed=2)
    for x in (whole[:, 100:165], whole[::2, 3:68], random(65, 9, seed=3).T):
        assert torch.equal(linear(x, packed), linear(x.contiguous(), packed))


@pytest.mark.parametrize("outputs", [slice(0, 32), slice(32, 70), slice(64, 70), slice(32, 50)], ids=str)
def test_a_product_by_some_outputs_is_that_part_of_the_whole(outputs: slice) -> None:
    packed, x, bias = PackedWeight.pack(random(70, 65, seed=1)), random(14, 65, seed=2), random(70, seed=3)
    assert torch.equal(linear(x, packed, bias[outputs], outputs), linear(x, packed, bias)[:, outputs])


def test_no_rows_make_no_rows() -> None:
    packed = PackedWeight.pack(random(70, 65, seed=1))
    assert linear(torch.empty(0, 65, dtype=torch.bfloat16), packed).shape == (0, 70)
    assert packed[torch.empty(0, dtype=torch.int64)].shape == (0, 65)


def test_infinite_numbers_stay_where_they_are() -> None:
    weight, x = random(40, 33, seed=1), random(3, 33, seed=2)
    x[1, 32] = float("inf")
    weight[7, 0] = float("nan")
    y = linear(x, PackedWeight.pack(weight))
    assert y[:, 7].isnan().all()
    others = torch.arange(40) != 7
    assert y[1, others].isinf().all()
    assert y[0, others].isfinite().all()
    assert y[2, others].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    packed = PackedWeight.pack(random(70, 65, seed=1))
    for x in (random(3, 64, seed=2), random(3, 65, seed=2).float(), random(65, seed=2)):
        with pytest.raises(ValueError, match="for a weight"):
            linear(x, packed)
    for outputs in (slice(0, 71), slice(8, 40), slice(32, 32)):
        with pytest.raises(ValueError, match="do not begin with a block of 32 of 70"):
            linear(random(3, 65, seed=2), packed, outputs=outputs)
    with pytest.raises(ValueError, match="the bias is"):
        linear(random(3, 65, seed=2), packed, random(71, seed=3))
    with pytest.raises(ValueError, match="do not fit"):
        packed.put(6, random(65, 65, seed=2))
    for row in (70, -1):
        with pytest.raises(IndexError, match=f"row {row} of a weight of 70 rows"):
            packed[torch.tensor([0, row])]


@pytest.mark.parametrize("chosen", SETS, ids=NAMES)
def test_how_a_weight_is_held_changes_no_bit_of_a_product(chosen: int) -> None:
    """Of exponents that all fit: beside rows whose own do not, they are held in 16 bits."""
    spread = spread_weight(31, 900, 30, seed=2)
    for num_rows in (1, 5, 12, 13, 40):
        x = random(num_rows, 900, seed=num_rows)
        for row in random(4, 900, seed=1).clamp(min=2**-10):
            alone, beside = (
                PackedWeight.pack(row.unsqueeze(0)),
                PackedWeight.pack(torch.cat([row.unsqueeze(0), spread])),
            )
            assert (alone.share_in_16_bits, beside.share_in_16_bits) == (0, 1)
            assert torch.equal(alone.multiply(x, None, chosen)[:, 0], beside.multiply(x, None, chosen)[:, 0])


def test_several_threads_may_multiply_at_once() -> None:
    weight = PackedWeight.pack(random(300, 300, seed=1))
    inputs = [random(rows, 300, seed=rows) for rows in (1, 5, 30)]
    wanted = [linear(x, weight) for x in inputs]
    wrong: list[int] = []

    def multiply(number: int) -> None:
        for _ in range(50):
            if not torch.equal(linear(inputs[number], weight), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=multiply, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_read_whole() -> None:
    assert LIBRARY is not None
    for count in (1, 8, 100, 70_001):
        words = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(count))
        read = LIBRARY.read_memory(words.data_ptr(), words.nbytes)
        assert (read - int(words.sum())) % 2**64 == 0


@pytest.mark.parametrize(
    ("dtype", "device", "told"),
    [(torch.float32, "cpu", "native products are in bfloat16, this is float32"), (torch.bfloat16, "cuda", "a CPU")],
)
def test_why_weights_are_not_packed_is_told(dtype: torch.dtype, device: str, told: str) -> None:
    packing = choose_packing(dtype, torch.device(device))
    assert not packing.usable
    assert told in packing.told
