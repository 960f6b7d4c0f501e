"""`configs/deploy/Dockerfile` and `.dockerignore`: what an image holds, and what its build asks pip for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.recipes import DEPLOY, PINNED, ROOT, parse_phalanx


class Instruction(NamedTuple):
    name: str
    text: str


def instructions() -> list[Instruction]:
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in joined if line.strip()]


def of(name: str) -> list[str]:
    return [each.text for each in instructions() if each.name == name]


def words(name: str) -> list[str]:
    """The words of an instruction in its JSON form, of which there is one."""
    (text,) = of(name)
    found = json.loads(text[text.index("[") :])
    assert isinstance(found, list)
    return found


def admitted(path: str) -> bool:
    """Whether .dockerignore lets a path at the top into the image; the last pattern that fits says."""
    taken = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#") and fnmatch(path, pattern.removeprefix("!").removeprefix("**/")):
            taken = pattern.startswith("!")
    return taken


def test_the_base_is_an_argument_for_all_stages() -> None:
    first, *_ = instructions()
    assert first == ("ARG", "BASE=python:3.12-slim")
    assert [text.split()[0] for text in of("FROM")] == ["${BASE}", "${BASE}"]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = [text.split()[:-1] for text in of("COPY") if not text.startswith("--from=")]
    for source in (name for names in sources for name in names if name != "."):
        assert (ROOT / source).is_file()
        assert admitted(source.split("/")[0])


def test_a_change_of_code_leaves_the_layers_of_packages_as_they_are() -> None:
    copied = [each.text.split()[0] for each in instructions() if each.name == "COPY"]
    assert copied[:3] == ["constraints.txt", "pyproject.toml", "."]
    after = instructions()[instructions().index(Instruction("COPY", ". ./")) + 1]
    assert after == ("RUN", "pip install --no-deps .")


def test_the_image_gets_every_room_and_what_the_build_needs_and_nothing_else() -> None:
    rooms = {path.name for path in (ROOT / "src" / "phalanx").iterdir() if path.is_symlink()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {
        "CMakeLists.txt",
        "pyproject.toml",
        "constraints.txt",
        "src",
        project["readme"],
        *project["license-files"],
    }
    present = {path.name for path in ROOT.iterdir()} | {".git", ".venv", ".env", "keys.txt", "model.gguf"}
    assert {name for name in present if admitted(name)} == rooms | needed


def pip_calls(folder: Path, marker: str, **arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the step of the build that has `marker` in it, with a stand-in for pip that prints its arguments."""
    (step,) = (text for text in of("RUN") if marker in text)
    for name in ("constraints.txt", "pyproject.toml"):
        (folder / name).write_text((ROOT / name).read_text())
    (folder / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (folder / "pip").chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "DEVICE": "cpu", "TORCH_INDEX": "", **arguments}
    command = ["sh", "-c", step]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("index", ["", "https://index.example/cpu"])
def test_an_image_for_cpus_takes_the_cpu_build_of_torch_or_none(tmp_path: Path, index: str) -> None:
    done = pip_calls(tmp_path, "torch==", TORCH_INDEX=index)
    named = f"--index-url {index} " if index else ""
    assert done.stdout == f"install --no-deps {named}torch=={PINNED['torch']}+cpu\n"


def test_an_image_for_gpus_takes_the_default_build_of_torch(tmp_path: Path) -> None:
    done = pip_calls(tmp_path, "torch==", DEVICE="cuda")
    assert done.stdout == f"install -c constraints.txt torch=={PINNED['torch']}\n"


def test_an_unknown_device_ends_the_build(tmp_path: Path) -> None:
    done = pip_calls(tmp_path, "torch==", DEVICE="tpu")
    assert done.returncode == 1 and "allowed: cpu, cuda" in done.stderr


@pytest.mark.parametrize(("device", "extras"), [("cpu", ["ray"]), ("cuda", ["ray", "gpu"])])
def test_the_image_has_what_the_project_depends_on(tmp_path: Path, device: str, extras: list[str]) -> None:
    done = pip_calls(tmp_path, "requirements.txt", DEVICE=device)
    assert done.stdout == "install -c constraints.txt -r requirements.txt ray[default,serve]\n", done.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [name for extra in extras for name in project["optional-dependencies"][extra]]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == project["dependencies"] + optional


def test_the_container_does_not_run_as_the_superuser() -> None:
    assert int(of("USER")[-1]) > 0  # a number: Kubernetes does not look a name up
    assert f"useradd --uid {of('USER')[-1]} " in of("RUN")[-1]


def test_the_container_serves_the_configuration_that_was_copied_at_the_port_that_is_asked_for_its_health() -> None:
    command = words("ENTRYPOINT") + words("CMD")
    assert command[:2] == ["phalanx", "serve"]
    parse_phalanx(command[1:])
    assert of("COPY")[-1].split() == ["configs/single.yaml", command[2]]
    port = command[command.index("--port") + 1]
    assert words("HEALTHCHECK")[-1] == f"http://127.0.0.1:{port}/health"
    assert of("EXPOSE") == [port]
    assert of("STOPSIGNAL") == ["SIGTERM"]
