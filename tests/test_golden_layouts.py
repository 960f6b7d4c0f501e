"""The same greedy tokens as transformers in float32, in every layout, through real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx import LLM, SamplingParams
from phalanx.models.resolve import resolve_model

NEW_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Three ways in which a river differs from a canal: first, a river finds its own way to the sea, while",
    "Once upon a time " + "there was a small stone bridge, and under it lived a heron who counted boats. " * 32,
)


class Golden:
    """The float32 model of transformers, asked whether given tokens are its greedy ones.

    One pass over prompt and tokens answers for all of them: where each is the most likely after those before it, they
    are what greedy decoding gives, token by token.
    """

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, GgufConfig

        source = resolve_model("smollm2-135m")
        path = Path(source.location)
        self._model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = source.tokenizer()  # in place of theirs, which takes seconds to read: any tokens would do
        self.prompts: list[list[int]] = [tokenizer.encode(prompt) for prompt in PROMPTS]
        self._known: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}  # tokens asked for, and answers

    def greedy(self, prompt: list[int], tokens: list[int]) -> list[int]:
        """The most likely token after the prompt and after each of `tokens` but the last."""
        known, likeliest = self._known.get(tuple(prompt), ([], []))
        if tokens != known[: len(tokens)]:
            with torch.inference_mode():
                logits = self._model(torch.tensor([prompt + tokens])).logits[0]
            likeliest = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            self._known[tuple(prompt)] = tokens, likeliest
        return likeliest[: len(tokens)]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def test_the_prompts_have_different_lengths_and_one_is_over_500_tokens(golden: Golden) -> None:
    lengths = [len(prompt) for prompt in golden.prompts]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] > 500


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({}, id="1x1"),
        pytest.param({"tensor": 2}, id="tensor-2"),
        pytest.param({"tensor": 3}, id="tensor-3"),
        pytest.param({"tensor": 4}, id="tensor-4"),
        pytest.param({"tensor": 5}, id="tensor-5"),
        pytest.param({"pipeline": 2}, id="pipeline-2"),
        pytest.param({"pipeline": 3}, id="pipeline-3"),
        pytest.param({"tensor": 2, "pipeline": 2}, id="2x2"),
        pytest.param({"stages": [{"tensor": 3, "layers": 22}, {"tensor": 1, "layers": 8}]}, id="ragged-3-1"),
        pytest.param(
            {"stages": [{"layers": 7}, {"tensor": 2, "layers": 13}, {"tensor": 1, "layers": 10}]}, id="ragged-1-2-1"
        ),
        pytest.param({"stages": [{"tensor": 2, "weights": [2, 1]}]}, id="weights-2-1"),
    ],
)
def test_greedy_tokens_equal_those_of_transformers(parallel: dict[str, Any], golden: Golden) -> None:
    check(parallel, NEW_TOKENS, golden)


def test_so_they_are_by_two_replicas(golden: Golden) -> None:
    check({"tensor": 1, "replicas": 2}, NEW_TOKENS // 4, golden)


def check(parallel: dict[str, Any], num_tokens: int, golden: Golden) -> None:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    with LLM(
        model={"path": "smollm2-135m", "dtype": "float32"},
        cluster={"ray": "none", "device": "cpu"},
        parallel=parallel,
        engine={"kv_cache": "128MiB", "max_batch_tokens": 300},
    ) as llm:
        outputs = llm.generate(golden.prompts, params)
    for prompt, output in zip(golden.prompts, outputs, strict=True):
        tokens = list(output.token_ids)
        assert len(tokens) == num_tokens
        assert tokens == golden.greedy(prompt, tokens)
