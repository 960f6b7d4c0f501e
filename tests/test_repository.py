"""What holds of the repository as a whole: its links, its floors, its targets, and that it speaks only of itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.without_editable import PRELUDE

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "phalanx"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Spelt in pieces, so that this file does not contain what it looks for.
HOSTS = ("files.python" + "hosted.org", "py" + "pi.org", "registry.npm" + "js.org", "deb.deb" + "ian.org")
MACHINE_PATHS = ("/wo" + "rk/", "/fa" + "rm/", "/ro" + "ot/")


def git_files() -> list[Path]:
    """Files that are tracked, or would be by `git add`; links and deleted files left out."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in listing.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def named_targets(text: str) -> set[str]:
    """Targets in `make <target> ...` where a page shows a command: in a line that starts with it or in backticks."""
    return set(re.findall(r"(?:^\s*(?:\$ )?|`)make ([a-z][a-z-]*)", text, flags=re.MULTILINE))


def run_steps(workflow: dict[Any, Any]) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_no_file_names_a_package_registry_or_a_path_of_one_machine() -> None:
    found = []
    for path in git_files():
        text = path.read_text(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in (*HOSTS, *MACHINE_PATHS) if word in text]
    assert found == []


def test_every_link_in_the_package_leads_to_the_room_of_its_name() -> None:
    links = [path for path in PACKAGE.iterdir() if path.is_symlink()]
    assert {link.name: link.resolve() for link in links} == {link.name: ROOT / link.name for link in links}
    assert [link.name for link in links if not link.is_dir()] == []


def test_every_room_with_code_is_linked_into_the_package() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms
    assert rooms <= {path.name for path in PACKAGE.iterdir() if path.is_symlink()}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_a_page_names_only_targets_that_make_has(page: str) -> None:
    assert named_targets((ROOT / page).read_text()) <= make_targets()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_make_targets_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert True in workflow, "no `on:` (which YAML 1.1 reads as true)"
    named = set().union(*(named_targets(step) for step in run_steps(workflow)))
    assert "test" in named
    assert named <= make_targets()


def test_the_cpu_workflow_covers_the_pythons_that_are_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/cpu.yml").read_text())
    promised = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert promised[0] == "3.11"
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == promised


def test_the_gpu_workflow_never_runs_on_a_push_alone() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())
    assert workflow["jobs"]["test"]["runs-on"] == ["self-hosted", "gpu"]
    assert workflow[True] == {"workflow_dispatch": None, "pull_request": {"types": ["labeled"]}}


def test_the_ci_script_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert named_targets(script.read_text().replace("exec ", "")) == {"test"}
    subprocess.run(["bash", "-n", script], check=True)


BLOCK_AND_IMPORT = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "cupy", "triton", "matplotlib", "opentelemetry"}:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Refuse())
"""


def import_without_extras(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK_AND_IMPORT + program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_public_names_need_neither_ray_nor_cupy_nor_triton() -> None:
    done = import_without_extras("import phalanx\nfor name in phalanx.__all__: getattr(phalanx, name)")
    assert done.returncode == 0, done.stderr


def test_the_command_line_needs_neither_ray_nor_cupy_nor_triton() -> None:
    done = import_without_extras("import phalanx.cli")
    assert done.returncode == 0, done.stderr


def test_importing_phalanx_alone_loads_no_torch() -> None:
    done = import_without_extras("import phalanx\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_ruff_checks_each_room_once_and_where_it_really_is() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    checked = {Path(line).relative_to(ROOT) for line in listing.splitlines()}
    assert {path.relative_to(ROOT) for path in git_files() if path.suffix == ".py"} <= checked
    assert {path for path in checked if path.parts[:2] == ("src", "phalanx")} == {
        path.relative_to(ROOT) for path in PACKAGE.glob("*.py*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("room", "line", "broken"),
    [
        ("kernels", "import phalanx.launcher", "phalanx.kernels is not allowed to import phalanx.launcher"),
        ("parallel", "import phalanx.models", "phalanx.parallel is not allowed to import phalanx.models"),
        ("engine", "import ray", "phalanx.engine is not allowed to import ray"),
        ("launcher", "import transformers", "phalanx is not allowed to import transformers"),
    ],
)
def test_lint_refuses_an_import_against_the_floors(tmp_path: Path, room: str, line: str, broken: str) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "src", tree / "src", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for link in PACKAGE.iterdir():
        if link.is_symlink():
            shutil.copytree(link, tree / link.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / room / "trespass.py").write_text(line + "\n")
    program = PRELUDE + "from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", program, "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert broken in done.stdout
