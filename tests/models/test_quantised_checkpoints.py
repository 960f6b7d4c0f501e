"""Checkpoints that a quantiser has written: what they stand for, in every layout, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_decoder import LAYOUTS, SEQUENCES, WHOLE, errors, phalanx_logits
from tests.quantised_checkpoints import FORMS, quantise_model
from tests.tiny_models import TINY_MODELS, Reference, TinyModel, make

from phalanx.kernels import choose_packing
from phalanx.models.resolve import ModelSource, resolve_model

CPU = torch.device("cpu")
TINY = TinyModel(
    "Llama",
    {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
    },
)


class Model(NamedTuple):
    """A quantised model, what it stands for, and the logits of that by transformers in float32."""

    source: ModelSource
    exact: ModelSource
    logits: list[torch.Tensor]


Models = Callable[[str], Model]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    plain = make(TINY, tmp_path_factory.mktemp("plain"))

    @cache
    def model(name: str) -> Model:
        directory = tmp_path_factory.mktemp("quantised") / "model"
        exact = quantise_model(plain, FORMS[name], directory)
        network = Reference(exact)
        logits = [network.logits(sequence) for sequence in SEQUENCES]
        return Model(resolve_model(str(directory)), resolve_model(str(exact)), logits)

    return model


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_that_transformers_has_of_what_the_checkpoint_stands_for(models: Models, name: str) -> None:
    model = models(name)
    for layout, quantization in (
        ("1x1", "stored"),
        ("tensor-2", "stored"),
        ("tensor-3", "stored"),
        ("pipeline-2", "stored"),
        ("weights-2-1", "none"),
    ):
        found = phalanx_logits(model.source, LAYOUTS[layout], WHOLE, quantization=quantization)
        error = errors(found, model.logits)
        assert error.largest < 1e-4 * error.scale, layout


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "fp8 blocks", "compressed W8A16"])
def test_native_products_err_no_more_than_those_of_plain_weights(models: Models, name: str) -> None:
    if not choose_packing(torch.bfloat16, CPU).usable:
        pytest.skip("needs the native library and AVX2")
    model = models(name)
    plain = errors(phalanx_logits(model.exact, LAYOUTS["1x1"], WHOLE, torch.bfloat16), model.logits)
    for layout in ("1x1", "tensor-3"):
        found = phalanx_logits(model.source, LAYOUTS[layout], WHOLE, torch.bfloat16, quantization="stored")
        assert errors(found, model.logits).mean < 1.2 * plain.mean


@pytest.mark.parametrize("name", ["compressed W4A16 act-order", "fp8 blocks"])
def test_experts_load_as_they_are_stored(name: str, tmp_path: Path) -> None:
    """Each with an order of inputs of its own, and beside a router that is not quantised."""
    plain = make(TINY_MODELS["mixtral"], tmp_path / "plain")
    exact = quantise_model(plain, FORMS[name], tmp_path / "model")
    network = Reference(exact)
    expected = [network.logits(sequence) for sequence in SEQUENCES]
    found = phalanx_logits(resolve_model(str(tmp_path / "model")), LAYOUTS["tensor-2"], WHOLE, quantization="stored")
    error = errors(found, expected)
    assert error.largest < 1e-4 * error.scale


def test_a_product_of_matrices_that_are_stored_in_several_ways_is_held_plain(models: Models, tmp_path: Path) -> None:
    """Keys left out by the quantiser beside queries and values that are not."""
    model, directory = models("awq"), tmp_path / "model"
    stored = load_file(Path(model.source.location) / "model.safetensors")
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.k_proj"
        for part in ("qweight", "qzeros", "scales"):
            del stored[f"{module}.{part}"]
        stored[f"{module}.weight"] = load_file(Path(model.exact.location) / "model.safetensors")[f"{module}.weight"]
    directory.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (directory / file).write_bytes((Path(model.source.location) / file).read_bytes())
    save_file(stored, directory / "model.safetensors")
    found = phalanx_logits(resolve_model(str(directory)), LAYOUTS["tensor-2"], WHOLE, quantization="stored")
    error = errors(found, model.logits)
    assert error.largest < 1e-4 * error.scale


def test_a_quantised_checkpoint_can_be_quantised_once_more(models: Models) -> None:
    """Into groups of its own, not in the order of those that are stored."""
    model = models("gptq act-order")
    found, expected = (
        phalanx_logits(source, LAYOUTS["tensor-2"], WHOLE, quantization="int4")
        for source in (model.source, model.exact)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
