"""What a user installs: a wheel and an sdist hold real copies of the rooms, and works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from tests.native_library import excuse_for_no_library
from tests.without_editable import PRELUDE

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "phalanx"
DATA_SUFFIXES = {".py", ".typed", ".yaml", ".json", ".html", ".css", ".js"}


def build(kind: str, source: Path, target: Path, **environment: str) -> Path:
    """Builds `wheel` or `sdist` of the tree at `source` with the backend that stands here; reaches for no network."""
    settings = {} if kind == "sdist" else {"build-dir": f"{target}-objects"}  # not where `make setup` compiles
    program = f"import scikit_build_core.build as backend; backend.build_{kind}({str(target)!r}, {settings!r})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command,
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that finds every source and what it includes, and makes nothing of them: what is in a wheel does not
    depend on it. What CMake asks of a compiler it answers as any. `make setup` has compiled the checkout in earnest.
    """
    compiler = tmp_path_factory.mktemp("hasty") / "c++"
    compiler.write_text("""#!/bin/sh
case "$PWD:$*" in */CMakeFiles/*:*|*:*--version*) exec c++ "$@" ;; *" -c "*) ;; *) exec c++ "$@" ;; esac
for word; do
    [ "$before" = -o ] && object=$word
    before=$word
done
c++ "$@" -E && exec c++ -x c++ -c -o "$object" /dev/null
""")
    compiler.chmod(0o755)
    return str(compiler)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, hasty: str) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"), CXX=hasty)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def package_files() -> set[str]:
    """Every file of the import package, seen through the links, by its path in a wheel."""
    found: set[str] = set()
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        paths = (Path(folder) / name for name in names)
        found |= {str(path.relative_to(PACKAGE.parent)) for path in paths if path.suffix in DATA_SUFFIXES}
    return found


def wheel_files(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_holds_every_file_of_every_room(wheel: Path) -> None:
    assert package_files() <= wheel_files(wheel)


def test_the_wheel_holds_nothing_beside_the_import_package(wheel: Path) -> None:
    assert {name.split("/")[0] for name in wheel_files(wheel)} == {"phalanx"}


def test_the_wheel_holds_the_native_library_and_not_its_source(wheel: Path) -> None:
    names = wheel_files(wheel)
    assert not [name for name in names if "csrc" in name]
    libraries = [name for name in names if name.startswith("phalanx/_native.") and name.endswith(".so")]
    if not libraries and (excuse := excuse_for_no_library()):
        pytest.skip(f"no native library in the wheel: {excuse}")
    assert len(libraries) == 1
    assert "linux_x86_64" in wheel.name


def test_without_a_compiler_the_wheel_is_built_all_the_same(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    plain = build("wheel", source, tmp_path / "wheel", CXX="/nowhere/c++")
    assert plain.name.endswith("-py3-none-any.whl")
    names = wheel_files(plain)
    assert "phalanx/comm/shm.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_wheel_holds_copies_and_no_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        links = [entry.filename for entry in archive.infolist() if (entry.external_attr >> 28) == 0o12]
    assert links == []


def test_the_wheel_carries_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        by_name = {name.split("/", 1)[-1]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(by_name["METADATA"]).decode())
        licence = archive.read(by_name["licenses/LICENSE"]).decode()
        commands = archive.read(by_name["entry_points.txt"]).decode()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "phalanx = phalanx.cli:main" in commands


def test_triton_and_cupy_are_no_plain_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    plain = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert plain
    assert not [requirement for requirement in plain if requirement.startswith(("triton", "cupy", "ray"))]


def test_the_installed_wheel_imports_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True, timeout=60)
    program = "import phalanx.parallel.split as split; print(split.__file__); print(split.Split.even(9, 2).sizes)"
    # No PYTHONPATH from the caller; the target comes before the editable install of this checkout.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", PRELUDE + program]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.splitlines() == [str(tmp_path / "phalanx/parallel/split.py"), "(5, 4)"], done.stderr


def test_a_wheel_built_from_the_sdist_is_the_same(wheel: Path, sdist: Path, hasty: str, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert not [entry.name for entry in archive if entry.issym() or entry.islnk()]
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    rebuilt = build("wheel", source, tmp_path / "wheel", CXX=hasty)
    assert wheel_files(rebuilt) == wheel_files(wheel)
