"""Where the tensors of a safetensors checkpoint lie: a single file, or shards named by an index."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phalanx.errors import ModelError
from phalanx.models.config import DecoderConfig
from phalanx.models.encodings import ALL_ENCODINGS, PLAIN_ENCODINGS
from phalanx.models.families import expected_tensors, stored_name
from phalanx.models.hf_config import read_json
from phalanx.models.inventory import check_inventory
from phalanx.models.packed_entries import packed_entries
from phalanx.models.tensor_entry import TensorEntry

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

# Buffers that older exports stored among the weights; they follow from the configuration.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


def safetensors_entries(directory: Path, config: DecoderConfig) -> dict[str, TensorEntry]:
    """Every tensor that `config` needs, by canonical name, from `model.safetensors` or the shards of its index.

    A matrix that a quantiser has stored as several tensors is one entry with a `Packing`. A head stored beside a tied
    embedding, and stored rotary frequencies, are passed over as transformers does.
    Raises ModelError, naming file and tensor, for one that is missing, misshapen, duplicated, unexpected, of an
    unsupported dtype, or cut off by the end of its file, and for files that are missing or damaged.
    """
    wanted = expected_tensors(config)
    names = {stored_name(config.family, name): name for name in wanted}
    expected = {stored: wanted[name] for stored, name in names.items()}
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        entries = _merge([single])
    elif index.is_file():
        entries = _sharded(index)
    else:
        present = sorted(path.name for path in directory.glob("*.safetensors")) or sorted(
            path.name for path in directory.glob("*.bin")
        )
        beside = f"it holds {', '.join(present[:5])}" if present else "it holds no weights"
        raise ModelError(
            f"{directory}: no {SINGLE_FILE} and no {INDEX_FILE}; {beside}. Save the model with save_pretrained of"
            " transformers"
        )
    redundant = "lm_head." if config.tie_embeddings else "\0"
    entries = {
        name: entry for name, entry in entries.items() if not name.startswith(redundant) and not _HARMLESS.search(name)
    }
    if config.quantization is not None:
        entries = packed_entries(entries, expected, config.quantization)
    for name, entry in entries.items():
        if name in expected and entry.packing is None and entry.encoding not in PLAIN_ENCODINGS:
            raise ModelError(
                f"{entry.file}: tensor {name} has dtype {entry.encoding}; supported: {', '.join(PLAIN_ENCODINGS)}, and"
                " others where config.json has a quantization_config that describes them"
            )
    check_inventory(entries, expected, str(index if index.is_file() and not single.is_file() else single))
    return {names[stored]: entry for stored, entry in entries.items()}


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, by its own name; `encoding` is the file's name of the dtype.

    Format: https://huggingface.co/docs/safetensors: a header's length in 8 bytes (little-endian), the header in JSON,
    then the data. Raises ModelError, naming file and tensor, where it is missing or breaks the format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelError(
                    f"{path}: truncated or no safetensors file: it has {size} bytes and its header would take {length} "
                    f"(at most {_MAX_HEADER_BYTES}); copy or download it again"
                )
            header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _unique(pairs, path))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the safetensors header is not an object")
    entries = {name: _entry(path, name, about, 8 + length) for name, about in header.items() if name != "__metadata__"}
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset < end:
            raise ModelError(
                f"{path}: tensor {name} starts at byte {entry.offset}, inside of tensor {before}: the file is damaged"
            )
        end, before = entry.offset + entry.num_bytes, name
    if end > size:
        raise ModelError(
            f"{path}: truncated: tensor {before} ends at byte {end}, but the file has {size}; copy or download it again"
        )
    return entries


def _entry(path: Path, name: str, about: Any, data_start: int) -> TensorEntry:
    match about:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            entry = TensorEntry(str(path), data_start + start, stop - start, tuple(shape), dtype)
        case _:
            raise ModelError(
                f"{path}: tensor {name} is described as {str(about)[:200]}, not by dtype, shape and data_offsets"
            )
    encoding = ALL_ENCODINGS.get(dtype)
    if start < 0 or stop < start or (encoding is not None and encoding.num_bytes(entry.shape) != entry.num_bytes):
        raise ModelError(
            f"{path}: tensor {name}, {dtype} {shape}, cannot lie in bytes {start} to {stop} of the data: the file is"
            " damaged"
        )
    return entry


def _sharded(index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(f"{index}: weight_map is missing or does not map names of tensors to names of files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: the shard {shard!r} is not a safetensors file beside the index")
        if not (index.parent / shard).is_file():
            first = next(name for name, file in weight_map.items() if file == shard)
            raise ModelError(f"{index.parent / shard}: missing; the index says that it holds tensor {first}")
    entries = _merge(index.parent / shard for shard in shards)
    for name, shard in weight_map.items():
        if name not in entries:
            raise ModelError(
                f"{index.parent / shard}: tensor {name} is missing, though the index says that it is there"
            )
    return entries


def _merge(files: Iterable[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_safetensors_header(file).items():
            if name in entries:
                raise ModelError(f"{file}: tensor {name} is duplicated: it is also in {entries[name].file}")
            entries[name] = entry
    return entries


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ModelError(f"{path}: tensor {name} is duplicated in the header")
        unique[name] = value
    return unique
