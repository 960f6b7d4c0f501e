"""Checkpoints that `quantise_model` writes: what they stand for, what AWQ gains, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_decoder import LAYOUTS, SEQUENCES, WHOLE, errors, phalanx_logits
from tests.tiny_models import Reference, TinyModel, make
from typer.testing import CliRunner

from phalanx.cli import app
from phalanx.errors import ModelError
from phalanx.models.quantise_model import QuantiseOptions, quantise_model
from phalanx.models.resolve import ModelSource, resolve_model
from phalanx.models.safetensors_index import read_safetensors_header
from phalanx.models.safetensors_writer import SafetensorsWriter, TensorPlan

SHAPE = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
}
MODELS = {
    "llama": TinyModel("Llama", SHAPE, dtype=torch.bfloat16),
    "llama with biases": TinyModel("Llama", SHAPE | {"attention_bias": True, "mlp_bias": True}),
    "qwen3, tied": TinyModel("Qwen3", SHAPE | {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": TinyModel(
        "Mixtral", SHAPE | {"intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2}
    ),
}
TEXT = " ".join(f"{number} times {number} is {number * number};" for number in range(30))
AWQ = QuantiseOptions("int4", text=TEXT)
NEAREST = QuantiseOptions("int4", awq=False)

Plain = Callable[[str], Path]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    @cache
    def model(name: str) -> Path:
        """Some input channels are much larger than others, as in models that have been trained."""
        directory = make(MODELS[name], tmp_path_factory.mktemp("plain"))
        tensors = load_file(directory / "model.safetensors")
        for norm, tensor in tensors.items():
            if norm.endswith("layernorm.weight"):
                tensor[::13] *= 12
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return model


class Written(NamedTuple):
    source: ModelSource
    tensors: dict[str, torch.Tensor]
    alphas: list[float]


def write(plain: Path, options: QuantiseOptions, directory: Path) -> Written:
    made = quantise_model(resolve_model(str(plain)), directory, options)
    tensors = load_file(directory / "model.safetensors")
    return Written(resolve_model(str(directory)), tensors, [each.alpha for each in made.found.values()])


def stands_for(written: Written, directory: Path) -> Path:
    """A plain model of the numbers that the tensors mean, by the published format."""
    config = json.loads((Path(written.source.location) / "config.json").read_text())
    bits = config.pop("quantization_config")["config_groups"]["group_0"]["weights"]["num_bits"]
    exact = {}
    for name, tensor in written.tensors.items():
        module, _, part = name.rpartition(".")
        scale = written.tensors.get(f"{module}.weight_scale")
        if part == "weight_packed":
            rows, columns = written.tensors[f"{module}.weight_shape"].tolist()
            q = unpacked(tensor, bits)[:, :columns]
            zeros = np.full((rows, 1), 1 << (bits - 1))
            if f"{module}.weight_zero_point" in written.tensors:
                zeros = unpacked(written.tensors[f"{module}.weight_zero_point"].t(), bits)[:, :rows].T
            of_groups = (torch.from_numpy(each) for each in (q.reshape(rows, zeros.shape[1], -1), zeros[:, :, None]))
            values = torch.sub(*of_groups).double() * scale.double().unsqueeze(-1)  # type: ignore[union-attr]
            exact[f"{module}.weight"] = values.view(rows, columns).float()
        elif part == "weight":
            exact[name] = tensor.float() if scale is None else (tensor.double() * scale.double()).float()
        elif part == "bias":
            exact[name] = tensor.float()
    directory.mkdir()
    save_file(exact, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    shutil.copyfile(Path(written.source.location) / "tokenizer.json", directory / "tokenizer.json")
    return directory


def unpacked(words: torch.Tensor, bits: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    shifts = np.arange(0, 32, bits)
    values = words.numpy().astype(np.uint32)[:, :, None] >> shifts & ((1 << bits) - 1)
    return values.astype(np.int64).reshape(len(words), -1)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", AWQ),
        ("llama", QuantiseOptions("int8")),
        ("llama with biases", AWQ._replace(group_size=16)),
        ("qwen3, tied", QuantiseOptions("fp8")),
        ("mixtral", NEAREST),
    ],
)
def test_every_layout_computes_what_the_written_numbers_stand_for(
    plain: Plain, model: str, options: QuantiseOptions, tmp_path: Path
) -> None:
    written = write(plain(model), options, tmp_path / "model")
    network = Reference(stands_for(written, tmp_path / "exact"))
    expected = [network.logits(sequence) for sequence in SEQUENCES]
    for layout in ("1x1", "tensor-3", "pipeline-2"):
        found = phalanx_logits(written.source, LAYOUTS[layout], WHOLE, quantization="stored")
        error = errors(found, expected)
        assert error.largest < 1e-4 * error.scale, layout
        tokens = [logits.argmax(-1).tolist() for logits in found]
        assert tokens == [logits.argmax(-1).tolist() for logits in expected], layout


def loss(plain: Path, options: QuantiseOptions, directory: Path) -> tuple[float, Written]:
    """Mean error of the logits, of what the model is before."""
    written = write(plain, options, directory)
    found, expected = (
        phalanx_logits(source, LAYOUTS["1x1"], WHOLE) for source in (written.source, resolve_model(str(plain)))
    )
    return errors(found, expected).mean, written


def test_awq_loses_less_than_rounding_to_nearest(plain: Plain, tmp_path: Path) -> None:
    directory = plain("llama")
    nearest, _ = loss(directory, NEAREST, tmp_path / "nearest")
    scaled, written = loss(directory, AWQ, tmp_path / "awq")
    assert scaled < 0.85 * nearest
    assert max(written.alphas) > 0


@pytest.mark.parametrize("model", ["llama with biases", "qwen3, tied"])
def test_scales_change_nothing_but_the_rounding(plain: Plain, model: str, tmp_path: Path) -> None:
    """In 8 bits little is rounded: what is not folded as it should be would stand out."""
    nearest, _ = loss(plain(model), QuantiseOptions("int8"), tmp_path / "nearest")
    scaled, written = loss(plain(model), QuantiseOptions("int8", awq=True, text=TEXT), tmp_path / "scaled")
    assert scaled < 1.2 * nearest
    assert sorted(written.alphas)[len(written.alphas) // 2] > 0


def test_what_is_not_quantised_stays_as_it_is(plain: Plain, tmp_path: Path) -> None:
    directory = plain("llama")
    written = write(directory, NEAREST, tmp_path / "model").tensors
    for name, tensor in load_file(directory / "model.safetensors").items():
        assert name.endswith("_proj.weight") or torch.equal(written[name], tensor)
    before = json.loads((directory / "config.json").read_text())
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before


def test_several_files_have_an_index(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6 * rows).view(rows, 6) for name, rows in (("a", 4), ("b", 3), ("c", 9))}
    plan = {name: TensorPlan("I64", tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path, plan, file_bytes=400) as writer:
        for name in "cab":
            writer.put(name, tensors[name])
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) == 2
    for name, file in places.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
        assert name in read_safetensors_header(tmp_path / file)


def quantize(config: Path, *arguments: object) -> str:
    """The complaint."""
    result = CliRunner().invoke(app, ["quantize", str(config), *map(str, arguments)])
    assert result.exit_code
    return f"{result.exception} {result.stderr}"


def test_what_cannot_be_done_is_said_with_a_remedy(
    plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {plain('llama')}\n")
    new = tmp_path / "new"
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not an empty directory; give --to a new one" in quantize(config, "--to", tmp_path / "full")
    assert "sizes that do: 8, 16, 32" in quantize(config, "--to", new, "--group-size", 64)
    assert "--group-size is of int4" in quantize(config, "--to", new, "--scheme", "fp8", "--group-size", 32)
    short = ("--calibration", tmp_path / "short.txt")
    assert "has 10 tokens" in quantize(config, "--to", new, *short)
    assert "read by AWQ only" in quantize(config, "--to", new, "--no-awq", *short)
    assert "cannot be read" in quantize(config, "--to", new, "--calibration", tmp_path / "none.txt")
    experts = f"model.path={plain('mixtral')}"
    assert "quantise it with --no-awq" in quantize(config, "--to", new, "--set", experts)
    assert "can be checked, not run" in quantize(config, "--to", new, "--set", "model.path=shape:llama-3.1-8b")
    quantise_model(resolve_model(str(plain("llama"))), tmp_path / "done", NEAREST)
    done = f"model.path={tmp_path / 'done'}"
    assert "quantised already, by compressed" in quantize(config, "--to", new, "--set", done)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "0.00 GB free; make room" in quantize(config, "--to", new)
    assert not new.exists()


def test_what_breaks_off_leaves_nothing(plain: Plain, tmp_path: Path) -> None:
    def full_disk(done: int, _: int) -> None:
        if done == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space left on device"):
        quantise_model(resolve_model(str(plain("llama"))), tmp_path / "model", NEAREST, full_disk)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled(plain: Plain, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {plain('llama')}\n")
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["quantize", str(config), "--to", str(tmp_path / "empty"), "--scheme", "int8"])
    assert result.exit_code == 0
    assert f"--set model.path={tmp_path / 'empty'}" in result.stdout
    assert resolve_model(str(tmp_path / "empty")).tokenizer().encode("a b")
