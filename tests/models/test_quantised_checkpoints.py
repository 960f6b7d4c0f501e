"""Checkpoints that a quantiser has written: what they stand for, in every layout, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from tests.models.test_decoder import LAYOUTS, SEQUENCES, WHOLE, errors, phalanx_logits
from tests.quantised_checkpoints import FORMS, quantise_model
from tests.tiny_models import Reference, TinyModel, make

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
