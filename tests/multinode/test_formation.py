"""A formation over two hosts: Ray's head in one, a raylet in the other, the engine beside the head. And what comes of
the link's faults, which Ray notices too: in its own time.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from tests.multinode.net_engine import NetEngine
from tests.multinode.netlab import Net
from tests.multinode.ray_nodes import RayNodes, ray_nodes
from tests.tiny_models import TINY_MODELS, VOCAB, make

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
CUT_S, LIMIT_S = 0.5, 2.5  # Ray takes a host for lost after about 6 s
RATE_MBIT = 200.0
LONG = [[(17 * prompt + 5 * place) % VOCAB for place in range(200)] for prompt in range(12)]


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


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    """Tokens by one rank."""
    with LLM(
        model={"path": str(model), "dtype": "float32"},
        cluster={"ray": "none", "device": "cpu"},
        engine={"kv_cache": "1MiB", "max_batch_tokens": 64},
    ) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    tokens = [list(output.token_ids) for output in outputs]
    assert [len(set(each)) > 1 for each in tokens] == [True, True]
    return tokens


def assert_placed_apart(told: str) -> None:
    places = re.search(r"hierarchical.*ranks in several network namespaces: 0 on (\w+); 1 on (\w+)", told)
    assert places is not None, told
    assert set(places.groups()) == {"alpha", "beta"}


def test_tokens_over_two_hosts_are_those_of_one_rank(
    nodes: RayNodes, model: Path, alone: list[list[int]], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(model=model, ray=nodes.address))
    tokens, told = generate(nodes, config, "parallel.pipeline=2")
    assert tokens == alone
    assert_placed_apart(told)


@pytest.fixture(scope="module")
def engine(nodes: RayNodes, model: Path) -> Iterator[NetEngine]:
    """A program beside the head, which serves a model over both hosts."""
    engine = NetEngine(nodes.net, ["alpha", "beta"], nodes.env)
    assert_placed_apart("\n".join(open_formation(engine, nodes, model, LIMIT_S)))
    yield engine
    engine.process.communicate(timeout=30)


def open_formation(engine: NetEngine, nodes: RayNodes, model: Path, timeout_s: float) -> list[str]:
    return engine.open(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "cluster": {"ray": nodes.address, "device": "cpu", "cpus_per_rank": 1, "spread_stage": True},
            "parallel": {"tensor": 2},
            "comm": {"timeout_s": timeout_s},
            "engine": {"kv_cache": "4MiB", "max_batch_tokens": 256, "prefix_cache": False},
        }
    )


def run_while(engine: NetEngine, act: Callable[[], None], started: Path, do: str, **arguments: Any) -> Any:
    """What came of `do`, while `act` ran beside it once it was under way."""
    engine.start(do, started=str(started), **arguments)
    while not started.exists():
        time.sleep(0.01)
    act()
    return engine.answer()


def cut_for_good(engine: NetEngine, net: Net, started: Path) -> tuple[str, float]:
    """What a call says that is under way then, and after how many seconds."""
    cut_s: list[float] = []

    def cut() -> None:
        time.sleep(0.7)  # ranks learn of each other what they are called, a moment after they met
        net.cut("beta")
        cut_s.append(time.monotonic())

    [error] = run_while(engine, cut, started, "fail", prompts=[LONG[0][:6]], max_tokens=100)
    assert error["type"] == "RankFailedError"
    return error["message"], time.monotonic() - cut_s[0]


@pytest.mark.alone  # it compares rates
def test_a_link_throttled_or_cut_for_a_moment_costs_time_and_no_token(
    nodes: RayNodes, engine: NetEngine, alone: list[list[int]], tmp_path: Path
) -> None:
    assert engine.ask("generate", prompts=PROMPTS, max_tokens=NEW_TOKENS)["tokens"] == [alone]
    net, stop = nodes.net, tmp_path / "stop"

    def throttle_then_cut_and_restore() -> None:
        net.set_rate(RATE_MBIT / 10)
        time.sleep(0.6)
        net.cut("beta")
        time.sleep(CUT_S)
        net.restore("beta")
        stop.touch()

    net.set_rate(RATE_MBIT)
    [first] = engine.ask("generate", prompts=LONG, max_tokens=2)["tokens"]
    before = engine.ask("transfers")
    engine.ask("generate", prompts=LONG, max_tokens=2)
    between = engine.ask("transfers")
    run = {"prompts": LONG[:4], "max_tokens": 2, "stop": str(stop)}
    found = run_while(engine, throttle_then_cut_and_restore, tmp_path / "started", "generate", **run)
    after = engine.ask("transfers")
    net.set_rate(None)
    assert all(tokens == first[:4] for tokens in found["tokens"])
    fast, slow = (
        (late["bytes"] - early["bytes"]) / (late["seconds"] - early["seconds"])
        for early, late in ((before, between), (between, after))
    )
    assert slow < fast / 2
    # What was measured at the start was the machine's own speed: that no longer holds, and the choice knows it.
    told = re.search(r"as steps up to \d+ took them, sums at (\S+) MB/s .* at the start (\S+) and", *after["overlaps"])
    assert told is not None
    assert float(told[1]) < float(told[2])


def test_a_link_cut_for_good_ends_calls_but_not_the_program_and_the_error_names_both_hosts(
    nodes: RayNodes, model: Path, engine: NetEngine, tmp_path: Path
) -> None:
    # The limit of the ranks passes before Ray's: the error is that of the operation.
    told, after_s = cut_for_good(engine, nodes.net, tmp_path / "first")
    assert LIMIT_S * 0.9 < after_s < 2 * LIMIT_S + 10
    assert re.search(rf"on node (alpha|beta) .* failed: .*all_reduce.* waited longer than {LIMIT_S:g} s", told)
    assert re.search(r"or the link between here and rank [01] is cut", told)
    assert re.search(r"rank 0 is rank 0 of the replica, on (\w+), rank 1 is rank 1 of the replica, on (?!\1)", told)
    nodes.net.restore("beta")
    engine.close()

    # The same program starts anew: all that ranks held on both hosts was given back.
    open_formation(engine, nodes, model, timeout_s=60.0)

    # Ray's own checks end first: there is only Ray's word that the host is gone.
    told, _ = cut_for_good(engine, nodes.net, tmp_path / "second")
    assert re.search(r"on node beta .* failed: its node was lost: Ray's head on alpha", told)
    assert "or the link between the two nodes is cut" in told
    engine.close()
