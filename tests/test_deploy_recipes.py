"""The recipes of `configs/deploy`: their commands, their page, and the cluster file for `ray up`. The tests beside this
one are about those for Kubernetes, Docker and Slurm.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from tests.recipes import DEPLOY, ROOT, parse_phalanx, parse_ray

from phalanx.configs.deploy import wait_for_ray
from phalanx.launcher.config import load_config

RECIPES = sorted(path for path in DEPLOY.iterdir() if path.is_file())


def ray_up() -> dict[str, Any]:
    document = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    assert isinstance(document, dict)
    return document


def ray_starts(kind: str) -> dict[str, Any]:
    """The options of `ray start` on nodes of a kind."""
    (line,) = (line for line in ray_up()[f"{kind}_start_ray_commands"] if "ray start" in line)
    words = shlex.split(line.replace("$RAY_HEAD_IP", "192.0.2.1"))
    return parse_ray(words[words.index("ray") + 1 :])


def test_ray_takes_the_cluster_file() -> None:
    validate_config(prepare_config(ray_up()))


def test_the_nodes_have_the_labels_that_the_configuration_places_stages_by() -> None:
    config = load_config(ROOT / "configs" / "two-nodes.yaml")
    assert "configs/two-nodes.yaml" in (DEPLOY / "ray-up.yaml").read_text()
    wanted = [request.node for request in config.parallel.stage_requests()]
    assert [ray_starts("head")["labels"], ray_starts("worker")["labels"]] == wanted
    assert len(ray_up()["provider"]["worker_ips"]) + 1 == len(wanted)


def test_workers_look_for_the_head_at_its_port_and_the_head_starts_the_workers() -> None:
    assert ray_starts("head")["head"] and not ray_starts("worker")["head"]
    assert ray_starts("worker")["address"].endswith(f":{ray_starts('head')['port']}")
    assert ray_starts("head")["autoscaling_config"] == "~/ray_bootstrap_config.yaml"


def test_the_token_is_where_ray_looks_for_it_on_every_node() -> None:
    assert ray_up()["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in ray_up()["setup_commands"])


def command_lines(text: str) -> Iterator[list[str]]:
    """`phalanx COMMAND` with a YAML file, wherever a recipe shows or runs it."""
    joined = re.sub(r"\s*\\\n#?\s*", " ", text)
    for found in re.findall(r"\bphalanx ((?:[a-z]+) [^\n`'|&;]*\.yaml[^\n`'|&;]*)", joined):
        yield shlex.split(found, comments=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_command_shown_has_options_that_there_are(path: Path) -> None:
    for arguments in command_lines(path.read_text()):
        parse_phalanx(arguments)


def test_command_lines_are_found_where_they_are() -> None:
    assert list(
        command_lines("# run `phalanx serve a.yaml --port 1` or\n  exec phalanx check \\\n    b.yaml # see\n")
    ) == [
        ["serve", "a.yaml", "--port", "1"],
        ["check", "b.yaml"],
    ]
    shown = {path.name for path in RECIPES if list(command_lines(path.read_text()))}
    assert shown == {"kuberay-raycluster.yaml", "ray-up.yaml"}


def test_the_page_has_every_recipe() -> None:
    page = (DEPLOY / "README.md").read_text()
    assert [path.name for path in RECIPES if path.name != "README.md" and path.stem not in page] == []
    assert [name for name in re.findall(r"\]\(([^)]+)\)", page) if not (DEPLOY / name).exists()] == []


def test_the_configurations_that_are_named_exist() -> None:
    for path in RECIPES:
        for name in re.findall(r"(?<![\w/])configs/[\w./-]+", path.read_text()):
            assert (ROOT / name.rstrip(".")).exists(), f"{path.name}: {name}"


def test_waiting_counts_what_live_nodes_have() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 4.0}},
    ]
    assert wait_for_ray.size_of(nodes) == (2, 4, 10)
    assert str(wait_for_ray.size_of(nodes)) == "2 nodes, 4 GPUs, 10 CPU cores"
