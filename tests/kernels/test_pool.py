"""The thread pool of the native operators, by `pool_test.cpp`: as it is, and under the thread sanitizer."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or ""
CASES = ["every_index", "several_threads", "nested", "two_callers", "resized_meanwhile", "after_pauses"]

pytestmark = pytest.mark.skipif(
    not COMPILER or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="needs a C++ compiler on Linux on x86-64",
)


def build(folder: Path, *options: str) -> Path:
    program = folder / "pool_test"
    sources = [str(HERE / "pool_test.cpp"), str(SOURCES / "pool.cpp")]
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-pthread", f"-I{SOURCES}", *options, *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0 and "sanitize" in " ".join(options) and "tsan" in built.stderr:
        pytest.skip(f"needs the compiler's thread sanitizer: {built.stderr.strip()[-200:]}")
    assert built.returncode == 0, built.stderr
    return program


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), "-fsanitize=thread")


def check(program: Path, case: str) -> None:
    done = subprocess.run([program, case], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("case", [*CASES, "after_fork", "idle"])
def test_the_pool_does_all_work_once(plain: Path, case: str) -> None:
    check(plain, case)


@pytest.mark.parametrize("case", CASES)  # the sanitizer starts threads of its own, and follows none into a child
def test_the_pool_has_no_races(sanitized: Path, case: str) -> None:
    check(sanitized, case)
