"""64 streams at once over HTTP give the tokens of one request at a time, in every kind of layout.

The requests have every form that has one right answer. Those one by one are whole answers of a server that keeps no
prefixes; greedy ones are checked against transformers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.serve.live import Live, live, sections
from tests.serve.mixed_requests import is_plain_greedy, mixed_requests
from tests.serve.streams import Asked, Choice, ask, stream
from tests.tiny_models import Reference
from tokenizers import Tokenizer

NUM_STREAMS = 64
NUM_REPEATED = 12  # one by one in every layout
REQUESTS = [
    Asked(path, {**body, "return_token_ids": True}) for path, body in mixed_requests(NUM_STREAMS, max_tokens=18)
]

LAYOUTS: dict[str, dict[str, Any]] = {
    "1x1": {},
    "2x2": {"tensor": 2, "pipeline": 2},
    "ragged-3-1": {"stages": [{"tensor": 3}, {"tensor": 1}]},
}

Answers = list[tuple[Choice, ...]]


@contextmanager
def serving(folder: Path, parallel: dict[str, Any], *, prefix_cache: bool = True) -> Iterator[Live]:
    settings = sections(folder, access_log=False)
    settings["parallel"] = parallel
    settings["engine"] |= {"prefix_cache": prefix_cache, "max_sequences": 2 * NUM_STREAMS, "max_batch_tokens": 256}
    with live(settings) as server:
        yield server


async def one_by_one(server: Live, requests: Sequence[Asked] = REQUESTS) -> Answers:
    async with aiohttp.ClientSession(server.url) as session:
        return [await ask(session, asked) for asked in requests]


async def at_once(server: Live) -> tuple[Answers, int]:
    """The answers, and how many requests were open at most."""
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, server.front.service.num_open)
            await asyncio.sleep(0.002)

    async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        watching = asyncio.create_task(watch())
        answers = await asyncio.gather(*[stream(session, asked) for asked in REQUESTS])
        watching.cancel()
    return answers, most


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Answers:
    """Each request by itself, on one rank, with nothing kept between them."""
    with serving(folder, {}, prefix_cache=False) as server:
        return asyncio.run(one_by_one(server))


def test_one_by_one_greedy_tokens_are_those_of_transformers(folder: Path, alone: Answers) -> None:
    reference, tokenizer = Reference(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    checked = 0
    for asked, [choice, *_] in zip(REQUESTS, alone, strict=True):
        prompt = asked.body.get("prompt")
        if prompt is not None and is_plain_greedy(asked.body):
            prompt = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
            logits = reference.logits([*prompt, *choice.token_ids])
            assert list(choice.token_ids) == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
            checked += 1
    assert checked >= 3


def test_the_requests_have_all_forms() -> None:
    bodies = [asked.body for asked in REQUESTS]
    for name in (
        "messages",
        "stop",
        "seed",
        "n",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "guided_regex",
    ):
        assert sum(name in body for body in bodies) >= 3, name
    assert {type(body["prompt"]) for body in bodies if "prompt" in body} == {str, list}


@pytest.mark.parametrize("parallel", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_streams_at_once_give_the_tokens_of_one_by_one(parallel: dict[str, Any], folder: Path, alone: Answers) -> None:
    with serving(folder, parallel) as server:
        first = asyncio.run(one_by_one(server, REQUESTS[:NUM_REPEATED]))
        answers, most = asyncio.run(at_once(server))
        [stats] = server.engine.replica_stats()
    assert most > NUM_STREAMS / 2, "they did not run together"
    assert stats.prompt_tokens_cached > 0
    assert answers == alone
    assert first == alone[:NUM_REPEATED]
