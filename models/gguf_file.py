"""The header of a GGUF file: metadata, and where each tensor lies.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Read here and not by
gguf's `GGUFReader`, which takes seconds over a vocabulary of fifty thousand tokens; this takes hundredths of one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phalanx.errors import ModelError

_MAGIC = b"GGUF"
_MAX_ENTRIES = 1 << 20  # of metadata, and of tensors
_MAX_DIMENSIONS = 4

_STRING, _ARRAY = 8, 9
_SCALARS = {code: struct.Struct("<" + letter) for code, letter in enumerate("BbHhIif?")} | {
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class GgufTensor(NamedTuple):
    """shape: outermost dimension first. type_id: ggml's number of the encoding. offset: in bytes, from the start of the
    file.
    """

    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array among the metadata, kept as stored until `tolist`: vocabularies are long and seldom needed."""

    type_id: int
    count: int
    raw: bytes

    def tolist(self) -> list[Any]:
        """Strings as str (undecodable bytes as U+FFFD), numbers as int, float or bool."""
        if self.type_id != _STRING:
            letter = _SCALARS[self.type_id].format
            return list(np.frombuffer(self.raw, np.dtype(letter)).tolist())
        strings, at = [], 0
        for _ in range(self.count):
            start = at + 8
            at = start + _U64.unpack_from(self.raw, at)[0]
            strings.append(self.raw[start:at].decode("utf-8", "replace"))
        return strings


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A parsed header. path: of the file. metadata: by key; arrays as `GgufArray`. tensors: by the file's own names."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def array(self, key: str) -> list[Any] | None:
        """The array under `key`, or None where there is none."""
        value = self.metadata.get(key)
        return value.tolist() if isinstance(value, GgufArray) else None


def read_gguf(path: Path) -> GgufFile:
    """Parses the header of a GGUF file; tensor data is not touched.

    Raises ModelError, naming the file, where it is missing, is no GGUF file, is of a version or kind that is not
    supported, or ends too early.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ModelError(f"{path}: not a GGUF file: it does not start with {_MAGIC!r}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(data, path).parse()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except (struct.error, IndexError) as error:
        raise ModelError(f"{path}: truncated: the file ends inside of its header; copy or download it again") from error


class _Parser:
    """Walks over the header once. Reading past the end raises struct.error or IndexError."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = len(_MAGIC)

    def parse(self) -> GgufFile:
        version = self._unpack(_U32)
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            found = "big-endian" if swapped else f"of version {version}"
            raise ModelError(f"{self._path}: the GGUF file is {found}; supported: versions 2 and 3, little-endian")
        num_tensors, num_keys = self._count("tensors"), self._count("keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise ModelError(f"{self._path}: the key {key} appears twice")
            metadata[key] = self._value(self._unpack(_U32), key)
        tensors: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name, tensor = self._tensor()
            if name in tensors:
                raise ModelError(f"{self._path}: tensor {name} appears twice")
            tensors[name] = tensor
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{self._path}: general.alignment is {alignment!r}; it must be at least 1")
        start = -(-self._at // alignment) * alignment
        return GgufFile(
            self._path, metadata, {name: t._replace(offset=start + t.offset) for name, t in tensors.items()}
        )

    def _unpack(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self._data, self._at)
        self._at += kind.size
        return value

    def _take(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if end > len(self._data):
            raise IndexError(end)
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _string(self) -> str:
        return self._take(self._unpack(_U64)).decode("utf-8", "replace")

    def _count(self, what: str) -> int:
        count: int = self._unpack(_U64)
        if count > _MAX_ENTRIES:
            raise ModelError(
                f"{self._path}: the header tells of {count} {what}, more than {_MAX_ENTRIES}: it is damaged"
            )
        return count

    def _value(self, type_id: int, key: str) -> Any:
        if type_id in _SCALARS:
            return self._unpack(_SCALARS[type_id])
        if type_id == _STRING:
            return self._string()
        if type_id == _ARRAY:
            return self._array(key)
        raise ModelError(
            f"{self._path}: {key} has the unknown type {type_id}: the file is damaged or newer than version 3"
        )

    def _array(self, key: str) -> GgufArray:
        type_id, count = self._unpack(_U32), self._unpack(_U64)
        if type_id in _SCALARS:
            return GgufArray(type_id, count, self._take(count * _SCALARS[type_id].size))
        if type_id != _STRING:
            raise ModelError(f"{self._path}: {key} is an array of type {type_id}; supported: strings and numbers")
        start, at, size, unpack = self._at, self._at, len(self._data), _U64.unpack_from
        for _ in range(count):
            at += 8 + unpack(self._data, at)[0]
            if at > size:
                raise IndexError(at)
        return GgufArray(type_id, count, self._take(at - start))

    def _tensor(self) -> tuple[str, GgufTensor]:
        name, num_dimensions = self._string(), self._unpack(_U32)
        if num_dimensions > _MAX_DIMENSIONS:
            raise ModelError(f"{self._path}: tensor {name} has {num_dimensions} dimensions: the file is damaged")
        sizes = [self._unpack(_U64) for _ in range(num_dimensions)]
        type_id = self._unpack(_U32)
        return name, GgufTensor(tuple(reversed(sizes)), type_id, self._unpack(_U64))
