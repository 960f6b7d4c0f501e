"""From the tensors that a quantiser has written for each matrix to one entry a matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from phalanx.errors import ModelError
from phalanx.models.scheme import ScaleType
from phalanx.models.stored_quantization import StoredForm, StoredQuantization
from phalanx.models.tensor_entry import Packing, PackingLayout, TensorEntry

_SCALE_TYPES: Mapping[str, ScaleType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_NAMES: Mapping[PackingLayout, Mapping[str, tuple[str, ...]]] = {
    "awq": {"weight": ("qweight",), "scales": ("scales",), "zeros": ("qzeros",)},
    "gptq": {"weight": ("qweight",), "scales": ("scales",), "zeros": ("qzeros",), "g_idx": ("g_idx",)},
    "packed": {
        "weight": ("weight_packed",),
        "scales": ("weight_scale",),
        "zeros": ("weight_zero_point",),
        "g_idx": ("weight_g_idx",),
    },
    "bytes": {"weight": ("weight",), "scales": ("weight_scale", "weight_scale_inv"), "zeros": ("weight_zero_point",)},
}
"""What the parts of a matrix are called behind the name of its module."""

# Of activations, which stay as they are: scales of theirs, and of the KV cache. The shape follows from the others.
_PASSED_OVER = re.compile(
    r"\.(input_scale|input_zero_point|input_g_idx|input_global_scale|activation_scale|output_scale|weight_shape"
    r"|[kvq]_scale|[kvq]_zero_point)$"
)

_REMEDY = "quantise the model again, or correct quantization_config in its config.json"


def packed_entries(
    entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[int, ...]], quantization: StoredQuantization
) -> dict[str, TensorEntry]:
    """The entries with one in place of all parts of a matrix, `MODULE.weight`, and without those that are not needed.

    entries, expected: by the names of the file. A matrix that lies there as it is stays so, whatever the configuration
    says. Raises ModelError, naming file and tensor, for a part that is missing or misshapen.
    """
    found = {name: entry for name, entry in entries.items() if not _PASSED_OVER.search(name)}
    for name, shape in expected.items():
        if not name.endswith(".weight") or len(shape) != 2:
            continue
        module = name.removesuffix(".weight")
        form = quantization.form_of(module)
        if form is None:  # of a head, say, that is quantised against the custom
            form = next((each for _, each in quantization.forms if _is_packed(module, each, found)), None)
        elif not _is_packed(module, form, found) and _is_plain(found.get(name)):
            form = None
        if form is not None:
            found[name] = _Matrix(module, shape, form, found).entry()
            # GPTQ quantisers have written one for every matrix, of zeros where the model has none.
            bias = found.get(f"{module}.bias")
            if bias is not None and f"{module}.bias" not in expected and _holds_zeros(bias):
                del found[f"{module}.bias"]
    return found


def _holds_zeros(entry: TensorEntry) -> bool:
    with Path(entry.file).open("rb") as file:
        file.seek(entry.offset)
        return not any(file.read(entry.num_bytes))


def _is_plain(entry: TensorEntry | None) -> bool:
    return entry is not None and entry.encoding in _SCALE_TYPES


def _is_packed(module: str, form: StoredForm, entries: Mapping[str, TensorEntry]) -> bool:
    weight = entries.get(f"{module}.{_NAMES[form.layout]['weight'][0]}")
    return weight is not None and weight.packing is None and not _is_plain(weight)


class _Matrix(NamedTuple):
    """One that is made of parts, which it takes out of `entries`. shape: [N, K]."""

    module: str
    shape: tuple[int, ...]
    form: StoredForm
    entries: dict[str, TensorEntry]

    def entry(self) -> TensorEntry:
        form, (num_outputs, num_inputs) = self.form, self.shape
        each, groups = 32 // form.bits, form.scheme().num_groups(num_inputs)
        packed_inputs, packed_outputs = -(-num_inputs // each), -(-num_outputs // each)
        names: dict[str, str] = {}
        parts: dict[str, TensorEntry] = {}
        if form.layout == "awq" and num_outputs % each:
            raise self._wrong("qweight", f"holds {num_outputs} outputs, no multiple of {each}")
        if form.layout == "gptq" and (num_inputs % each or num_outputs % each):
            raise self._wrong("qweight", f"holds {num_inputs} inputs and {num_outputs} outputs, no multiples of {each}")

        def take(part: str, shapes: tuple[tuple[int, ...], ...], encodings: tuple[str, ...], needed: bool) -> None:
            for suffix in _NAMES[form.layout][part]:
                found = self.entries.pop(f"{self.module}.{suffix}", None)
                if found is not None:
                    parts[part], names[part] = self._checked(suffix, found, shapes, encodings), suffix
                    return
            if needed:
                raise self._wrong(" or ".join(_NAMES[form.layout][part]), "is missing")

        by_rows = -(-num_outputs // form.rows_together)
        if form.symmetric and form.layout != "gptq":  # of GPTQ it is seen whether they are what they should be
            self.entries.pop(f"{self.module}.{_NAMES[form.layout]['zeros'][0]}", None)
        match form.layout:
            case "awq" | "gptq":
                by_awq = ((num_inputs, packed_outputs),)
                take("weight", by_awq if form.layout == "awq" else ((packed_inputs, num_outputs),), ("I32",), True)
                take("zeros", ((groups, packed_outputs),), ("I32",), not form.symmetric)
                take("scales", ((groups, num_outputs),), tuple(_SCALE_TYPES), True)
            case "packed":
                take("weight", ((num_outputs, packed_inputs),), ("I32",), True)
                zeros = self.entries.get(f"{self.module}.weight_zero_point")
                if zeros is not None and zeros.encoding == "I8":  # as its first versions have them
                    take("zeros", self._scale_shapes(num_outputs, groups), ("I8",), True)
                else:
                    take("zeros", ((packed_outputs, groups),), ("I32",), not form.symmetric)
                take("scales", self._scale_shapes(num_outputs, groups), tuple(_SCALE_TYPES), True)
            case "bytes":
                shapes = self._scale_shapes(by_rows, groups)
                take("weight", (self.shape,), ("F8_E4M3" if form.e4m3 else "I8",), True)
                take("zeros", shapes, ("I8",), not form.symmetric and not form.e4m3)
                take("scales", shapes, tuple(_SCALE_TYPES), True)
        if "g_idx" in _NAMES[form.layout]:
            take("g_idx", ((num_inputs,),), ("I32", "I64"), form.scheme().act_order)
        scales = parts["scales"]
        for part in ("scales", "zeros"):
            if part in parts:
                parts[part] = replace(parts[part], shape=_as_matrix(parts[part].shape))
        one = form.layout in ("packed", "bytes") and scales.shape in ((), (1,), (1, 1)) and num_outputs > 1
        packing = Packing(
            form.layout,
            form.scheme(_SCALE_TYPES[scales.encoding]),
            parts,
            {part: f"{self.module}.{suffix}" for part, suffix in names.items()},
            0 if one and groups == 1 else form.rows_together,
            form.zero_step,
        )
        return replace(parts["weight"], shape=self.shape, packing=packing)

    def _scale_shapes(self, rows: int, groups: int) -> tuple[tuple[int, ...], ...]:
        """Those for all of a matrix as well, and those of one group."""
        if groups == 1 and self.form.rows_together == 1:
            return (rows, 1), (rows,), (), (1,), (1, 1)
        return ((rows, groups),)

    def _checked(
        self, suffix: str, entry: TensorEntry, shapes: tuple[tuple[int, ...], ...], encodings: tuple[str, ...]
    ) -> TensorEntry:
        if entry.encoding not in encodings:
            raise self._wrong(suffix, f"has dtype {entry.encoding}, not {' or '.join(encodings)}", entry.file)
        if entry.shape not in shapes:
            form = self.form
            many = "an output" if form.group_size is None else f"a group of {form.group_size} inputs"
            raise self._wrong(
                suffix,
                f"has shape {list(entry.shape)}, not {list(shapes[0])}, which {list(self.shape)} weights of"
                f" {form.bits} bits with a scale for {many} call for",
                entry.file,
            )
        return entry

    def _wrong(self, suffix: str, what: str, file: str | None = None) -> ModelError:
        where = "" if file is None else f"{file}: "
        return ModelError(f"{where}tensor {self.module}.{suffix} {what}; {_REMEDY}")


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0] if shape else 1, 1)
