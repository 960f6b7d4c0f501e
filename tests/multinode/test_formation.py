"""A formation over two hosts: Ray's head in one, a raylet in the other, `phalanx generate` beside the head."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from tests.multinode.netlab import Net
from tests.multinode.ray_nodes import RayNodes, ray_nodes
from tests.tiny_models import TINY_MODELS, make

from phalanx import LLM, SamplingParams

pytest.importorskip("ray", reason="needs Ray: pip install 'phalanx[ray]'")

ROOT = Path(__file__).parents[2]
CONFIG = """
model: {{path: {model}, dtype: float32}}
cluster: {{ray: "{ray}", device: cpu, cpus_per_rank: 1, spread_stage: true, start_timeout_s: 60}}
engine: {{kv_cache: 1MiB, max_batch_tokens: 64}}
"""
NEW_TOKENS = 12
MAIN = "from phalanx.cli import main; main()"
PROMPTS = ("Where hosts meet", "a second, longer prompt that goes beside the first")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(TINY_MODELS["smollm2"], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def nodes(needs_hosts: None) -> Iterator[RayNodes]:
    """One core on each of two hosts: no two ranks can be on one."""
    with Net(["alpha", "beta"]) as net, ray_nodes(net, num_cpus=1, env={"PYTHONPATH": str(ROOT / "src")}) as running:
        yield running


def generate(nodes: RayNodes, config: Path, *settings: str) -> tuple[list[list[int]], str]:
    """Tokens of each prompt, and what was told on standard error, by a program on the head's host."""
    command = [sys.executable, "-c", MAIN, "generate", str(config), "--json", "--ignore-eos"]
    command += ["--max-tokens", str(NEW_TOKENS)]
    command += [part for text in PROMPTS for part in ("-p", text)]
    command += [part for each in settings for part in ("--set", each)]
    env = {**nodes.env, "COLUMNS": "250"}  # lines of the start-up table are not to be broken
    process = nodes.net.popen("alpha", command, env=env, stdout=PIPE, stderr=PIPE, text=True)
    output, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    return [json.loads(line)["token_ids"] for line in output.splitlines()[:-1]], told


def test_tokens_over_two_hosts_are_those_of_one_rank(nodes: RayNodes, model: Path, tmp_path: Path) -> None:
    with LLM(
        model={"path": str(model), "dtype": "float32"},
        cluster={"ray": "none", "device": "cpu"},
        engine={"kv_cache": "1MiB", "max_batch_tokens": 64},
    ) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    alone = [list(output.token_ids) for output in outputs]
    assert [len(set(tokens)) > 1 for tokens in alone] == [True, True]
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(model=model, ray=nodes.address))
    for layout in ("parallel.pipeline=2", "parallel.tensor=2"):
        tokens, told = generate(nodes, config, layout)
        assert tokens == alone
        places = re.search(r"hierarchical .*ranks in several network namespaces: 0 on (\w+); 1 on (\w+)", told)
        assert places is not None, told
        assert set(places.groups()) == {"alpha", "beta"}
