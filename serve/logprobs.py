"""Log-probabilities as clients know them: by text, with the bytes where the text is not whole characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from phalanx.models.tokenizer import Tokenizer
from phalanx.serve.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob

if TYPE_CHECKING:
    from phalanx.engine.messages import TokenLogprobs  # with torch, which the process that reads requests does without

LEAST = -9999.0  # in place of minus infinity, which JSON does not have


def completion_logprobs(
    tokenizer: Tokenizer, first: int | None, found: Sequence[TokenLogprobs], offset: int
) -> CompletionLogprobs:
    """In the form of completions. first: a token before those found, which has no probability, or None. offset: of the
    first character in the text.
    """
    tokens = [] if first is None else [token_text(tokenizer, first)]
    tokens += [token_text(tokenizer, each.token) for each in found]
    offsets = []
    for text in tokens:
        offsets.append(offset)
        offset += len(text)
    unknown: list[None] = [] if first is None else [None]
    return {
        "tokens": tokens,
        "token_logprobs": [*unknown, *(_finite(each.logprob) for each in found)],
        "top_logprobs": [*unknown, *(_by_text(tokenizer, each) for each in found)],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, found: Iterable[TokenLogprobs]) -> ChatLogprobs:
    """In the form of chats."""
    return {
        "content": [
            {
                **_token(tokenizer, each.token, each.logprob),
                "top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in each.top],
            }
            for each in found
        ]
    }


def prompt_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprobs]) -> list[dict[str, object] | None]:
    """By token id, as vLLM has them: none for the first token, then those of each and of the likeliest."""
    listed: list[dict[str, object] | None] = [None]
    for each in found:
        ranked = [token for token, _ in each.top]
        entries: dict[str, object] = {}
        for token, logprob in (*each.top, (each.token, each.logprob)):
            rank = ranked.index(token) + 1 if token in ranked else None
            entries[str(token)] = {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": token_text(tokenizer, token),
            }
        listed.append(entries)
    return listed


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token stands for, as text; bytes that are no whole characters by their values, to tell them apart."""
    data = tokenizer.token_bytes(token, skip_special_tokens=False)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _by_text(tokenizer: Tokenizer, each: TokenLogprobs) -> dict[str, float]:
    pairs = [*each.top, (each.token, each.logprob)]
    return {token_text(tokenizer, token): _finite(logprob) for token, logprob in pairs}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> TokenLogprob:
    data = tokenizer.token_bytes(token, skip_special_tokens=False)
    return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
