"""Phalanx: a distributed tensor- and pipeline-parallel inference runtime for large language models.

>>> from phalanx import LLM, SamplingParams, launch
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phalanx.engine.request import Delta, RequestOutput
    from phalanx.engine.sampling_params import SamplingParams
    from phalanx.errors import PhalanxError
    from phalanx.launcher.async_engine import AsyncEngine
    from phalanx.launcher.deployment import launch
    from phalanx.launcher.llm import LLM

__all__ = ["LLM", "AsyncEngine", "Delta", "PhalanxError", "RequestOutput", "SamplingParams", "launch"]

# Imported on first use, so that `import phalanx` and the command line's help cost neither torch nor Ray.
_HOMES = {
    "AsyncEngine": "phalanx.launcher.async_engine",
    "LLM": "phalanx.launcher.llm",
    "Delta": "phalanx.engine.request",
    "PhalanxError": "phalanx.errors",
    "RequestOutput": "phalanx.engine.request",
    "SamplingParams": "phalanx.engine.sampling_params",
    "launch": "phalanx.launcher.deployment",
}

try:
    __version__ = version("phalanx")
except PackageNotFoundError:  # used from a checkout through PYTHONPATH
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'phalanx' has no attribute {name!r}")
