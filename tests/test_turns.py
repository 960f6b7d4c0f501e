"""Tests on several processes: which of them run beside each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist", reason="needs pytest-xdist")

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import time
from pathlib import Path
import pytest

def others(folder):
    Path(folder, __name__).touch()
    return len(list(Path(folder).iterdir())) - 1

def test_of_two_processes_both_run_tests():
    for _ in range(1000):
        if others("met"):
            return
        time.sleep(0.01)
    pytest.fail("the other process ran no test meanwhile")

@pytest.mark.parametrize("_", range(4))
@pytest.mark.parametrize("alone", [pytest.param(True, marks=pytest.mark.alone), False])
def test_running(alone, _):
    for _ in range(5):
        assert not (others("running") and alone)
        time.sleep(0.005)
    Path("running", __name__).unlink()
"""
LAST = """
from pathlib import Path
import pytest
pytestmark = pytest.mark.alone

def test_it_is_not_the_last():
    assert len(list(Path("met").iterdir())) < 2
"""


def run(folder: Path, **files: str) -> subprocess.CompletedProcess[str]:
    """Runs files of tests, each on one of two processes."""
    for name in ("running", "met"):
        (folder / name).mkdir()
    for name, tests in files.items():
        (folder / f"test_{name}.py").write_text(tests)
    plugins = ["-p", "xdist.plugin", "-p", "tests.turns", "-p", "no:cacheprovider"]  # others take long to read
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-n2", "--dist=loadfile", "--no-loadscope-reorder", "."],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_those_marked_alone_run_while_nothing_else_does(tmp_path: Path) -> None:
    done = run(tmp_path, a=TESTS, b=TESTS)
    assert done.returncode == 0, done.stdout
    assert "18 passed" in done.stdout


def test_files_of_them_come_last_and_one_that_fails_there_fails_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, a=LAST, b=TESTS, c=TESTS)
    assert done.returncode == 1, done.stdout
    assert "1 failed, 18 passed" in done.stdout
