"""A cluster of two raylets that stand for two nodes: `two-nodes.yaml`, and named deployments on it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.launcher.ray_folder import make_ray_folder
from typer.testing import CliRunner, Result

from phalanx import LLM, SamplingParams, launch
from phalanx.cli import app
from phalanx.errors import PhalanxError, PlacementError
from phalanx.launcher.deployment import NAMESPACE
from phalanx.launcher.ray_cluster import RayCluster, reread_token
from phalanx.models.resolve import ModelSource

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'phalanx[ray]'")

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPT = "The capital of France is"
SMALL = ("cluster.device=cpu", "engine.kv_cache=64MiB", "model.dtype=float32")


@pytest.fixture(scope="module")
def cluster(smollm2: ModelSource) -> Iterator[str]:
    """Address of a cluster of two nodes, labelled as `two-nodes.yaml` says."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        reread_token()
        directory = make_ray_folder(patch)
        node = {"include_dashboard": False, "object_store_memory": 80 << 20, "num_cpus": 2}
        head = {**node, "temp_dir": directory, "labels": {"place": "first"}}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes.add_node(**node, labels={"place": "second"})
            patch.setenv("RAY_ADDRESS", nodes.address)  # what `auto` joins
            held = RayCluster(nodes.address, 0)
            yield nodes.address
            held.close()
        finally:
            ray.shutdown()
            nodes.shutdown()
            shutil.rmtree(directory, ignore_errors=True)
    reread_token()


def phalanx(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def labels() -> dict[str, str]:
    return {node["NodeID"]: node["Labels"].get("place", "") for node in ray.nodes()}


def test_two_nodes_yaml_puts_a_stage_on_each_node(cluster: str) -> None:
    with LLM.from_yaml(
        CONFIGS / "two-nodes.yaml", cluster={"ray": cluster}, engine={"kv_cache": "64MiB"}, model={"dtype": "float32"}
    ) as llm:
        [group] = [g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED"]
        place = labels()
        assert [place[node] for _, node in sorted(group["bundles_to_node_id"].items())] == ["first"] * 2 + [
            "second"
        ] * 2
        assert llm.generate(PROMPT, SamplingParams(max_tokens=2))[0].text == " Paris."


def test_a_deployment_from_launch_to_stop(cluster: str) -> None:
    handle = launch(CONFIGS / "single.yaml", "demo", overrides=("cluster.ray=" + cluster, *SMALL))
    try:
        found = ray.get_actor("demo", namespace=NAMESPACE)
        [output] = ray.get(found.generate.remote([PROMPT], SamplingParams(max_tokens=2)))
        assert output.text == " Paris."
        deltas = [
            ray.get(each)
            for each in handle.stream.options(num_returns="streaming").remote(PROMPT, SamplingParams(max_tokens=2))
        ]
        assert "".join(delta.text for delta in deltas[:-1]) == deltas[-1].text == " Paris."
        with pytest.raises(PhalanxError, match="asks for 9000 more"):
            ray.get(handle.generate.remote(PROMPT, SamplingParams(max_tokens=9000)))
        with pytest.raises(PlacementError, match="'demo' runs already"):
            launch(CONFIGS / "single.yaml", "demo", overrides=("cluster.ray=" + cluster, *SMALL))
        shown = phalanx("status", "--address", cluster, "--json")
        assert '"state": "running"' in shown.stdout
        assert '"output_tokens": 4' in shown.stdout
    finally:
        stopped = phalanx("stop", "demo", "--address", cluster)
    assert stopped.exit_code == 0
    assert phalanx("status", "--address", cluster).stdout.strip() == "no deployments"
    with pytest.raises(PhalanxError, match="no deployment 'demo'; running: none"):
        from phalanx.launcher.deployment import stop

        stop("demo")


def test_a_deployment_outlives_the_program_that_launched_it_and_tells_of_a_dead_rank(cluster: str) -> None:
    arguments: list[str] = ["launch", str(CONFIGS / "single.yaml"), "--name", "lasting"]
    for setting in (f"cluster.ray={cluster}", "parallel.tensor=2", *SMALL):
        arguments += ["--set", setting]
    program = "import sys; from phalanx.cli import main; sys.argv[0] = 'phalanx'; main()"
    launched = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert launched.returncode == 0, launched.stderr
    handle = ray.get_actor("lasting", namespace=NAMESPACE)
    status: dict[str, Any] = ray.get(handle.status.remote())
    assert status["state"] == "running"
    assert status["layout"] == "2 ranks, 30 layers"
    os.kill(status["ranks"][1]["pid"], signal.SIGKILL)
    with pytest.raises(PhalanxError, match=r"rank 1 .* failed"):
        ray.get(handle.generate.remote(PROMPT, SamplingParams(max_tokens=2)))
    assert ray.get(handle.status.remote())["state"] == "failed"
    assert phalanx("stop", "lasting", "--address", cluster).exit_code == 0


def test_a_launch_that_fails_leaves_no_name_behind(cluster: str) -> None:
    with pytest.raises(PhalanxError, match="stage 0 needs 3 ranks on one node"):
        launch(
            CONFIGS / "single.yaml",
            "never",
            overrides=("cluster.ray=" + cluster, "parallel.tensor=3", "cluster.cpus_per_rank=1", *SMALL),
        )
    assert phalanx("status", "--address", cluster).stdout.strip() == "no deployments"


def test_a_deployment_needs_ray() -> None:
    with pytest.raises(PhalanxError, match=r"set cluster\.ray to auto or host:port"):
        launch(CONFIGS / "single.yaml", "x", overrides=("cluster.ray=none",))
