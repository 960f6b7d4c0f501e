"""The engine under random load gives the tokens of one request at a time, in every kind of layout.

Requests arrive and are aborted at random, share beginnings, and preempt each other in a cache of a few pages more than
the longest of them needs. Greedy tokens are checked against transformers, drawn ones against a run one by one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.tiny_models import MAX_POSITION, TINY_MODELS, VOCAB, Reference, make

from phalanx import LLM, AsyncEngine, RequestOutput, SamplingParams
from phalanx.launcher.schema import ParallelSection
from phalanx.models.params import kv_bytes_per_token
from phalanx.models.resolve import resolve_model
from phalanx.parallel.layout import build_layout

NUM_REQUESTS = 24
PAGE_SIZE = 4
LONGEST = 120
NUM_PAGES = LONGEST // PAGE_SIZE + 6

LAYOUTS: dict[str, dict[str, Any]] = {
    "1x1": {},
    "2x1": {"tensor": 2},
    "1x2": {"pipeline": 2},
    "1x3": {"pipeline": 3, "head": "shared"},
    "2x2": {"tensor": 2, "pipeline": 2, "head": "shared"},
    "ragged-3-1": {"stages": [{"tensor": 3}, {"tensor": 1}]},
    "ragged-1-2": {"stages": [{"tensor": 1}, {"tensor": 2}]},
}


class Load(NamedTuple):
    """A request. aborted_after: tokens, or None for one that is left to end."""

    prompt: list[int]
    params: SamplingParams
    priority: int
    delay_s: float
    aborted_after: int | None


def loads() -> list[Load]:
    chance = random.Random(7)
    common = [chance.randrange(VOCAB) for _ in range(60)]
    made = []
    for number in range(NUM_REQUESTS):
        prompt = common[: chance.choice((0, 24, 60))] + [chance.randrange(VOCAB) for _ in range(chance.randint(1, 30))]
        aborted_after = chance.randint(1, 5) if number % 4 == 1 else None
        max_tokens = chance.randint(1, 30) if aborted_after is None else 30
        sampled: dict[str, Any] = {
            "temperature": 1.0,
            "seed": number,
            "top_p": chance.choice((1.0, 0.9)),
            "n": chance.choice((1, 2)),
        }
        options = sampled if number % 3 == 2 else {}
        if chance.random() < 0.3:
            options = {**options, "repetition_penalty": 1.2, "presence_penalty": 0.5}
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)
        made.append(
            Load(
                prompt,
                params,
                priority=chance.choice((0, 0, 0, 1)),
                delay_s=chance.random() * 0.6,
                aborted_after=aborted_after,
            )
        )
    return made


LOADS = loads()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(TINY_MODELS["smollm2"], tmp_path_factory.mktemp("model"))


def one_by_one(model: Path, kv_cache_dtype: str = "auto") -> list[RequestOutput]:
    """Each request by itself, on one rank, with nothing kept between them."""
    with LLM(
        model={"path": str(model), "dtype": "float32"},
        cluster={"ray": "none", "device": "cpu"},
        engine={"max_sequences": 2, "prefix_cache": False, "kv_cache": "4MiB", "kv_cache_dtype": kv_cache_dtype},
    ) as llm:
        return [llm.generate([load.prompt], load.params)[0] for load in LOADS]


@pytest.fixture(scope="module")
def alone(model: Path) -> list[RequestOutput]:
    return one_by_one(model)


def test_one_by_one_greedy_tokens_are_those_of_transformers(model: Path, alone: list[RequestOutput]) -> None:
    reference = Reference(model)
    for load, output in zip(LOADS, alone, strict=True):
        if load.params.temperature == 0 and load.params.repetition_penalty == 1:
            logits = reference.logits([*load.prompt, *output.token_ids])
            expected = logits[len(load.prompt) - 1 : -1].argmax(-1).tolist()
            assert list(output.token_ids) == expected


def kv_bytes(model: Path, parallel: dict[str, Any], kv_cache_dtype: str) -> int:
    """Memory a rank for `NUM_PAGES` pages."""
    config = resolve_model(str(model)).config
    section = ParallelSection(**parallel)
    layout = build_layout(config.shape, section.stage_requests(), shares_head=section.head == "shared")
    costs = [kv_bytes_per_token(config, layout, place, 4, kv_cache_dtype) for place in layout.places()]
    return NUM_PAGES * PAGE_SIZE * max(costs)


async def send(engine: AsyncEngine, load: Load, name: str) -> list[Sequence[int]]:
    """Tokens of each completion."""
    await asyncio.sleep(load.delay_s)
    tokens: list[list[int]] = [[] for _ in range(load.params.n)]
    async for event in engine.stream(load.prompt, load.params, request_id=name, priority=load.priority):
        if isinstance(event, RequestOutput):
            assert [list(each.token_ids) for each in event.completions] == tokens
            continue
        tokens[event.completion].extend(event.token_ids)
        if load.aborted_after is not None and len(tokens[0]) >= load.aborted_after:
            await engine.abort(name)
    return list(tokens)


async def run(config: dict[str, Any]) -> list[list[Sequence[int]]]:
    async with AsyncEngine(**config) as engine:
        heard = await asyncio.gather(*[send(engine, load, f"load-{number}") for number, load in enumerate(LOADS)])
        stats = await engine.stats()
    assert stats.preemptions > 0, "the cache is not tight enough to test anything"
    assert stats.prompt_tokens_cached > 0
    assert stats.aborted > 0
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    return heard


@pytest.mark.parametrize("parallel", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_tokens_under_random_load_are_those_of_one_request_at_a_time(
    parallel: dict[str, Any], model: Path, alone: list[RequestOutput]
) -> None:
    assert_the_same_tokens(parallel, model, alone)


@pytest.mark.parametrize(("layout", "kv_cache_dtype"), [("2x2", "int8"), ("ragged-3-1", "fp8")])
def test_tokens_from_a_cache_in_8_bits_are_those_of_one_request_at_a_time(
    layout: str, kv_cache_dtype: str, model: Path
) -> None:
    """Pages that are shared, given up and computed again; KV heads that two ranks hold."""
    assert_the_same_tokens(LAYOUTS[layout], model, one_by_one(model, kv_cache_dtype), kv_cache_dtype)


def assert_the_same_tokens(
    parallel: dict[str, Any], model: Path, alone: list[RequestOutput], kv_cache_dtype: str = "auto"
) -> None:
    config = {
        "model": {"path": str(model), "dtype": "float32", "max_length": min(MAX_POSITION, LONGEST)},
        "cluster": {"ray": "none", "device": "cpu"},
        "parallel": parallel,
        "engine": {
            "max_sequences": 6,
            "max_batch_tokens": 40,
            "page_size": PAGE_SIZE,
            "kv_cache": kv_bytes(model, parallel, kv_cache_dtype),
            "kv_cache_dtype": kv_cache_dtype,
        },
    }
    heard = asyncio.run(run(config))
    for load, tokens, expected in zip(LOADS, heard, alone, strict=True):
        for drawn, completion in zip(tokens, expected.completions, strict=True):
            whole = list(completion.token_ids)
            if load.aborted_after is None:
                assert drawn == whole
            else:
                assert len(drawn) >= min(load.aborted_after, len(whole)) or completion is not expected.completions[0]
                assert drawn == whole[: len(drawn)]
