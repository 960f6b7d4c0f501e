"""Typed access to the settings that come with a model, with errors that name file, key and value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phalanx.errors import ModelError
from phalanx.parallel.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Fields:
    """Settings from `source` (a path, for messages). A key that is absent or null takes the value in `defaults`."""

    values: Mapping[str, Any]
    source: str
    defaults: Mapping[str, object] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """The value as it is, or its default, or None."""
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._required(key, default, "a whole number")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._required(key, default, "a number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal(key, "a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        """A boolean; False where absent."""
        value = self._required(key, False, "true or false")
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def token_id(self, key: str) -> int | None:
        """One token id, or None where absent."""
        return None if self.get(key) is None else self.integer(key)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as one or as a list; empty where absent."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
            raise self.refusal(key, "a token id or a list of them")
        return tuple(ids)

    def refusal(self, key: str, supported: str) -> ModelError:
        """The error for a value that cannot be used."""
        return ModelError(f"{self.source}: {key} is {self.get(key)!r}; supported: {supported}")

    def _required(self, key: str, default: object, kind: str) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.source}: {key} is missing; it must be {kind}")
        return value


def checked_shape(shape: ModelShape, source: str) -> ModelShape:
    """`shape`, or a ModelError where it is not that of a decoder."""
    sizes = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    for name, size in sizes.items():
        if size < 1 and (shape.num_experts or name not in ("num_experts", "experts_per_token")):
            raise ModelError(f"{source}: {name} is {size}; it must be at least 1")
    if shape.experts_per_token > shape.num_experts:
        raise ModelError(f"{source}: {shape.experts_per_token} experts a token are more than the {shape.num_experts}")
    if shape.num_query_heads % shape.num_kv_heads:
        raise ModelError(
            f"{source}: {shape.num_query_heads} query heads cannot share {shape.num_kv_heads} KV heads evenly"
        )
    if shape.head_dim % 2:
        raise ModelError(f"{source}: head_dim is {shape.head_dim}; rotary embedding needs an even one")
    return shape
