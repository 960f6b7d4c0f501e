"""The writing of a safetensors checkpoint, tensor by tensor, none of which is held."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

from phalanx.models.checkpoint import DTYPES
from phalanx.models.encodings import ALL_ENCODINGS
from phalanx.models.safetensors_index import INDEX_FILE, SINGLE_FILE

_ENCODING_OF = {dtype: encoding for encoding, dtype in DTYPES.items()}


def encoding_of(dtype: torch.dtype) -> str:
    """The name that safetensors has for it."""
    return _ENCODING_OF[dtype]


class TensorPlan(NamedTuple):
    """encoding: safetensors' name of the dtype."""

    encoding: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return ALL_ENCODINGS[self.encoding].num_bytes(self.shape)


class SafetensorsWriter:
    """One file, or several and their index where it would be longer than `file_bytes`: all tensors are planned first,
    then each is `put` in any order. OSError where a file cannot be written; ValueError for a tensor that is not as
    planned, and on leaving a `with` for any that is missing.

    Format: https://huggingface.co/docs/safetensors.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, TensorPlan], file_bytes: int = 5_000_000_000) -> None:
        self._tensors = dict(tensors)
        self._left = set(tensors)
        self._places: dict[str, tuple[Path, int]] = {}
        files: list[list[str]] = [[]]
        size = 0
        for name, tensor in tensors.items():
            if files[-1] and size + tensor.num_bytes > file_bytes:
                files.append([])
                size = 0
            files[-1].append(name)
            size += tensor.num_bytes
        self._closes = ExitStack()
        self._files = {}
        for number, names in enumerate(files, start=1):
            several = f"model-{number:05}-of-{len(files):05}.safetensors"
            path = directory / (SINGLE_FILE if len(files) == 1 else several)
            # Closed with the writer.
            self._files[path] = self._closes.enter_context(path.open("wb"))
            self._write_header(path, names)
        if len(files) > 1:
            total = sum(tensor.num_bytes for tensor in tensors.values())
            weight_map = {name: path.name for name, (path, _) in self._places.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")

    def _write_header(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, offset = {}, 0
        for name in names:
            tensor = self._tensors[name]
            offsets[name] = offset
            stop = offset + tensor.num_bytes
            header[name] = {"dtype": tensor.encoding, "shape": tensor.shape, "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._files[path].write(len(text).to_bytes(8, "little") + text)
        self._files[path].truncate(8 + len(text) + offset)
        self._places |= {name: (path, 8 + len(text) + start) for name, start in offsets.items()}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        planned = self._tensors[name]
        if tuple(tensor.shape) != planned.shape or DTYPES[planned.encoding] != tensor.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {planned} as planned")
        path, offset = self._places[name]
        self._files[path].seek(offset)
        self._files[path].write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._left.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closes.close()
        if error is None and self._left:
            raise ValueError(f"{len(self._left)} tensors were not written, such as {min(self._left)}")
