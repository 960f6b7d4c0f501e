"""Checks of checkpoints that a quantiser has written, and runs of them in several layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantised_checkpoints import FORMS, quantise_model
from tests.tiny_models import TinyModel, make

from phalanx import LLM, SamplingParams
from phalanx.kernels import QuantisedWeight
from phalanx.launcher.check import CheckReport, check
from phalanx.launcher.machine import Gpu, Machine
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.params import rank_params
from phalanx.models.resolve import resolve_model
from phalanx.models.weights import load_params

LAPTOP = Machine(num_cores=2, memory_bytes=2**33, free_bytes=2**33, bfloat16=True)
CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(TinyModel("Llama", SHAPE), tmp_path_factory.mktemp("plain"))


@pytest.fixture
def quantised(plain: Path, tmp_path: Path) -> Any:
    def quantise(name: str) -> Path:
        quantise_model(plain, FORMS[name], tmp_path / "model")
        return tmp_path / "model"

    return quantise


def checked(directory: Path, machine: Machine = LAPTOP, quantization: str = "auto", **parallel: Any) -> CheckReport:
    model = {"path": str(directory), "quantization": quantization}
    return check({"model": model, "parallel": parallel, "engine": {"kv_cache": "16MiB"}}, machine=machine)


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "fp8 blocks", "compressed W8A8"])
@pytest.mark.parametrize("tensor", [1, 3])
def test_a_check_counts_what_ranks_hold(quantised: Any, name: str, tensor: int) -> None:
    directory = quantised(name)
    report = checked(directory, tensor=tensor)
    assert report.ok
    assert report.plan is not None
    assert report.plan.quantization == "stored"
    source = resolve_model(str(directory))
    for place, rank in zip(report.plan.layout.places(), report.plan.ranks, strict=True):
        params = rank_params(source.config, report.plan.layout, place)
        with Checkpoint(source.entries()) as checkpoint:
            loaded = load_params(params, checkpoint, torch.float32, CPU, quantization="stored")
        weights = [weight for weight in loaded.values() if isinstance(weight, QuantisedWeight)]
        assert len(weights) == 4 * SHAPE["num_hidden_layers"]
        held = sum(weight.format.num_bytes(weight.shape[0], weight.num_held) for weight in weights)
        plain = sum(weight.numel() * 2 for weight in loaded.values() if isinstance(weight, torch.Tensor))
        room = 0.1 if "act-order" in name and tensor > 1 else 0  # what scattered groups take is an estimate
        assert rank.weight_bytes == pytest.approx(plain + held, rel=room, abs=0)


def test_a_check_says_what_cuts_in_groups_cost(quantised: Any) -> None:
    directory = quantised("awq")
    assert not [each for each in checked(directory, tensor=2).decisions if each.name == "cuts in groups"]
    report = checked(directory, tensor=3)
    (cost,) = [each for each in report.decisions if each.name == "cuts in groups"]
    rows = report.to_json()["layout"]
    assert sum(row["cut_bytes"] for row in rows) > 0
    assert "of the weights: scales held twice" in cost.reason


def test_what_is_wrong_with_a_checkpoint_is_found_before_anything_is_started(quantised: Any) -> None:
    directory = quantised("awq")
    stored = load_file(directory / "model.safetensors")
    del stored["model.layers.1.mlp.down_proj.scales"]
    save_file(stored, directory / "model.safetensors")
    report = checked(directory)
    assert report.exit_code == 3
    assert "tensor model.layers.1.mlp.down_proj.scales is missing" in report.errors[0].message
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (directory / "config.json").write_text(json.dumps(config))
    assert "bits is 3; supported: 4" in checked(directory).errors[0].message


def test_a_gpu_holds_it_as_it_is_stored_too(quantised: Any) -> None:
    directory = quantised("awq")
    machine = Machine(2, 2**33, 2**33, bfloat16=True, gpus=(Gpu("H100", 80 * 2**30),))
    report = checked(directory, machine)
    assert report.plan is not None
    assert report.plan.quantization == "stored"
    assert "as awq has stored them" in next(each.reason for each in report.decisions if each.name == "quantization")
    asked = checked(directory, machine, "none")
    assert asked.plan is not None
    assert asked.plan.quantization == "none"
    assert asked.plan.ranks[0].weight_bytes > report.plan.ranks[0].weight_bytes


def test_a_shape_is_counted_as_its_config_says(quantised: Any, tmp_path: Path) -> None:
    directory = quantised("awq")
    (tmp_path / "shape.json").write_bytes((directory / "config.json").read_bytes())
    known, shape = checked(directory).plan, checked(tmp_path / "shape.json").plan
    assert known is not None
    assert shape is not None
    assert shape.ranks[0].weight_bytes == known.ranks[0].weight_bytes


def test_tokens_are_the_same_in_every_layout(quantised: Any) -> None:
    """Of real processes, by native products where there are any."""
    directory = quantised("gptq act-order")
    found = []
    for parallel in ({}, {"tensor": 2}, {"tensor": 3}, {"pipeline": 2}):
        with LLM(
            model={"path": str(directory), "dtype": "float32"},
            cluster={"ray": "none", "device": "cpu"},
            parallel=parallel,
            engine={"kv_cache": "1MiB"},
        ) as llm:
            (output,) = llm.generate([[5, 77, 200, 31]], SamplingParams(max_tokens=12, temperature=0.0))
            found.append(list(output.token_ids))
    assert found[1:] == found[:1] * 3
