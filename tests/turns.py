"""A plugin for tests on several processes (pytest-xdist): one marked `alone` runs while no other process runs any."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: no other process may run a test meanwhile")
    if given := getattr(config, "workerinput", None):  # this is one of the processes
        config.pluginmanager.register(Turns(given["testrunuid"]))


class Turns:
    """Who may run now, by locks of files, which end with the process that has them: `machine`, shared by tests that run
    beside others, and `turn`, which who waits for the machine holds, so that nobody else begins.
    """

    def __init__(self, run: str) -> None:
        """run: names the run in all its processes."""
        self._paths = [Path(tempfile.gettempdir(), f"phalanx-tests-{run}-{lock}") for lock in ("turn", "machine")]
        # Opened once, by each process before the first of them has ended and taken the names away.
        self._turn, self._machine = (path.open("a+") for path in self._paths)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Files whose tests all run alone come last, lest other processes wait for each of them. Those at the top, of
        whole systems, take longest and come first, lest one process be left with one when the others have ended.
        """
        items.sort(key=lambda item: (_is_alone(item.getparent(pytest.Module) or item), len(item.path.parts)))

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around what limits a test's time, which waiting is no part of
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        fcntl.lockf(self._turn, fcntl.LOCK_EX)
        fcntl.lockf(self._machine, fcntl.LOCK_EX if _is_alone(item) else fcntl.LOCK_SH)
        fcntl.lockf(self._turn, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.lockf(self._machine, fcntl.LOCK_UN)

    def pytest_unconfigure(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)


def _is_alone(node: pytest.Item | pytest.Module) -> bool:
    return node.get_closest_marker("alone") is not None
