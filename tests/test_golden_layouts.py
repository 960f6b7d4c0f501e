"""The same greedy tokens as transformers in float32, in every layout, through real processes."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from phalanx import LLM, SamplingParams
from phalanx.models.resolve import resolve_model

NEW_TOKENS = 20  # more than a page: every sequence goes on in another one
BFLOAT16_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Three ways in which a river differs from a canal: first, a river finds its own way to the sea, while",
    "Once upon a time " + "there was a small stone bridge, and under it lived a heron who counted boats. " * 28,
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
        with pytest.MonkeyPatch.context() as patch:  # or the file is read twice, and names are made up 397 times
            for name in ("GGUFReader", "get_tensor_name_map"):
                patch.setattr(gguf, name, cache(getattr(gguf, name)))
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        self._models = {torch.float32: model}
        tokenizer = source.tokenizer()  # in place of theirs, which takes seconds to read: any tokens would do
        self.prompts: list[list[int]] = [tokenizer.encode(prompt) for prompt in PROMPTS]
        self._known: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}  # tokens asked for, and answers

    def greedy(self, prompt: list[int], tokens: list[int]) -> list[int]:
        """The most likely token after the prompt and after each of `tokens` but the last."""
        known, likeliest = self._known.get(tuple(prompt), ([], []))
        if tokens != known[: len(tokens)]:
            likeliest = self.logits(prompt, tokens).argmax(-1).tolist()
            self._known[tuple(prompt)] = tokens, likeliest
        return likeliest[: len(tokens)]

    @torch.inference_mode()
    def logits(self, prompt: list[int], tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[len(tokens), vocabulary] float32, as computed in `dtype`."""
        if dtype not in self._models:
            self._models[dtype] = deepcopy(self._models[torch.float32]).to(dtype)
        logits: torch.Tensor = self._models[dtype](torch.tensor([prompt + tokens])).logits[0].float()
        return logits[len(prompt) - 1 : -1]


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
        pytest.param({"pipeline": 3, "head": "shared"}, id="pipeline-3"),
        pytest.param({"tensor": 2, "pipeline": 2, "head": "shared"}, id="2x2"),
        pytest.param({"stages": [{"tensor": 3, "layers": 22}, {"tensor": 1, "layers": 8}]}, id="ragged-3-1"),
        pytest.param(
            {"stages": [{"layers": 7}, {"tensor": 2, "layers": 13}, {"tensor": 1, "layers": 10}]}, id="ragged-1-2-1"
        ),
        pytest.param({"stages": [{"tensor": 2, "weights": [2, 1]}]}, id="weights-2-1"),
    ],
)
def test_greedy_tokens_equal_those_of_transformers(parallel: dict[str, Any], golden: Golden) -> None:
    check(parallel, golden)


def test_so_they_are_by_two_replicas(golden: Golden) -> None:
    check({"tensor": 1, "replicas": 2}, golden)


def check(parallel: dict[str, Any], golden: Golden) -> None:
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


def test_tokens_in_bfloat16_miss_the_likeliest_by_no_more_than_transformers_would(golden: Golden) -> None:
    """On a CPU from packed weights. Of a token that was taken for the likeliest, the exact logit lies below the largest
    by the errors of two logits at most; how large they are in bfloat16, transformers says.
    """
    with LLM(
        model={"path": "smollm2-135m", "dtype": "bfloat16"},
        cluster={"ray": "none", "device": "cpu"},
        engine={"kv_cache": "128MiB", "max_batch_tokens": 300},
    ) as llm:
        outputs = llm.generate(golden.prompts, SamplingParams(max_tokens=BFLOAT16_TOKENS, ignore_eos=True))
    likeliest = 0
    for prompt, output in zip(golden.prompts, outputs, strict=True):
        tokens = list(output.token_ids)
        exact = golden.logits(prompt, tokens)
        error = (golden.logits(prompt, tokens, torch.bfloat16) - exact).abs().max()
        missed = exact.max(-1).values - exact.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert missed.max() <= 2 * error
        likeliest += int((missed == 0).sum())
    assert likeliest > 0.9 * BFLOAT16_TOKENS * len(PROMPTS)
