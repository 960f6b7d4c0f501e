"""Whether the native library may be missing where these tests run."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution


def excuse_for_no_library() -> str:
    """Why there may be none, to skip with; empty where it must be there.

    It must under CI, and wherever Phalanx is installed on a machine that can build it. Run from its folder alone
    (`PYTHONPATH=src`) nothing was built.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "it needs Linux on x86-64"
    if os.environ.get("CI"):
        return ""
    try:
        distribution("phalanx")
    except PackageNotFoundError:
        return "Phalanx is not installed, but run from its folder"
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        return "no C++ compiler was found to build it with"
    return ""
