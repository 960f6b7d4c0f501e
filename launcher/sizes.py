"""Sizes in bytes as people write them: `1GiB`, `80GB`, `512 MB`."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)

ALLOWED_SIZE = (
    "bytes as a whole number, or a number with KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
)


def parse_size(text: object) -> int:
    """Bytes meant by `text`, rounded down; at least 1. Units are matched without regard to case.

    Raises ValueError, saying what is allowed, for anything else.
    """
    is_whole = isinstance(text, int) and not isinstance(text, bool)
    match = _SIZE.fullmatch(str(text)) if is_whole or isinstance(text, str) else None
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise ValueError(f"not a size: {text!r}; allowed: {ALLOWED_SIZE}")
    size = int(Decimal(match[1]) * unit)
    if size < 1:
        raise ValueError(f"a size is at least one byte, found {text!r}")
    return size


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` to three figures in powers of 1024, such as `1.25 GiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.0f} TiB" if value >= 100 else f"{value:.3g} TiB"


def format_count(count: int) -> str:
    """`count` to three figures, such as `134.5 M` for millions and `70.6 B` for thousand millions."""
    value = float(count)
    for unit in ("", " k", " M"):
        if abs(value) < 1000:
            return f"{value:.0f}{unit}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f} B"
