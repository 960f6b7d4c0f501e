"""Cuts of packed matrices, wherever they fall: into an interleave of eight, a word, a group, a block of 128."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.quantised_checkpoints import FORMS, Form, Quantised, fp8, gptq, round_to_integers, scattered

from phalanx.errors import ModelError
from phalanx.kernels import QuantisedWeight
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.fields import Fields
from phalanx.models.packed_entries import packed_entries
from phalanx.models.params import Param, TensorSlice
from phalanx.models.quantised_slice import held_inputs, quantised_slice, read_values, weight_format
from phalanx.models.safetensors_index import read_safetensors_header
from phalanx.models.stored_quantization import stored_quantization
from phalanx.parallel.split import Interval

CASES = {
    **FORMS,
    "gptq 8 bits act-order": Form(
        FORMS["gptq"].config | {"bits": 8, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda w, g_idx: gptq(w, 8, symmetric=False, g_idx=g_idx, step=0),
    ),
    "fp8 blocks of 128": Form(
        FORMS["fp8 blocks"].config | {"weight_block_size": [128, 128]},
        lambda w, _: fp8(w, 128, 128, "weight_scale_inv"),
    ),
}


def checkpoint_of(matrices: dict[str, Quantised], config: dict[str, object], folder: Path) -> Checkpoint:
    parts = {f"{name}.{suffix}": part for name, each in matrices.items() for suffix, part in each.parts.items()}
    save_file({name: part.contiguous() for name, part in parts.items()}, folder / "model.safetensors")
    entries = read_safetensors_header(folder / "model.safetensors")
    expected = {f"{name}.weight": tuple(each.exact.shape) for name, each in matrices.items()}
    return Checkpoint(packed_entries(entries, expected, stored_quantization(Fields(config, "config.json"))))


def held(checkpoint: Checkpoint, pieces: Sequence[TensorSlice]) -> torch.Tensor:
    """What a rank that holds these slices, stacked, multiplies by: [rows, columns] float32."""
    packing = checkpoint.entry(pieces[0].tensor).packing
    assert packing is not None
    scheme = packing.scheme
    of_cut = weight_format(scheme.of_cut(Param("some", tuple(pieces), multiplied=True)))
    inputs = held_inputs(checkpoint, pieces, scheme, of_cut, stored=True)
    num_rows, num_columns = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
    weight = QuantisedWeight(num_rows, num_columns, of_cut, torch.float32, None, inputs.order)
    first = 0
    for piece in pieces:
        for rows in quantised_slice(checkpoint, piece, scheme, inputs, weight.device, stored=True):
            weight.put(first, rows)
            first += len(rows.q)
    assert first == num_rows
    return weight[torch.arange(num_rows)]


def slice_of(name: str, rows: Interval, columns: Interval, width: int) -> TensorSlice:
    return TensorSlice(name, (rows.size, columns.size), rows, columns, width)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_the_shards_together_are_the_whole(name: str, data: st.DataObject) -> None:
    """Cut anywhere: what ranks hold, and what they read dequantised."""
    num_rows, num_columns = 8 * data.draw(st.integers(1, 34)), 8 * data.draw(st.integers(1, 34))
    form, generator = CASES[name], torch.Generator().manual_seed(num_rows)
    w = torch.randn(num_rows, num_columns, generator=generator)
    matrix = form.pack(w, scattered(num_columns, seed=num_columns))
    rows = sorted({0, num_rows, *data.draw(st.lists(st.integers(1, num_rows), max_size=3))})
    columns = sorted({0, num_columns, *data.draw(st.lists(st.integers(1, num_columns), max_size=3))})
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_of({"m": matrix}, form.config, Path(folder))
        together, read = torch.zeros(num_rows, num_columns), torch.zeros(num_rows, num_columns)
        for top, bottom in pairwise(rows):
            for left, right in pairwise(columns):
                piece = slice_of("m.weight", Interval(top, bottom), Interval(left, right), num_columns)
                together[top:bottom, left:right] = held(checkpoint, [piece])
                read[top:bottom, left:right] = read_values(
                    checkpoint, "m.weight", piece.rows, piece.columns, torch.float32
                )
        checkpoint.close()
    # Integers up to 8 bits and scales of up to 16 are exact in float32; scales of 32 bits are rounded once.
    assert torch.equal(together, matrix.exact.float())
    assert torch.equal(read, matrix.exact.float())


def test_zeros_of_a_byte_and_biases_of_zeros_are_read_too(tmp_path: Path) -> None:
    """As the first versions of compressed-tensors and of GPTQ have written them."""
    form = FORMS["compressed W4A16 act-order"]
    w, g_idx = torch.randn(24, 64), scattered(64, 3)
    matrix = form.pack(w, g_idx)
    integers = round_to_integers(w, 4, g_idx=g_idx, dtype=torch.bfloat16)
    matrix.parts["weight_zero_point"] = (integers.zeros - 8).to(torch.int8)
    matrix.parts["bias"] = torch.zeros(24)
    checkpoint = checkpoint_of({"m": matrix}, form.config, tmp_path)
    piece = slice_of("m.weight", Interval(0, 24), Interval(0, 64), 64)
    assert torch.equal(held(checkpoint, [piece]), matrix.exact.float())
    assert list(checkpoint.entries) == ["m.weight"]
    matrix.parts["bias"][5] = 1
    assert "m.bias" in checkpoint_of({"m": matrix}, form.config, tmp_path).entries, "and is refused as unexpected"


def test_matrices_of_one_product_with_unlike_orders_are_refused(tmp_path: Path) -> None:
    form = FORMS["gptq act-order"]
    w = torch.randn(16, 64)
    matrices = {name: form.pack(w, scattered(64, seed)) for name, seed in (("q", 1), ("k", 1), ("v", 2))}
    checkpoint = checkpoint_of(matrices, form.config, tmp_path)
    pieces = [slice_of(f"{name}.weight", Interval(0, 16), Interval(0, 64), 64) for name in "qkv"]
    assert held(checkpoint, pieces[:2]).shape == (32, 64)
    with pytest.raises(ModelError, match=r"q\.weight and v\.weight are scattered .* set model\.quantization: none"):
        held(checkpoint, pieces)


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("gptq", "qzeros", lambda part: part + 1, r"m\.qzeros holds other zeros than 8.* set sym: false"),
        (
            "gptq act-order",
            "g_idx",
            lambda part: part + 1,
            r"m\.g_idx has groups 1 to 2, of 2 .*quantise",
        ),
        ("fp8", "weight", lambda part: torch.full_like(part, torch.nan), r"m\.weight holds what is not a number"),
    ],
)
def test_numbers_that_no_quantiser_writes_are_refused(
    tmp_path: Path, name: str, part: str, change: object, message: str
) -> None:
    form = FORMS[name]
    matrix = form.pack(torch.randn(16, 64), scattered(64, 1))
    matrix.parts[part] = change(matrix.parts[part])  # type: ignore[operator]
    checkpoint = checkpoint_of({"m": matrix}, form.config, tmp_path)
    with pytest.raises(ModelError, match=message):
        held(checkpoint, [slice_of("m.weight", Interval(0, 16), Interval(0, 64), 64)])


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("awq", "scales", None, r"tensor m\.scales is missing; quantise the model again"),
        ("awq", "qzeros", None, r"tensor m\.qzeros is missing"),
        (
            "awq",
            "scales",
            lambda part: part[:1],
            r"tensor m\.scales has shape \[1, 16\], not \[2, 16\]",
        ),
        ("awq", "qzeros", lambda part: part.float(), r"tensor m\.qzeros has dtype F32, not I32"),
        ("gptq act-order", "g_idx", None, r"tensor m\.g_idx is missing"),
        ("gptq act-order", "g_idx", lambda part: part[:8], r"m\.g_idx has shape \[8\], not \[64\]"),
        (
            "gptq",
            "qweight",
            lambda part: part[:4],
            r"\[4, 16\], not \[8, 16\], which \[16, 64\] weights of 4 bits",
        ),
        ("fp8 blocks", "weight_scale_inv", None, r"m\.weight_scale or weight_scale_inv is missing"),
        (
            "fp8 blocks",
            "weight_scale_inv",
            lambda part: part.t(),
            r"m\.weight_scale_inv has shape \[2, 1\], not \[1, 2\]",
        ),
        ("compressed W4A16", "weight_packed", lambda part: part[:, :4], r"m\.weight_packed has shape"),
        (
            "compressed W8A8",
            "weight_scale",
            lambda part: part[:8],
            r"has shape \[8, 1\], not \[16, 1\]",
        ),
    ],
)
def test_parts_that_are_missing_or_misshapen_are_named(
    tmp_path: Path, name: str, part: str, change: object, message: str
) -> None:
    form = FORMS[name]
    matrix = form.pack(torch.randn(16, 64), scattered(64, 1))
    found = matrix.parts.pop(part)
    if change is not None:
        matrix.parts[part] = change(found)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        checkpoint_of({"m": matrix}, form.config, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, r"quant_method is 'hqq'; supported: awq, gptq, fp8, compressed-tensors"),
        ({"quant_method": "awq", "bits": 3, "group_size": 32}, r"bits is 3; supported: 4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 20}, r"group_size is 20; supported: a multiple of 8, or -1"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
            r"version is 'gemv'; supported: gemm",
        ),
        ({"quant_method": "gptq", "bits": 2, "group_size": 32}, r"bits is 2; supported: 4 or 8"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"},
            r"checkpoint_format is 'marlin'; supported: gptq or gptq_v2",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"fmt is 'e5m2'; supported: e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\]; supported: two sizes"),
        ({"quant_method": "compressed-tensors"}, r"config_groups is None; supported: an object"),
        (
            FORMS["compressed W4A16"].config | {"format": "nvfp4-pack-quantized"},
            r"format is 'nvfp4-pack-quantized'; supported: pack-quantized",
        ),
        (
            FORMS["compressed W4A16"].config | {"ignore": ["re:("]},
            r"ignore has '\(', which is no expression",
        ),
        (
            FORMS["compressed W4A16"].config | {"transform_config": {"config_groups": {"u": {}}}},
            r"transform_config is .*; supported: absent",
        ),
    ],
)
def test_what_is_not_known_of_a_quantiser_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: .*{message}"):
        stored_quantization(Fields(config, "config.json: quantization_config"))


def test_names_and_expressions_say_which_modules_are_quantised() -> None:
    config = FORMS["compressed W4A16"].config | {"ignore": ["lm_head", "re:.*mlp.gate$"]}
    quantization = stored_quantization(Fields(config, "config.json"))
    found = [
        quantization.form_of(f"model.{name}") is not None
        for name in ("layers.1.mlp.gate", "layers.1.mlp.gate_proj", "embed_tokens", "layers.0.self_attn.q_proj")
    ]
    assert found == [False, True, False, True]
    assert quantization.form_of("lm_head") is None
    awq = stored_quantization(Fields(FORMS["awq"].config | {"modules_to_not_convert": ["layers.0."]}, "config.json"))
    assert [awq.form_of(f"model.layers.{layer}.mlp.up_proj") is None for layer in (0, 1)] == [True, False]
