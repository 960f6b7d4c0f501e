"""Tiny checkpoints, written by the libraries that define the formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.families import expected_tensors
from phalanx.parallel.shape import ModelShape

Array = npt.NDArray[Any]
WriteGguf = Callable[..., Path]

TINY = DecoderConfig(
    family="llama",
    shape=ModelShape(
        hidden_size=256, num_layers=2, num_query_heads=8, num_kv_heads=4, head_dim=32, ffn_size=512, vocab_size=320
    ),
    max_position=128,
    norm_eps=1e-5,
    rope=RopeConfig(),
    dtype="float32",
)


@pytest.fixture
def tiny() -> DecoderConfig:
    return TINY


@pytest.fixture
def tiny_tensors(tiny: DecoderConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_tensors(tiny).items()}


@pytest.fixture
def tiny_directory(tmp_path: Path, tiny_tensors: dict[str, torch.Tensor]) -> Path:
    """A directory whose `model.safetensors` holds `tiny_tensors`."""
    save_file(tiny_tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """Writes a GGUF file with gguf's own writer.

    tensors: by GGUF name: float32 arrays, stored as `encoding` where they are matrices; or (blocks, encoding), stored
    as they are. metadata: str, bool, int (uint32), float (float32) or list.
    """

    def write(
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Array | tuple[Array, str]],
        encoding: str = "F32",
        arch: str = "llama",
        name: str = "model.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        for key, value in metadata.items():
            match value:
                case _ if key == "general.alignment":
                    writer.add_custom_alignment(value)  # the writer lays the data out by it
                case bool():
                    writer.add_bool(key, value)
                case str():
                    writer.add_string(key, value)
                case int():
                    writer.add_uint32(key, value)
                case float():
                    writer.add_float32(key, value)
                case _:
                    writer.add_array(key, value)
        for tensor, values in tensors.items():
            if isinstance(values, tuple):
                kind = gguf.GGMLQuantizationType[values[1]]
                writer.add_tensor(tensor, values[0], raw_dtype=kind)
            else:
                kind = gguf.GGMLQuantizationType[encoding if values.ndim == 2 else "F32"]
                writer.add_tensor(tensor, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def llama_metadata(config: DecoderConfig, arch: str = "llama") -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a model like `config`, tokenizer left out."""
    shape = config.shape
    return {
        f"{arch}.block_count": shape.num_layers,
        f"{arch}.context_length": config.max_position,
        f"{arch}.embedding_length": shape.hidden_size,
        f"{arch}.feed_forward_length": shape.ffn_size,
        f"{arch}.attention.head_count": shape.num_query_heads,
        f"{arch}.attention.head_count_kv": shape.num_kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.dimension_count": shape.head_dim,
        f"{arch}.rope.freq_base": config.rope.theta,
        f"{arch}.vocab_size": shape.vocab_size,
    }


def interleave(weight: Array, num_heads: int) -> Array:
    """What llama.cpp's converter does to the query and key rows of a Llama."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def llama_tensors(tensors: Mapping[str, torch.Tensor], config: DecoderConfig) -> dict[str, Array]:
    """A Llama's tensors as its GGUF file has them: gguf's names, query and key rows interleaved."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.shape.num_layers)
    converted = {}
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if ".q_proj." in name:
            values = interleave(values, config.shape.num_query_heads)
        if ".k_proj." in name:
            values = interleave(values, config.shape.num_kv_heads)
        converted[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return converted


@pytest.fixture
def tiny_gguf_metadata(tiny: DecoderConfig) -> dict[str, Any]:
    return llama_metadata(tiny)


@pytest.fixture
def tiny_gguf_tensors(tiny: DecoderConfig, tiny_tensors: dict[str, torch.Tensor]) -> dict[str, Array]:
    return llama_tensors(tiny_tensors, tiny)
