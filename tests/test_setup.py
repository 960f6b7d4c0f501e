"""`make setup`: which Python and which PyTorch it takes, and when it does its work again."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
INDEX = "https://index.example/cpu"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("phalanx_setup", ROOT / "scripts" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def requirements(setup: ModuleType, gpu: bool, index: str | None) -> list[str]:
    return [attempt.arguments[-1] for attempt in setup.torch_attempts("2.13.0", gpu, index)]


def fake_python(folder: Path, name: str, version_ok: bool) -> None:
    """A program that answers the version question, and otherwise prints its own name and its arguments."""
    script = f'#!/bin/sh\n[ "$1" = -c ] && exit {0 if version_ok else 1}\necho {name} "$@"\n'
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def choose(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the choice of a Python from a copy of the scripts, with nothing on the path but `folder` and dirname."""
    scripts = folder / "checkout" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "setup.sh").write_text((ROOT / "scripts" / "setup.sh").read_text())
    dirname = f'#!/bin/sh\necho "{scripts}"\n'
    (folder / "dirname").write_text(dirname)
    (folder / "dirname").chmod(0o755)
    command = ["/bin/sh", str(scripts / "setup.sh"), "--torch-index", ""]
    environment = {"PATH": str(folder), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)


def test_without_a_gpu_a_cpu_build_at_hand_comes_before_the_default_build(setup: ModuleType) -> None:
    attempts = setup.torch_attempts("2.13.0", False, None)
    assert requirements(setup, False, None) == ["torch==2.13.0+cpu", "torch==2.13.0"]
    assert [attempt.fallible for attempt in attempts] == [True, False]
    assert "--no-index" in attempts[0].arguments


def test_an_index_that_the_user_names_takes_the_place_of_the_default(setup: ModuleType) -> None:
    for gpu in (False, True):
        attempt = setup.torch_attempts("2.13.0", gpu, INDEX)[-1]
        assert attempt.arguments[:2] == ("--index-url", INDEX)
        assert not attempt.fallible


def test_with_a_gpu_a_cpu_build_is_never_taken(setup: ModuleType) -> None:
    assert requirements(setup, True, None) == ["torch===2.13.0"]


def test_the_version_of_torch_is_the_pinned_one(setup: ModuleType) -> None:
    assert setup.pinned("torch", "numpy==2.0\ntorch==2.13.0  \ntorchvision==1.0\n") == "2.13.0"


def test_constraints_without_torch_are_an_error(setup: ModuleType) -> None:
    with pytest.raises(setup.SetupError, match="does not pin torch"):
        setup.pinned("torch", "numpy==2.0\n")


def test_the_digest_changes_with_any_input_and_any_setting(setup: ModuleType, tmp_path: Path) -> None:
    files = (tmp_path / "a", tmp_path / "b")
    files[0].write_text("x")
    files[1].write_text("y")
    digests = [setup.digest(["3.11"], files), setup.digest(["3.12"], files)]
    files[1].write_text("z")
    digests.append(setup.digest(["3.11"], files))
    files[0].write_text("z")
    files[1].write_text("x")
    digests.append(setup.digest(["3.11"], files))
    assert len(set(digests)) == 4


def test_a_torn_stamp_counts_as_none(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = tmp_path / "stamp"
    stamp.write_text('{"root": ')
    monkeypatch.setattr(setup, "STAMP", stamp)
    assert setup.read_stamp() == {}


def test_a_folder_that_is_no_environment_is_left_alone(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / ".venv" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    monkeypatch.setattr(setup, "VENV", precious.parent)
    monkeypatch.setattr(setup, "VENV_PYTHON", precious.parent / "bin" / "python")
    with pytest.raises(setup.SetupError, match="is no virtual environment"), setup.Status(1, "test") as status:
        setup.make_environment(status)
    assert precious.read_text() == "mine"


def test_a_failing_install_shows_its_last_lines_and_a_remedy(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "LOG", tmp_path / "log")
    monkeypatch.setattr(setup, "VENV_PYTHON", sys.executable)
    missing = str(tmp_path / "no-such-package")
    with pytest.raises(setup.SetupError, match=r"(?s)no-such-package.*pip config list"), setup.Status(1, "t") as status:
        setup.pip_install(status, "--no-index", missing)


def test_python3_is_taken_where_it_is_new_enough(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", True)
    fake_python(tmp_path, "python3.12", True)
    assert choose(tmp_path).stdout.startswith("python3 ")


def test_a_named_version_is_taken_where_python3_is_too_old(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", False)
    fake_python(tmp_path, "python3.12", True)
    answer = choose(tmp_path)
    assert re.fullmatch(r"python3.12 .*/setup.py --torch-index \n", answer.stdout), answer


def test_no_python_at_all_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    answer = choose(tmp_path)
    assert answer.returncode == 3
    assert "no Python of 3.11 or newer" in answer.stderr
    assert "make setup PYTHON=" in answer.stderr


def test_a_python_that_the_user_names_is_the_only_one_tried(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", True)
    fake_python(tmp_path, "old", False)
    answer = choose(tmp_path, PYTHON="old")
    assert answer.returncode == 3
    assert "PYTHON=old" in answer.stderr


def test_the_constraints_pin_everything_that_is_installed_for_tests() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)] == []
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    direct = {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", name)[0]).lower() for name in wanted}
    assert direct <= names
