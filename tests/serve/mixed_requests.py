"""Requests of every form that has one right answer: greedy, or drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
ALPHABET = "abcdefghijklmnopqrstuvwxyz ,.!?é€"


def mixed_requests(
    number: int, *, max_tokens: int, vocab_size: int = 250, seed: int = 0
) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies. Prompts of two to 100 characters or tokens; many begin alike."""
    chance = random.Random(seed)
    common_tokens = [chance.randrange(4, vocab_size) for _ in range(40)]
    common_text = "".join(chance.choices(ALPHABET, k=40))
    made: list[tuple[str, dict[str, Any]]] = []
    for place in range(number):
        length = chance.randint(2, 60)
        text = common_text[: chance.choice((0, 18, 40))] + "".join(chance.choices(ALPHABET, k=length))
        tokens = common_tokens[: chance.choice((0, 18, 40))] + chance.choices(range(4, vocab_size), k=length)
        body: dict[str, Any] = {"max_tokens": chance.randint(max_tokens // 3, max_tokens)}
        drawn = {"temperature": chance.choice((0.7, 1.0, 1.3)), "seed": place, "top_p": chance.choice((1.0, 0.9))}
        body |= drawn if chance.random() < 0.5 else {"temperature": 0}
        for likely, fields in (
            (0.25, {"n": 2}),
            (0.25, {"presence_penalty": 0.6, "frequency_penalty": 0.4}),
            (0.2, {"repetition_penalty": 1.2}),
            (0.3, {"stop": ["e", "\ufffd\ufffd", "?!"]}),
            (0.2, {"logit_bias": {"70": 5, "71": -100}}),
            (0.1, {"guided_regex": "[a-z]{5,30}"}),
            (0.6, {"ignore_eos": True}),
        ):
            if chance.random() < likely:
                body |= fields
        if "guided_regex" in body:
            body.pop("ignore_eos", None)
        if place % 3 == 2:
            roles = ("system", "user") if chance.random() < 0.5 else ("user",)
            made.append((CHATS, {"messages": [{"role": role, "content": text} for role in roles], **body}))
        else:
            made.append((COMPLETIONS, {"prompt": text if place % 3 else tokens, **body}))
    return made


def is_plain_greedy(body: Mapping[str, Any]) -> bool:
    """Whether every token is the model's likeliest one, up to the length that is asked for."""
    return body["temperature"] == 0 and not body.keys() & {
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "guided_regex",
    }
