"""Whether the tensors that a checkpoint holds are the ones that a model needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from phalanx.errors import ModelError
from phalanx.models.tensor_entry import TensorEntry

_MAX_NAMED = 3


def check_inventory(entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compares the tensors found with those expected, and their extents with the lengths of their files.

    source: file or directory, for messages about tensors that are in no file.
    Raises ModelError, naming file and tensor, for the first kind of thing that is wrong: a tensor that is missing, has
    another shape, is not expected, or lies past the end of its file.
    """
    missing = [name for name in expected if name not in entries]
    if missing:
        raise ModelError(f"{source}: missing {named(missing)}; the configuration calls for {len(expected)} tensors")
    unexpected = [name for name in entries if name not in expected]
    if unexpected:
        raise ModelError(
            f"{entries[unexpected[0]].file}: unexpected {named(unexpected)}; the configuration calls for none of this"
            " name"
        )
    sizes: dict[str, int] = {}
    for name, entry in entries.items():
        if entry.shape != expected[name]:
            raise ModelError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, but the configuration calls for"
                f" {list(expected[name])}"
            )
        size = sizes.get(entry.file)
        if size is None:
            size = sizes[entry.file] = Path(entry.file).stat().st_size
        end = entry.offset + entry.num_bytes
        if end > size:
            raise ModelError(
                f"{entry.file}: truncated: tensor {name} ends at byte {end}, but the file has {size}; copy or download"
                " it again"
            )


def named(names: Sequence[str]) -> str:
    """`tensor a`, or `tensors a, b, c and 7 more`."""
    shown = ", ".join(names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more}"
