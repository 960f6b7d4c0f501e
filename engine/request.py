"""A request from the caller's side: its tokens, its text, and when it is finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from phalanx.engine.messages import SampledToken
from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import RequestError
from phalanx.models.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length", "abort"]


class TokenLogprobs(NamedTuple):
    """Log-probability of a drawn token, and the most likely tokens at its position with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Delta(NamedTuple):
    """What a step added to a request. text may lag behind the tokens: characters of several tokens, possible stop
    strings.
    """

    request: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. time_to_first_token_s: from the request on. time_per_output_token_s: mean of the tokens after it."""

    time_to_first_token_s: float
    time_per_output_token_s: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request. text: of the new tokens, without the stop string that ended it."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(slots=True)
class Request:
    """The truth about one request. seed: what its draws are keyed by; fixed when the request comes in."""

    name: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_tokens: frozenset[int]
    arrived_s: float
    stream: TextStream | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    held_back: str = ""
    finish_reason: FinishReason | None = None
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    def push(self, drawn: SampledToken, now_s: float) -> Delta:
        """Takes a drawn token. A stop token ends the request and is kept in `token_ids` but not in the text."""
        self.token_ids.append(drawn.token)
        self.last_token_s = now_s
        if len(self.token_ids) == 1:
            self.first_token_s = now_s
        logprobs: tuple[TokenLogprobs, ...] = ()
        if drawn.logprob is not None:
            logprobs = (TokenLogprobs(drawn.token, drawn.logprob, drawn.top),)
            self.logprobs.extend(logprobs)
        text = ""
        if drawn.token in self.stop_tokens:
            self.finish_reason = "stop"
        elif self.stream is not None:
            text = self._release(self.stream.push(drawn.token))
        if self.finish_reason is None and len(self.token_ids) >= self.params.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._finish_text()
        self.text += text
        return Delta(self.name, (drawn.token,), text, logprobs, self.finish_reason)

    def abort(self) -> Delta:
        self.finish_reason = "abort"
        text = self._finish_text()
        self.text += text
        return Delta(self.name, (), text, (), "abort")

    def output(self) -> RequestOutput:
        if self.finish_reason is None:
            raise RuntimeError(f"request {self.name} is not finished")
        decode_s = self.last_token_s - self.first_token_s
        timings = Timings(
            time_to_first_token_s=max(0.0, self.first_token_s - self.arrived_s),
            time_per_output_token_s=decode_s / max(1, len(self.token_ids) - 1),
        )
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=tuple(self.token_ids),
            text=self.text,
            finish_reason=self.finish_reason,
            timings=timings,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
        )

    def _release(self, text: str) -> str:
        """The part of the text that no stop string can take back any more; ends the request where one is complete."""
        self.held_back += text
        if not self.params.stop:
            return self._take(len(self.held_back))
        found = [place for stop in self.params.stop if (place := self.held_back.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            released = self.held_back[: min(found)]
            self.held_back = ""
            return released
        return self._take(len(self.held_back) - max(_overlap(self.held_back, stop) for stop in self.params.stop))

    def _finish_text(self) -> str:
        """What is still held back when the request ends, unless a stop string ended it: then nothing is."""
        if self.stream is None:
            return ""
        stopped = self.finish_reason == "stop" and (not self.token_ids or self.token_ids[-1] not in self.stop_tokens)
        if stopped:
            return ""
        return self._take(len(self.held_back)) + self.stream.finish()

    def _take(self, count: int) -> str:
        released, self.held_back = self.held_back[:count], self.held_back[count:]
        return released


def new_request(
    name: int,
    prompt: str | list[int],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    eos_token_ids: tuple[int, ...],
    seed: int,
    now_s: float,
) -> Request:
    """Encodes the prompt where it is text. Without a tokenizer prompts are token ids and there is no text."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer; give token ids")
        token_ids = tokenizer.encode(prompt)
    else:
        token_ids = list(prompt)
    stop_tokens = set(params.stop_token_ids)
    if not params.ignore_eos:
        stop_tokens.update(eos_token_ids)
    return Request(
        name=name,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=tuple(token_ids),
        params=params,
        seed=seed if params.seed is None else params.seed,
        stop_tokens=frozenset(stop_tokens),
        arrived_s=now_s,
        stream=None if tokenizer is None else tokenizer.stream(continuation=True),
    )


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that may be the beginning of the stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
