"""Where a test's Ray cluster keeps its files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest


def make_ray_folder(patch: pytest.MonkeyPatch) -> str:
    """A new folder for a cluster's files, which is also where `ray.cluster_utils` notes the cluster's address: it does
    so in /tmp/ray otherwise, which a machine that has not run Ray yet does not have. Short, because paths of sockets
    have at most 107 bytes.
    """
    folder = tempfile.mkdtemp(prefix="phx-", dir="/tmp")
    patch.setenv("RAY_TMPDIR", folder)
    Path(folder, "ray").mkdir()
    return folder
