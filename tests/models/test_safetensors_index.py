"""Finding the tensors of safetensors checkpoints, and every way in which one can be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from phalanx.errors import ModelError
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.config import DecoderConfig
from phalanx.models.safetensors_index import read_safetensors_header, safetensors_entries

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.1.mlp.up_proj.weight"


def write_shards(directory: Path, shards: Mapping[str, Tensors]) -> None:
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def halves(tensors: Tensors) -> dict[str, Tensors]:
    names = list(tensors)
    first = {name: tensors[name] for name in names[: len(names) // 2]}
    second = {name: tensors[name] for name in names[len(names) // 2 :]}
    return {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}


def assert_same(directory: Path, config: DecoderConfig, tensors: Tensors) -> None:
    with Checkpoint(safetensors_entries(directory, config)) as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_a_single_file_holds_what_was_saved(tiny: DecoderConfig, tiny_tensors: Tensors, tiny_directory: Path) -> None:
    assert_same(tiny_directory, tiny, tiny_tensors)


def test_shards_hold_what_was_saved(tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path) -> None:
    write_shards(tmp_path, halves(tiny_tensors))
    assert_same(tmp_path, tiny, tiny_tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_stored(
    tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tiny_tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert_same(tmp_path, tiny, stored)


def test_a_head_beside_a_tied_embedding_and_stored_frequencies_are_passed_over(
    tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path
) -> None:
    save_file(
        tiny_tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, tmp_path / "model.safetensors"
    )
    entries = safetensors_entries(tmp_path, replace(tiny, tie_embeddings=True))
    assert set(entries) == set(tiny_tensors) - {"lm_head.weight"}


def test_a_missing_tensor_is_named(tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path) -> None:
    del tiny_tensors[NAME]
    save_file(tiny_tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"model\.safetensors: missing tensor {NAME}"):
        safetensors_entries(tmp_path, tiny)


def test_a_misshapen_tensor_is_named_with_both_shapes(
    tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path
) -> None:
    tiny_tensors[NAME] = torch.zeros(512, 255)
    save_file(tiny_tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"tensor {NAME} has shape \[512, 255\], .* \[512, 256\]"):
        safetensors_entries(tmp_path, tiny)


def test_an_unexpected_tensor_is_named(tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path) -> None:
    save_file(tiny_tensors | {"model.layers.0.mlp.router.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.0\.mlp\.router\.weight"):
        safetensors_entries(tmp_path, tiny)


def test_an_unsupported_dtype_is_named(tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path) -> None:
    tiny_tensors[NAME] = tiny_tensors[NAME].to(torch.float8_e4m3fn)
    save_file(tiny_tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"tensor {NAME} has dtype F8_E4M3; supported: F32, F16, BF16"):
        safetensors_entries(tmp_path, tiny)


def test_a_tensor_in_two_shards_is_named_with_both(tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path) -> None:
    shards = halves(tiny_tensors)
    shards["model-00001-of-00002.safetensors"][NAME] = tiny_tensors[NAME]
    write_shards(tmp_path, shards)
    with pytest.raises(ModelError, match=rf"00002-of-00002.safetensors: tensor {NAME} is duplicated.*00001-of-00002"):
        safetensors_entries(tmp_path, tiny)


def test_a_tensor_twice_in_one_header_is_named(tmp_path: Path) -> None:
    one = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    path = write_raw(tmp_path / "w.safetensors", f"{{{one},{one}}}".encode(), b"\0" * 4)
    with pytest.raises(ModelError, match=r"w\.safetensors: tensor w is duplicated"):
        read_safetensors_header(path)


def test_a_missing_shard_is_named_with_a_tensor_of_it(
    tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path
) -> None:
    write_shards(tmp_path, halves(tiny_tensors))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: missing; .* holds tensor model\."):
        safetensors_entries(tmp_path, tiny)


def test_a_tensor_that_only_the_index_knows_is_named(
    tiny: DecoderConfig, tiny_tensors: Tensors, tmp_path: Path
) -> None:
    write_shards(tmp_path, halves(tiny_tensors))
    del tiny_tensors[NAME]
    for file, tensors in halves(tiny_tensors).items():
        save_file(tensors, tmp_path / file)
    with pytest.raises(ModelError, match=rf"tensor {NAME} is missing, though the index"):
        safetensors_entries(tmp_path, tiny)


def test_an_index_cannot_lead_out_of_its_directory(tiny: DecoderConfig, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NAME: "../elsewhere/model.safetensors"}}))
    with pytest.raises(ModelError, match="not a safetensors file beside the index"):
        safetensors_entries(tmp_path, tiny)


def test_a_truncated_file_is_named_with_its_last_tensor(tiny: DecoderConfig, tiny_directory: Path) -> None:
    path = tiny_directory / "model.safetensors"
    last = max(read_safetensors_header(path).items(), key=lambda item: item[1].offset)[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ModelError, match=rf"model\.safetensors: truncated: tensor {last}"):
        safetensors_entries(tiny_directory, tiny)


@pytest.mark.parametrize("content", [b"", b"abc", (1 << 40).to_bytes(8, "little") + b"{}", b"\x05" + b"\0" * 7 + b"{}"])
def test_a_file_cut_inside_of_its_header_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.safetensors: truncated or no safetensors file"):
        read_safetensors_header(path)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "cannot lie in bytes 0 to 4"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "cannot lie"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "is described as"),
        ({"dtype": "F32", "shape": [1]}, "is described as"),
        (7, "is described as 7"),
    ],
)
def test_a_crooked_description_is_named(tmp_path: Path, about: Any, message: str) -> None:
    path = write_raw(tmp_path / "w.safetensors", {"w": about}, b"\0" * 8)
    with pytest.raises(ModelError, match=rf"w\.safetensors: tensor w.*{message}"):
        read_safetensors_header(path)


def test_overlapping_tensors_are_named(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    with pytest.raises(ModelError, match=r"tensor b starts at byte .* inside of tensor a"):
        read_safetensors_header(write_raw(tmp_path / "w.safetensors", header, b"\0" * 12))


def test_a_header_that_is_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not valid JSON"):
        read_safetensors_header(write_raw(tmp_path / "w.safetensors", b"{nonsense"))


def test_a_directory_without_weights_says_what_it_holds(tiny: DecoderConfig, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no model\.safetensors .*holds pytorch_model\.bin.*save_pretrained"):
        safetensors_entries(tmp_path, tiny)
