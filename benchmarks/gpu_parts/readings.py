"""What the programs of `benchmarks/gpu.py` share: readings written down one by one, within a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Readings:
    """Figures of one program. They are written after each reading, so that whatever stops it leaves those it took.

    path: of the JSON; None to keep them only here. seconds: after which nothing more is begun.
    """

    def __init__(self, path: Path | None, seconds: float) -> None:
        self._path = path
        self._ends_s = time.monotonic() + seconds
        self.figures: dict[str, Any] = {}

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._ends_s

    def put(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self._write()

    def take(self, name: str, what: dict[str, Any], read: Callable[[], dict[str, Any]]) -> bool:
        """Appends to the list `name` what `read` measures, or what went wrong; with `what`, which says of what it is.
        Whether there was time for it and it went well.
        """
        if self.over:
            self.figures["left_out"] = self.figures.get("left_out", 0) + 1
            self._write()
            return False
        try:
            found = read()
        except Exception as error:  # one reading that fails is a finding; the others are still wanted
            found = {"error": f"{type(error).__name__}: {error}".strip()[:400]}
        self.figures.setdefault(name, []).append({**what, **found})
        self._write()
        said = found.get("error") or ", ".join(f"{key} {_short(value)}" for key, value in found.items())
        print(" ".join(map(str, what.values())), "|", said, flush=True)
        return "error" not in found

    def _write(self) -> None:
        if self._path is not None:
            beside = self._path.with_suffix(".part")
            beside.write_text(json.dumps(self.figures, indent=1) + "\n")
            beside.replace(self._path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
