"""How a kernel is chosen for a product, and how the tables come about; by a clock that only pretends."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phalanx.kernels import tune_linear
from phalanx.kernels.linear_table import (
    CUBLAS,
    FARTHEST,
    FOLDER,
    Choice,
    LinearTable,
    Product,
    Reading,
    candidates,
    load_table,
    untuned,
)
from phalanx.kernels.tune_linear import parse_product, products_of, tune

FEW = Choice("stream_k", 16, 32, 128, 4, 5, 2)
MANY = Choice("persistent", 128, 128, 64, 8, 4)
sizes = st.sampled_from([1, 3, 16, 64, 2048, 4096, 14336])
products = st.builds(Product, st.sampled_from(["bfloat16", "float16"]), sizes, sizes, sizes, st.booleans())


def test_what_was_measured_is_chosen() -> None:
    table = LinearTable("a GPU", {Product("bfloat16", 8, 4096, 4096): Reading(FEW, 10.0, 14.0)})
    assert table.choose(Product("bfloat16", 8, 4096, 4096)) == FEW


def test_the_nearest_product_stands_for_others() -> None:
    table = LinearTable(
        "a GPU",
        {
            Product("bfloat16", 64, 4096, 4096): Reading(FEW, 10.0, 14.0),
            Product("bfloat16", 256, 4096, 4096): Reading(MANY, 30.0, 31.0),
        },
    )
    assert table.choose(Product("bfloat16", 90, 4096, 4096)) == FEW
    assert table.choose(Product("bfloat16", 200, 4096, 5000)) == MANY


@pytest.mark.parametrize(
    "product",
    [Product("float16", 8, 4096, 4096), Product("bfloat16", 8, 4096, 4096, True), Product("bfloat16", 8, 4096, 64)],
)
def test_a_product_too_far_from_any_is_untuned(product: Product) -> None:
    table = LinearTable("a GPU", {Product("bfloat16", 8, 4096, 4096): Reading(MANY, 10.0, 14.0)})
    assert table.choose(product) == untuned(product)


@given(products, products, products)
def test_distance_is_a_metric(a: Product, b: Product, c: Product) -> None:
    assert a.distance(a) == 0
    assert a.distance(b) == b.distance(a)
    assert a.distance(c) <= a.distance(b) + b.distance(c) + 1e-9


def test_untuned_large_products_and_float32_go_to_cublas() -> None:
    assert untuned(Product("bfloat16", 4096, 4096, 4096)) == CUBLAS
    assert untuned(Product("float32", 1, 4096, 4096)) == CUBLAS
    assert untuned(Product("float16", 16, 4096, 4096)).kernel == "stream_k"


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    products = Product("bfloat16", 1, 64, 64, True), Product("bfloat16", 1, 64, 64, held="w8a8")
    table = LinearTable("NVIDIA H100 80GB HBM3", {product: Reading(FEW, 1.25, 2.5) for product in products})
    path = table.save(tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    assert load_table("NVIDIA H100 80GB HBM3", tmp_path) == table
    assert load_table("another GPU", tmp_path) == LinearTable("another GPU")
    assert json.loads(path.read_text()) == table.to_json()


def test_the_fastest_is_taken_and_cublas_stands_beside_it() -> None:
    product = Product("bfloat16", 8, 4096, 4096)
    wanted = list(candidates(product))[3]

    def time_us(_: Product, choice: Choice) -> float:
        return {CUBLAS: 12.0, wanted: 9.0}.get(choice, math.inf)  # the rest has no room on this GPU

    assert tune([product], time_us) == {product: Reading(wanted, 9.0, 12.0)}


def test_cublas_is_taken_where_nothing_is_faster() -> None:
    product = Product("bfloat16", 8192, 8192, 8192)
    readings = tune([product], lambda _, choice: 1.0 if choice == CUBLAS else 1.5)
    assert readings[product].choice == CUBLAS


def test_quantised_weights_are_never_left_to_cublas() -> None:
    product = Product("bfloat16", 8, 4096, 4096, held="w4a16")
    best = candidates(product)[1]
    taken_us = {CUBLAS: 5.0, best: 9.0}
    assert tune([product], lambda _, choice: taken_us.get(choice, math.inf)) == {product: Reading(best, 9.0, 5.0)}
    table = LinearTable("a GPU", {product._replace(held=""): Reading(FEW, 1.0, 2.0)})
    assert table.choose(product) == untuned(product)


def test_no_product_is_begun_when_time_is_up() -> None:
    left = iter([True, True, False])
    some = products_of("1b", "bfloat16")[:5]
    assert list(tune(some, lambda *_: 1.0, may_go_on=lambda: next(left))) == some[:2]


@given(products)
def test_candidates_fit_their_products(product: Product) -> None:
    tried = list(candidates(product))
    assert tried[0] == (untuned(product) if product.held else CUBLAS)
    assert not product.held or {choice.kernel for choice in tried} <= {"stream_k", "tiles"}
    assert len(tried) == len(set(tried)) > 5
    assert all(choice.block_m >= 16 and choice.block_n >= 16 for choice in tried[1:])
    assert product.distance(product) < FARTHEST


def test_products_as_they_are_said() -> None:
    assert parse_product("16,28672,4096,gated", "float16") == Product("float16", 16, 28672, 4096, True)
    assert parse_product("16,64,128,fp8_w8a8", "float16") == Product("float16", 16, 64, 128, held="fp8_w8a8")
    for wrong in ("16,28672", "1,2,3,4", "0,2,3", "a,b,c", "1,2,3,gated,w4a16"):
        with pytest.raises(ValueError, match=r"no product|invalid literal"):
            parse_product(wrong, "float16")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        tune_linear.main([])


def test_the_tables_of_the_repository_can_be_read() -> None:
    for path in FOLDER.glob("*.json"):
        read = json.loads(path.read_text())
        assert LinearTable.from_json(read).to_json() == read
        assert load_table(read["device"]).readings
