"""The same greedy tokens as transformers in float32, for every family, through real processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import TINY_MODELS, Reference, make

from phalanx import LLM, SamplingParams

NEW_TOKENS = 32
PROMPTS = (
    "A heron",
    "The bridge was small, and old, and made of stone; under it lived a heron who counted boats.",
    [319, 7, 256, 300, 31, 64, 128, 255, 0, 290, 12, 77, 45],  # some of them without text
)
# More than rounding in float32 can turn (some 1e-5), so that a token has one right answer.
MARGIN = 1e-3

SINGLE: dict[str, Any] = {}
TENSOR: dict[str, Any] = {"tensor": 2}
PIPELINE: dict[str, Any] = {"pipeline": 2}
RAGGED: dict[str, Any] = {"stages": [{"tensor": 3}, {"tensor": 1}]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def save(name: str) -> Path:
        return make(TINY_MODELS[name], tmp_path_factory.mktemp(name))

    return save


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        *(pytest.param(name, SINGLE, id=f"{name}-1x1") for name in TINY_MODELS),
        pytest.param("llama-3.1", RAGGED, id="llama-3.1-ragged-3-1"),
        pytest.param("llama-biased", TENSOR, id="llama-biased-tensor-2"),
        pytest.param("mistral", PIPELINE, id="mistral-pipeline-2"),
        pytest.param("qwen2", TENSOR, id="qwen2-tensor-2"),
        pytest.param("qwen3", RAGGED, id="qwen3-ragged-3-1"),
        pytest.param("mixtral", RAGGED, id="mixtral-ragged-3-1"),
        pytest.param("smollm2", PIPELINE, id="smollm2-pipeline-2"),
    ],
)
def test_greedy_tokens_equal_those_of_transformers(
    saved: Callable[[str], Path], name: str, parallel: dict[str, Any]
) -> None:
    """Prompts are longer than a step, so that they are computed in chunks beside each other's new tokens."""
    directory = saved(name)
    with LLM(
        model={"path": str(directory), "dtype": "float32"},
        cluster={"ray": "none", "device": "cpu"},
        parallel=parallel,
        engine={"kv_cache": "8MiB", "max_sequences": 8, "max_batch_tokens": 24, "page_size": 4},
    ) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    reference = Reference(directory)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        prompt_tokens, tokens = list(output.prompt_token_ids), list(output.token_ids)
        assert len(prompt_tokens) == len(prompt)  # a token a byte
        assert len(tokens) == NEW_TOKENS
        # One pass over prompt and tokens answers for all: where each is the likeliest after those before it, they are
        # what greedy decoding gives.
        likeliest = reference.logits(prompt_tokens + tokens)[len(prompt_tokens) - 1 : -1].topk(2)
        assert tokens == likeliest.indices[:, 0].tolist()
        assert (likeliest.values[:, 0] - likeliest.values[:, 1]).min() > MARGIN
        assert len(set(tokens)) > NEW_TOKENS // 3, "a model that repeats itself proves little"


def test_one_model_is_sharded_and_one_is_stored_in_bfloat16(saved: Callable[[str], Path]) -> None:
    """So that the index of shards, and the widening of what is stored, are on the path of the test above."""
    assert (saved("llama-3.1") / "model.safetensors.index.json").is_file()
    assert len(list(saved("llama-3.1").glob("model-*.safetensors"))) > 1
    assert TINY_MODELS["qwen2"].dtype == torch.bfloat16
