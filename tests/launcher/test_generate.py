"""`phalanx generate`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from phalanx.cli import app
from phalanx.models.resolve import ModelSource

CONFIG = """
model: {path: smollm2-135m, dtype: float32}
cluster: {ray: none, device: cpu}
engine: {kv_cache: 64MiB}
"""


@pytest.fixture
def config(tmp_path: Path, smollm2: ModelSource) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def phalanx(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_text_goes_to_standard_output_and_all_else_to_standard_error(config: Path) -> None:
    result = phalanx("generate", config, "-p", "The capital of France is", "--max-tokens", 3)
    assert result.exit_code == 0
    assert result.stdout == " Paris.\n\n"
    for part in ("ready in", "ray", "actors", "imports", "rendezvous", "weights", "warmup", "first token after"):
        assert part in result.stderr


def test_a_prompt_from_standard_input(config: Path) -> None:
    result = phalanx("generate", config, "-p", "-", "--max-tokens", 1, stdin="The capital of France is")
    assert result.stdout == " Paris\n"


def test_json_lines_in_the_order_of_the_prompts_then_a_summary(config: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "One two three four", "max_tokens": 9}\n'
        '{"prompt_token_ids": [504, 3575, 282, 4649, 314], "max_tokens": 1}\n'
        '{"prompt": "Hello", "max_tokens": 4, "temperature": 1.0, "seed": 5, "logprobs": 2}\n'
    )
    result = phalanx("generate", config, "--prompts", prompts, "--json", "--ignore-eos")
    assert result.exit_code == 0, result.stderr
    *outputs, last = lines(result)
    assert [len(output["token_ids"]) for output in outputs] == [9, 1, 4]
    assert outputs[1]["text"] == " Paris"
    assert outputs[1]["prompt_token_ids"] == [504, 3575, 282, 4649, 314]
    assert [output["finish_reason"] for output in outputs] == ["length"] * 3
    assert outputs[0]["timings"]["time_to_first_token_s"] > 0
    assert outputs[0]["timings"]["time_per_output_token_s"] > 0
    assert [len(each["top"]) for each in outputs[2]["logprobs"]] == [2] * 4
    summary = last["summary"]
    assert set(summary["startup_s"]) >= {"ray", "actors", "imports", "rendezvous", "weights", "warmup"}
    assert summary["layout"] == "1 rank, 30 layers"
    assert summary["output_tokens_per_s"] > 0


def test_the_same_seed_gives_the_same_text_in_another_layout_and_batch(config: Path) -> None:
    sampling = ("-p", "Once upon a time", "--temperature", 1, "--top-p", 0.95, "--seed", 11, "--max-tokens", 12)
    alone = phalanx("generate", config, *sampling, "--json")
    beside = phalanx("generate", config, "-p", "Hi", *sampling, "--json", "--set", "parallel.tensor=2")
    assert lines(alone)[0]["token_ids"] == lines(beside)[1]["token_ids"]


def test_chat_uses_the_models_template(config: Path) -> None:
    result = phalanx("generate", config, "--chat", "-p", "What is the capital of France?", "--max-tokens", 30, "--json")
    output = lines(result)[0]
    assert output["prompt_token_ids"][0] == 1  # <|im_start|>
    assert "Paris" in output["text"]
    assert output["finish_reason"] == "stop"


def test_without_a_prompt_nothing_is_started(config: Path) -> None:
    result = phalanx("generate", config)
    assert result.exit_code == 2
    assert "at least one prompt" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-tokens", 9000), "prompt has 1 tokens and asks for 9000 more"),
        (("--set", "paralel.tensor=2"), "did you mean `parallel`"),
        (("--set", "parallel.tensor=10"), "the model has 9 query heads"),
        (("--top-p", 3), "top_p is 3.0; allowed: above 0, up to 1"),
        (("--set", "model.path=no-such-model"), "no-such-model"),
    ],
)
def test_errors_name_cause_and_remedy(config: Path, arguments: tuple[object, ...], message: str) -> None:
    result = phalanx("generate", config, "-p", "x", *arguments)
    assert result.exit_code != 0
    assert message in f"{result.exception} {result.stderr}"


def test_several_completions_of_a_prompt(config: Path) -> None:
    sampling = ("-n", 2, "--temperature", 1, "--seed", 11, "--max-tokens", 5, "--ignore-eos")
    [output, last] = lines(phalanx("generate", config, "-p", "Once upon a time", *sampling, "--json"))
    assert len({tuple(each["token_ids"]) for each in output["completions"]}) == 2
    assert output["token_ids"] == output["completions"][0]["token_ids"]
    assert last["summary"]["output_tokens"] == 10
    text = phalanx("generate", config, "-p", "Once upon a time", *sampling)
    assert text.stdout == "".join(each["text"] + "\n" for each in output["completions"])
