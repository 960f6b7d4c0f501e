"""What the `quantization_config` of a config.json says of the matrices of a safetensors checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from phalanx.errors import ModelError
from phalanx.models.fields import Fields
from phalanx.models.scheme import OCTET, ScaleType, Scheme
from phalanx.models.tensor_entry import PackingLayout

_CT_LAYOUTS: Mapping[str, PackingLayout] = {
    "pack-quantized": "packed",
    "int-quantized": "bytes",
    "float-quantized": "bytes",
    "naive-quantized": "bytes",
}
_CT_SCATTERED = (True, "group", "dynamic")
_CT_ORDERS = (None, False, "weight", "static", *_CT_SCATTERED)


class StoredForm(NamedTuple):
    """How some modules' matrices are stored: see `Packing` and `Scheme`. symmetric: without zeros of their own."""

    layout: PackingLayout
    bits: int
    group_size: int | None
    symmetric: bool = True
    act_order: bool = False
    e4m3: bool = False
    rows_together: int = 1
    zero_step: int = 0

    def scheme(self, scale_type: ScaleType | None = None) -> Scheme:
        """scale_type: as found; else the usual one."""
        usual: ScaleType = "float16" if self.layout in ("awq", "gptq") else "float32" if self.e4m3 else "bfloat16"
        scattered = self.act_order and self.group_size is not None
        zeros = not self.symmetric
        return Scheme(self.bits, self.group_size, scale_type or usual, False, zeros, self.e4m3, scattered)


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """method: `quant_method`. forms: with the modules that are stored so: names, `re:` and an expression, or `Linear`
    for all. ignored: modules that are not: names or expressions, or a part of a name where `by_part`.
    """

    method: str
    forms: tuple[tuple[tuple[str, ...], StoredForm], ...]
    ignored: tuple[str, ...] = ()
    by_part: bool = False

    def form_of(self, module: str) -> StoredForm | None:
        """Of a linear module, by its name in the file; None where it is not quantised."""
        if module.endswith("embed_tokens"):
            return None
        if any(_matches(each, module) or (self.by_part and each in module) for each in self.ignored):
            return None
        for targets, form in self.forms:
            if any(target == "Linear" or _matches(target, module) for target in targets):
                return form
        return None


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def stored_quantization(fields: Fields) -> StoredQuantization:
    """From a `quantization_config`. Raises ModelError, naming file, key and what is supported."""
    method = fields.get("quant_method")
    match method:
        case "awq":
            return _one_form("awq", _awq(fields), fields, "modules_to_not_convert", ("lm_head",))
        case "gptq":
            head = () if fields.flag("lm_head") else ("lm_head",)
            return _one_form("gptq", _gptq(fields), fields, "modules_to_not_convert", head)
        case "fp8":
            return _one_form("fp8", _fp8(fields), fields, "modules_to_not_convert", ("lm_head",))
        case "compressed-tensors":
            return _compressed_tensors(fields)
    raise fields.refusal(
        "quant_method", "awq, gptq, fp8, compressed-tensors; or take the unquantised model, or its GGUF file"
    )


def _one_form(
    method: str, form: StoredForm, fields: Fields, ignored: str, always: tuple[str, ...]
) -> StoredQuantization:
    return StoredQuantization(method, ((("Linear",), form),), (*always, *_names(fields, ignored)), by_part=True)


def _awq(fields: Fields) -> StoredForm:
    if str(fields.get("version") or "gemm").lower() != "gemm":
        raise fields.refusal("version", "gemm")
    if fields.get("zero_point") is False:
        raise fields.refusal("zero_point", "true")
    return StoredForm("awq", _bits(fields, "bits", (4,)), _group_size(fields), symmetric=False)


def _gptq(fields: Fields) -> StoredForm:
    version = fields.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise fields.refusal("checkpoint_format", "gptq or gptq_v2")
    overrides = fields.get("dynamic") or {}
    if not isinstance(overrides, dict) or any(not str(name).startswith("-:") for name in overrides):
        raise fields.refusal("dynamic", "absent, or modules that are left out (-:)")
    return StoredForm(
        "gptq",
        _bits(fields, "bits", (4, 8)),
        _group_size(fields),
        symmetric=fields.get("sym") is not False,
        act_order=fields.flag("desc_act"),
        zero_step=1 if version == "gptq" else 0,
    )


def _fp8(fields: Fields) -> StoredForm:
    if fields.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise fields.refusal("fmt", "e4m3")
    block = fields.get("weight_block_size")
    if block is None:
        return StoredForm("bytes", 8, None, e4m3=True)
    rows, columns = _block(fields, "weight_block_size")
    return StoredForm("bytes", 8, columns, e4m3=True, rows_together=rows)


def _compressed_tensors(fields: Fields) -> StoredQuantization:
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise fields.refusal("config_groups", "an object of objects")
    for key in ("transform_config", "sparsity_config"):
        found = fields.get(key)
        if found and not (isinstance(found, dict) and found.get("format") == "dense"):
            raise fields.refusal(key, "absent")
    forms = []
    for name, group in groups.items():
        source = f"{fields.source}: config_groups: {name}"
        of_group = Fields(group, source, {"format": fields.get("format")})
        if group.get("weights") is not None:
            targets = _names(of_group, "targets")
            forms.append((targets, _compressed_form(of_group)))
    if not forms:
        raise fields.refusal("config_groups", "a group with weights")
    return StoredQuantization("compressed-tensors", tuple(forms), _names(fields, "ignore"))


def _compressed_form(group: Fields) -> StoredForm:
    layout = _CT_LAYOUTS.get(str(group.get("format")))
    if layout is None:
        raise group.refusal("format", ", ".join(_CT_LAYOUTS))
    found = group.get("weights")
    if not isinstance(found, dict):
        raise group.refusal("weights", "an object")
    weights = Fields(found, f"{group.source}: weights")
    kind = weights.get("type") or "int"
    if kind not in ("int", "float"):
        raise weights.refusal("type", "int or float")
    bits = _bits(weights, "num_bits", (4, 8) if layout == "packed" and kind == "int" else (8,))
    if kind == "float" and layout == "packed":
        raise group.refusal("format", "float-quantized, for weights of type float")
    if weights.get("actorder") not in _CT_ORDERS:
        raise weights.refusal("actorder", "group, weight or null")
    size, rows = None, 1
    match weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"):
        case "tensor" | "channel":
            pass
        case "group":
            size = _group_size(weights)
        case "block":
            rows, size = _block(weights, "block_structure")
        case _:
            raise weights.refusal("strategy", "tensor, channel, group or block")
    return StoredForm(
        layout,
        bits,
        size,
        symmetric=weights.get("symmetric") is not False,
        act_order=weights.get("actorder") in _CT_SCATTERED,
        e4m3=kind == "float",
        rows_together=rows,
    )


def _bits(fields: Fields, key: str, supported: tuple[int, ...]) -> int:
    bits = fields.integer(key)
    if bits not in supported:
        raise fields.refusal(key, " or ".join(map(str, supported)))
    return bits


def _group_size(fields: Fields) -> int | None:
    size = fields.integer("group_size")
    if size != -1 and (size < 1 or size % OCTET):
        raise fields.refusal("group_size", f"a multiple of {OCTET}, or -1 for all inputs")
    return None if size == -1 else size


def _block(fields: Fields, key: str) -> tuple[int, int]:
    match fields.get(key):
        case [int(rows), int(columns)] if rows > 0 and columns > 0 and columns % OCTET == 0:
            return rows, columns
    raise fields.refusal(key, f"two sizes, the second a multiple of {OCTET}")


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    found: Any = fields.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise fields.refusal(key, "a list of names")
    for pattern in _expressions(found):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(f"{fields.source}: {key} has {pattern!r}, which is no expression: {error}") from error
    return tuple(found)


def _expressions(names: list[str]) -> Iterator[str]:
    return (name[3:] for name in names if name.startswith("re:"))
