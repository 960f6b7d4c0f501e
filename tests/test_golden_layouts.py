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
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        path = Path(resolve_model("smollm2-135m").location)
        where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        self._model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
        self.prompts: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        self._known: dict[tuple[int, ...], list[int]] = {}

    def greedy(self, prompt: list[int], tokens: list[int]) -> list[int]:
        """The most likely token after the prompt and after each of `tokens` but the last."""
        sequence = tuple(prompt + tokens)
        if sequence not in self._known:
            with torch.inference_mode():
                logits = self._model(torch.tensor([sequence])).logits[0]
            self._known[sequence] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return self._known[sequence]


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
        pytest.param({"tensor": 1, "replicas": 2}, id="replicas-2"),
    ],
)
def test_greedy_tokens_equal_those_of_transformers(parallel: dict[str, Any], golden: Golden) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(
        model={"path": "smollm2-135m", "dtype": "float32"},
        cluster={"ray": "none", "device": "cpu"},
        parallel=parallel,
        engine={"kv_cache": "128MiB", "max_batch_tokens": 300},
    ) as llm:
        outputs = llm.generate(golden.prompts, params)
    for prompt, output in zip(golden.prompts, outputs, strict=True):
        tokens = list(output.token_ids)
        assert len(tokens) == NEW_TOKENS
        assert tokens == golden.greedy(prompt, tokens)
