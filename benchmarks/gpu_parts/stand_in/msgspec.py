"""Stands in for msgspec where that is not installed, as far as the messages of `engine/messages.py` need it to be made
and read: nothing is encoded here. `benchmarks/gpu.py` puts it on the path, and says so, where msgspec is missing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial


class Struct:
    """A frozen dataclass, whatever else is asked for."""

    def __init_subclass__(cls, **_: object) -> None:
        for name, value in list(vars(cls).items()):
            if isinstance(value, dict | list | set) and not name.startswith("__"):
                setattr(cls, name, field(default_factory=partial(copy.copy, value)))
        dataclass(frozen=True)(cls)
