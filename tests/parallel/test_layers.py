"""Parallel layers against the computation that is not cut: whole numbers, so that sums are exact in any order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rank_threads import Join, run_ranks

from phalanx.comm.communicator import Communicator
from phalanx.kernels import Activations, QuantisedRows, QuantisedWeight, WeightFormat
from phalanx.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from phalanx.parallel.split import Split

ranks_are_threads = settings(max_examples=20, deadline=None)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Some 1 to 50 elements over 1 to 4 ranks, cut anywhere."""
    size = draw(st.integers(1, 50))
    cuts = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
    return Split.explicit(size, [0, *sorted(cuts), size])


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(splits(), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_output_columns_side_by_side_are_the_whole_output(
    split: Split, num_inputs: int, num_tokens: int, biased: bool
) -> None:
    x, weight = whole_numbers(num_tokens, num_inputs), whole_numbers(split.size, num_inputs, seed=1)
    bias = whole_numbers(split.size, seed=2) if biased else None
    shards = [
        ColumnParallelLinear(weight[part.slice], None if bias is None else bias[part.slice])(x)
        for part in split.intervals
    ]
    assert torch.equal(torch.cat(shards, dim=1), F.linear(x, weight, bias))


@ranks_are_threads
@given(splits(), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_every_rank_gets_the_sum_over_all_input_columns_and_the_bias_once(
    split: Split, num_outputs: int, num_tokens: int, biased: bool
) -> None:
    x, weight = whole_numbers(num_tokens, split.size), whole_numbers(num_outputs, split.size, seed=1)
    bias = whole_numbers(num_outputs, seed=2) if biased else None

    def rank(number: int, join: Join) -> torch.Tensor:
        part = split[number].slice
        layer = RowParallelLinear(join("stage", number, split.num_parts), bias, weight=weight[:, part].contiguous())
        return layer(x[:, part].contiguous())

    for y in run_ranks(split.num_parts, rank):
        assert torch.equal(y, F.linear(x, weight, bias))


@ranks_are_threads
@given(splits(), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_sums_of_integers_have_the_same_bits_however_they_are_cut(
    split: Split, num_outputs: int, num_tokens: int, biased: bool
) -> None:
    """Of any numbers, in float32: cut between the ranges of 8 inputs that share a scale."""
    held = WeightFormat(8, activations=True, input_group=8)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_tokens, 8 * split.size, generator=generator)
    residual, norm = torch.randn(num_tokens, num_outputs, generator=generator), torch.rand(num_outputs)
    bias = torch.randn(num_outputs, generator=generator) if biased else None
    q = torch.randint(-128, 128, (num_outputs, 8 * split.size), generator=generator, dtype=torch.int8)
    scales = torch.rand(num_outputs, 1, generator=generator) / 100

    def layer(inputs: slice, comm: Communicator) -> RowParallelLinear:
        part = q[:, inputs].contiguous()
        weight = QuantisedWeight(num_outputs, part.shape[1], held, torch.float32)
        weight.put(0, QuantisedRows(part, scales))
        return RowParallelLinear(comm, bias, weight=weight)

    def results(inputs: slice, comm: Communicator) -> tuple[Activations, ...]:
        mine, out = x[:, inputs].contiguous(), layer(inputs, comm)
        return out(mine), *out.add_and_norm(mine, residual, norm, 1e-5)

    def rank(number: int, join: Join) -> tuple[Activations, ...]:
        inputs = slice(8 * split[number].start, 8 * split[number].stop)
        return results(inputs, join("stage", number, split.num_parts))

    whole = run_ranks(1, lambda _, join: results(slice(None), join("whole", 0, 1)))[0]
    assert all(isinstance(each, torch.Tensor) and each.dtype == torch.float32 for each in whole)
    for cut in run_ranks(split.num_parts, rank):
        for mine, expected in zip(cut, whole, strict=True):
            assert isinstance(mine, torch.Tensor)
            assert isinstance(expected, torch.Tensor)
            assert torch.equal(mine, expected)


@ranks_are_threads
@given(splits(), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_the_sum_is_added_to_the_stream_and_normalised(
    split: Split, num_outputs: int, num_tokens: int, biased: bool
) -> None:
    x, weight = whole_numbers(num_tokens, split.size), whole_numbers(num_outputs, split.size, seed=1)
    bias = whole_numbers(num_outputs, seed=2) if biased else None
    residual, norm = whole_numbers(num_tokens, num_outputs, seed=3), whole_numbers(num_outputs, seed=4)

    def rank(number: int, join: Join) -> tuple[torch.Tensor, torch.Tensor]:
        part = split[number].slice
        layer = RowParallelLinear(join("stage", number, split.num_parts), bias, weight=weight[:, part].contiguous())
        normed, stream = layer.add_and_norm(x[:, part].contiguous(), residual, norm, 1e-5)
        assert isinstance(normed, torch.Tensor)
        return normed, stream

    stream = residual + F.linear(x, weight, bias)
    exact = stream.double()
    normed = norm.double() * exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for found_normed, found_stream in run_ranks(split.num_parts, rank):
        assert torch.equal(found_stream, stream)
        assert torch.allclose(found_normed.double(), normed, rtol=1e-5, atol=1e-6)


@ranks_are_threads
@given(splits(), st.data())
def test_every_rank_gets_the_embedding_of_every_token(split: Split, data: st.DataObject) -> None:
    weight = whole_numbers(split.size, 6)
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, split.size - 1), min_size=1, max_size=12)))

    def rank(number: int, join: Join) -> torch.Tensor:
        rows = split[number]
        return VocabParallelEmbedding(weight[rows.slice], rows, join("stage", number, split.num_parts))(tokens)

    for x in run_ranks(split.num_parts, rank):
        assert torch.equal(x, weight[tokens])


def test_the_first_and_last_token_of_every_shard_are_found() -> None:
    split = Split.weighted(320, (5, 1, 2), granule=16)
    weight = whole_numbers(320, 4)
    tokens = torch.tensor([token for part in split.intervals for token in (part.start, part.stop - 1)])

    def rank(number: int, join: Join) -> torch.Tensor:
        return VocabParallelEmbedding(weight[split[number].slice], split[number], join("stage", number, 3))(tokens)

    for x in run_ranks(3, rank):
        assert torch.equal(x, weight[tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_keep_the_dtype_and_leave_their_weights_and_input_as_they_were(dtype: torch.dtype) -> None:
    x, weight, bias = (whole_numbers(*shape).to(dtype) for shape in ((3, 8), (5, 8), (5,)))
    before = [tensor.clone() for tensor in (x, weight, bias)]

    def rank(number: int, join: Join) -> list[torch.Tensor]:
        comm = join("stage", number, 2)
        part = Split.even(8, 2)[number]
        rows = Split.even(5, 2)[number]
        tokens = torch.tensor([0, 4, 4])
        return [
            ColumnParallelLinear(weight, bias)(x),
            RowParallelLinear(comm, bias, weight=weight[:, part.slice].contiguous())(x[:, part.slice].contiguous()),
            VocabParallelEmbedding(weight[rows.slice], rows, comm)(tokens),
        ]

    for results in run_ranks(2, rank):
        assert [result.dtype for result in results] == [dtype] * 3
    for tensor, was in zip((x, weight, bias), before, strict=True):
        assert torch.equal(tensor, was)
