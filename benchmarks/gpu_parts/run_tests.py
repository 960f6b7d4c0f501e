"""Runs tests with pytest and writes down how many of them passed, and which did not.

    PYTHONPATH=src python -m benchmarks.gpu_parts.run_tests --json FILE tests/gpu [...]

On several processes where pytest-xdist is installed and `--processes` asks for it. Needs no other plugin of pytest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

SAID = 300  # characters of why a test failed


class Counted:
    """What pytest tells of its tests, written after each one that fails and now and then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: Counter[str] = Counter()
        self._failures: dict[str, str] = {}
        self._skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self._counts[report.outcome] += 1
        if report.failed:
            self._fail(report.nodeid, report)
        if report.skipped and isinstance(report.longrepr, (tuple, list)):
            self._skips[str(report.longrepr[2])] += 1
        if report.failed or sum(self._counts.values()) % 50 == 0:
            self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._counts["failed"] += 1
            self._fail(report.nodeid, report)
            self.write()

    def pytest_sessionfinish(self) -> None:
        self.write()

    def _fail(self, name: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = report.longreprtext[-SAID:] if crash is None else crash.message
        self._failures[name] = said[:SAID]

    def write(self) -> None:
        counts = {outcome: self._counts[outcome] for outcome in ("passed", "failed", "skipped")}
        figures = {**counts, "failures": self._failures, "skips": self._skips}
        self._path.write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    arguments = parser.parse_args()
    # The project's own options ask for plugins that need not be here.
    options = ["-o", "addopts=--import-mode=importlib", "-q", "-ra", "--tb=short", "-p", "no:cacheprovider"]
    if arguments.processes > 1 and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(arguments.processes)]
    sys.exit(pytest.main([*options, *arguments.tests], plugins=[Counted(arguments.json)]))


if __name__ == "__main__":
    main()
