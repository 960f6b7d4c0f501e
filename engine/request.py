"""A request from the caller's side: its tokens, its text, and when it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from phalanx.engine.guide import Guide
from phalanx.engine.messages import TokenLogprobs
from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import RequestError
from phalanx.models.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length", "abort"]


class Delta(NamedTuple):
    """What a step added to a completion of a request. text may lag behind the tokens: characters of several tokens,
    possible stop strings.
    """

    request: int
    completion: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. queued_s: until it was planned for the first time. time_to_first_token_s: from the request on.
    time_per_output_token_s: mean of the tokens after it.
    """

    queued_s: float
    time_to_first_token_s: float
    time_per_output_token_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the `n` completions of a prompt. text: of the new tokens, without the stop string that ended it."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request. What is said of a completion is also said here, of the first.

    request: place of the prompt in the call. prompt_logprobs: of the prompt's tokens after the first, where asked for.
    num_cached_tokens: of the prompt, whose keys and values were there already.
    """

    request: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason

    @property
    def timings(self) -> Timings:
        return self.completions[0].timings

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.completions[0].logprobs


class Event(NamedTuple):
    """Something that happened to a request: more of it, all of it, or the error that ended it."""

    request: Request
    what: Delta | RequestOutput | Exception


class Mailbox(Protocol):
    """Where a caller hears of its requests."""

    def put(self, events: list[Event]) -> None:
        """Takes what a step brought. Called from the engine's thread: it must not block."""


@dataclass(slots=True)
class Track:
    """A completion under way. guide: says what it may draw next, None where anything."""

    request: Request
    index: int
    stream: TextStream | None
    guide: Guide | None = None
    name: int = -1  # of its sequence
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    held_back: str = ""
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    def admit(self, now_s: float, num_cached_tokens: int) -> None:
        """Takes note that it is planned, with so much of its prompt computed already."""
        self.admitted_s = now_s
        self.num_cached_tokens = num_cached_tokens

    def push(
        self, token: int, logprobs: TokenLogprobs | None, ending: Literal["stop", "length"] | None, now_s: float
    ) -> Delta:
        """Takes a drawn token. A stop token, the ending `stop`, is kept in `token_ids` but not in the text."""
        self.token_ids.append(token)
        self.last_token_s = now_s
        if len(self.token_ids) == 1:
            self.first_token_s = now_s
        given = () if logprobs is None else (logprobs,)
        self.logprobs.extend(given)
        text = ""
        if ending == "stop":
            self.finish_reason = "stop"
            text = self._rest()
        elif self.stream is not None:
            text = self._release(self.stream.push(token))
        if ending == "length" and self.finish_reason is None:
            self.finish_reason = "length"
            text += self._rest()
        self.text += text
        return Delta(self.request.place, self.index, (token,), text, given, self.finish_reason)

    def abort(self) -> Delta:
        self.finish_reason = "abort"
        text = self._rest()
        self.text += text
        return Delta(self.request.place, self.index, (), text, (), "abort")

    def completion(self) -> Completion:
        if self.finish_reason is None:
            raise RuntimeError(f"completion {self.index} of request {self.request.name} is not finished")
        decode_s = self.last_token_s - self.first_token_s
        return Completion(
            token_ids=tuple(self.token_ids),
            text=self.text,
            finish_reason=self.finish_reason,
            timings=Timings(
                queued_s=max(0.0, self.admitted_s - self.request.arrived_s),
                time_to_first_token_s=max(0.0, self.first_token_s - self.request.arrived_s),
                time_per_output_token_s=decode_s / max(1, len(self.token_ids) - 1),
            ),
            logprobs=None if self.request.params.logprobs is None else tuple(self.logprobs),
        )

    def _release(self, text: str) -> str:
        """The part of the text that no stop string can take back any more; ends the track where one is complete."""
        self.held_back += text
        params = self.request.params
        if not params.stop:
            return self._take(len(self.held_back))
        found = []
        if len(self.token_ids) >= params.min_tokens:
            found = [place for stop in params.stop if (place := self.held_back.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            released = self.held_back[: min(found)]
            self.held_back = ""
            return released
        return self._take(len(self.held_back) - max(_overlap(self.held_back, stop) for stop in params.stop))

    def _rest(self) -> str:
        """What is still held back at the end."""
        if self.stream is None:
            return ""
        return self._take(len(self.held_back)) + self.stream.finish()

    def _take(self, count: int) -> str:
        released, self.held_back = self.held_back[:count], self.held_back[count:]
        return released


@dataclass(slots=True)
class Request:
    """The truth about one request.

    name: of the call that it came with, never used again. place: of its prompt in that call. seed: what its draws are
    keyed by, fixed when it comes in. stop_tokens: that end it. priority: lower comes first. mailbox: hears of it.
    """

    name: str
    place: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_tokens: frozenset[int]
    priority: int
    arrived_s: float
    mailbox: Mailbox
    tracks: list[Track] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(track.finish_reason is not None for track in self.tracks)

    def output(self) -> RequestOutput:
        return RequestOutput(
            request=self.place,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            completions=tuple(track.completion() for track in self.tracks),
            prompt_logprobs=None if self.params.prompt_logprobs is None else tuple(self.prompt_logprobs),
            num_cached_tokens=self.tracks[0].num_cached_tokens,
        )


def new_request(
    prompt: str | Sequence[int],
    params: SamplingParams,
    *,
    name: str,
    place: int,
    tokenizer: Tokenizer | None,
    eos_token_ids: tuple[int, ...],
    seed: int,
    priority: int,
    mailbox: Mailbox,
    now_s: float,
) -> Request:
    """Encodes the prompt where it is text. Without a tokenizer prompts are token ids and there is no text.

    seed: where the parameters bring none. Raises RequestError for what is no prompt.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer; give token ids")
        token_ids = tuple(tokenizer.encode(prompt))
    else:
        if not isinstance(prompt, Sequence) or not all(issubclass(kind, int) for kind in set(map(type, prompt))):
            raise RequestError(f"a prompt is text or a list of token ids, found {prompt!r:.80}")
        token_ids = tuple(map(int, prompt))
    if params.stop and tokenizer is None:
        raise RequestError("stop strings need a tokenizer; use stop_token_ids")
    stop_tokens = set(params.stop_token_ids)
    if not params.ignore_eos:
        stop_tokens.update(eos_token_ids)
    request = Request(
        name=name,
        place=place,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=token_ids,
        params=params,
        seed=seed if params.seed is None else params.seed,
        stop_tokens=frozenset(stop_tokens),
        priority=priority,
        arrived_s=now_s,
        mailbox=mailbox,
    )
    for index in range(params.n):
        stream = None if tokenizer is None else tokenizer.stream(params.skip_special_tokens, continuation=True)
        guide = None if params.guide is None else params.guide()
        request.tracks.append(Track(request, index, stream, guide))
    return request


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that may be the beginning of the stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
