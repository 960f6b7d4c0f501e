"""From a plain checkpoint to a quantised one on disk: read, scaled, rounded and written layer by layer."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from phalanx.errors import ModelError
from phalanx.kernels import quantise
from phalanx.models.awq import ActivationAware, Scaled, Weights
from phalanx.models.calibration import calibration_windows, default_text
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.compressed_tensors import SavedForm, saved_form
from phalanx.models.config import DecoderConfig
from phalanx.models.families import stored_name
from phalanx.models.hf_export import write_model_files
from phalanx.models.params import Param, rank_params
from phalanx.models.resolve import ModelSource
from phalanx.models.safetensors_writer import SafetensorsWriter, TensorPlan, encoding_of
from phalanx.models.scheme import OCTET
from phalanx.models.weights import load_params
from phalanx.parallel.layout import StageRequest, build_layout

DEFAULT_GROUP_SIZE = 32

_CPU = torch.device("cpu")


class QuantiseOptions(NamedTuple):
    """scheme: one of `SAVED_SCHEMES`. group_size: inputs that share a scale, of int4; None for 32. awq: None for int4
    only. text: to measure activations on for it; None for `default_text`.
    """

    scheme: str = "int4"
    group_size: int | None = None
    awq: bool | None = None
    text: str | None = None

    @property
    def scales_inputs(self) -> bool:
        return self.scheme == "int4" if self.awq is None else self.awq


@dataclass(frozen=True, slots=True)
class Quantised:
    """What was written. num_bytes, plain_bytes: of the tensors, and of those of the model in its own dtype. found: of
    AWQ's search, by the names of `models/params.py`; empty without.
    """

    num_bytes: int
    plain_bytes: int
    found: Mapping[str, Scaled]

    @property
    def error_share(self) -> float:
        """Of what blocks err by without scales, on the calibration text: the geometric mean over the matrices."""
        shares = [each.error / each.plain_error for each in self.found.values() if each.plain_error > 0]
        return math.exp(sum(math.log(max(share, 1e-30)) for share in shares) / max(1, len(shares)))


def quantise_model(
    source: ModelSource,
    directory: Path,
    options: QuantiseOptions,
    on_layer: Callable[[int, int], None] | None = None,
) -> Quantised:
    """Writes a directory in compressed-tensors' format, which appears once it is whole. A GGUF file's blocks are
    dequantised first. Embedding, head, norms and routers stay in the model's dtype.

    on_layer: hears how many layers of how many are done. Holds a layer in float32, its candidates and what calibration
    computes. Raises ModelError, naming cause and remedy, before anything is written where it can.
    """
    directory, config = directory.expanduser().absolute(), source.config
    dtype = getattr(torch, config.dtype)
    form = _checked_form(source, directory, options, dtype)
    layout = build_layout(config.shape, [StageRequest()])
    [place] = layout.places()
    params = rank_params(config, layout, place)
    plan = {
        name: tensor
        for param in params
        for _, _, module, shape in _tensors(param, config)
        for name, tensor in _planned(param, module, shape, form, config).items()
    }
    num_bytes = sum(tensor.num_bytes for tensor in plan.values())
    _check_room(directory, num_bytes)
    tokenizer = source.tokenizer()
    tokens: torch.Tensor | None = None
    if options.scales_inputs:
        text = default_text() if options.text is None else options.text
        tokens = calibration_windows(text, tokenizer, config.max_position)
    entries = source.entries()
    found: dict[str, Scaled] = {}
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
            made = Path(scratch) / "model"
            made.mkdir()
            with Checkpoint(entries) as checkpoint, SafetensorsWriter(made, plan) as writer, torch.inference_mode():
                ends = [param for param in params if not _in_layers(param)]
                embedding = _write_ends(ends, checkpoint, dtype, config, writer)
                aware = None
                if tokens is not None:
                    aware = ActivationAware(config, tokens, embedding, form.held, dtype)
                del embedding
                for layer in range(config.shape.num_layers):
                    of_layer = [param for param in params if param.name.startswith(f"layers.{layer}.")]
                    weights: Weights = load_params(of_layer, checkpoint, torch.float32, _CPU)
                    scaled = {} if aware is None else aware.pass_layer(layer, weights)
                    found |= scaled
                    for param in of_layer:
                        importance = scaled[param.name].importance if param.name in scaled else None
                        _write(param, weights.pop(param.name), form, importance, config, writer)
                    if on_layer is not None:
                        on_layer(layer + 1, config.shape.num_layers)
            write_model_files(source, tokenizer, made, form.config(_ignored(config)))
            made.replace(directory)
    except OSError as error:
        raise ModelError(
            f"{directory}: cannot be written ({error.strerror or error}); give --to a place that can be, with"
            f" {num_bytes / 1e9:.2f} GB free"
        ) from error
    plain_bytes = sum(param.num_elements for param in params) * dtype.itemsize
    return Quantised(num_bytes, plain_bytes, found)


def _checked_form(source: ModelSource, directory: Path, options: QuantiseOptions, dtype: torch.dtype) -> SavedForm:
    config = source.config
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ModelError(f"{directory}: exists and is not an empty directory; give --to a new one, or remove it")
    if config.quantization is not None:
        raise ModelError(
            f"{source.location}: is quantised already, by {config.quantization.method}: rounding it again would lose"
            " more; take the model that it was made of"
        )
    if options.scales_inputs and config.shape.num_experts:
        raise ModelError(
            f"{source.location}: AWQ is not there for mixtures of experts ({config.family}); quantise it with --no-awq,"
            " which rounds to nearest"
        )
    if options.group_size is not None and options.scheme != "int4":
        raise ModelError(f"--group-size is of int4; {options.scheme} has a scale an output: leave it out")
    size = options.group_size or DEFAULT_GROUP_SIZE
    if options.scheme == "int4":
        shape = config.shape
        inputs = {
            "hidden_size": shape.hidden_size,
            "attention heads * head_dim": shape.num_query_heads * shape.head_dim,
            "columns of the feed-forward": shape.ffn_size,
        }
        wrong = next((f"{width}, {what}," for what, width in inputs.items() if width % size or size % OCTET), None)
        if wrong is not None:
            common = math.gcd(*inputs.values())
            fitting = [each for each in range(OCTET, min(common, 512) + 1, OCTET) if common % each == 0]
            remedy = f"sizes that do: {', '.join(map(str, fitting))}" if fitting else "take --scheme int8"
            raise ModelError(
                f"--group-size {size}: does not divide {wrong} in whole groups of a multiple of {OCTET}; {remedy}"
            )
    return saved_form(options.scheme, size, dtype)


def _check_room(directory: Path, num_bytes: int) -> None:
    place = next(place for place in (directory, *directory.parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ModelError(
            f"{directory}: the quantised model takes {num_bytes / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB"
            " free; make room, or give --to another disk"
        )


def _in_layers(param: Param) -> bool:
    return param.name.startswith("layers.")


def _ignored(config: DecoderConfig) -> list[str]:
    """Linear modules that stay as they are."""
    if not config.shape.num_experts:
        return ["lm_head"]
    gate = stored_name(config.family, "model.layers.0.mlp.gate").rpartition(".layers.0.")[2]
    return ["lm_head", "re:.*" + gate.replace(".", r"\.") + "$"]


def _tensors(param: Param, config: DecoderConfig) -> Iterator[tuple[int, int, str, tuple[int, ...]]]:
    """Of a parameter: the matrix and its row where each of its tensors begins, its name in the file, and its shape."""
    for number, pieces in enumerate(param.matrices):
        row = 0
        for piece in pieces:
            yield number, row, stored_name(config.family, piece.tensor), piece.shape
            row += piece.shape[0]


def _planned(
    param: Param, name: str, shape: tuple[int, ...], form: SavedForm, config: DecoderConfig
) -> dict[str, TensorPlan]:
    if not (_in_layers(param) and param.quantisable):
        return {name: TensorPlan(encoding_of(getattr(torch, config.dtype)), shape)}
    module = name.removesuffix("weight")
    return {module + suffix: tensor for suffix, tensor in form.plan(shape[0], shape[1]).items()}


def _write_ends(
    params: list[Param], checkpoint: Checkpoint, dtype: torch.dtype, config: DecoderConfig, writer: SafetensorsWriter
) -> torch.Tensor:
    """What is not in a layer, one after the other. Returns the embedding."""
    embedding = torch.empty(0)
    for param in params:
        [tensor] = load_params([param], checkpoint, dtype, _CPU).values()
        for _, _, name, _ in _tensors(param, config):
            writer.put(name, tensor)
        if param.name == "embed":
            embedding = tensor
    return embedding


def _write(
    param: Param,
    values: torch.Tensor,
    form: SavedForm,
    importance: torch.Tensor | None,
    config: DecoderConfig,
    writer: SafetensorsWriter,
) -> None:
    """values: of a parameter of a layer, in float32."""
    matrices = values if param.num_experts else values.unsqueeze(0)
    for number, row, name, shape in _tensors(param, config):
        part = matrices[number, row : row + shape[0]]
        if not param.quantisable:
            writer.put(name, part.to(getattr(torch, config.dtype)))
            continue
        for suffix, tensor in form.pack(quantise(part, form.held, importance)).items():
            writer.put(name.removesuffix("weight") + suffix, tensor)
