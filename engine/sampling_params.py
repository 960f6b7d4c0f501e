"""How the tokens of one request are chosen: what a user says, and how it goes to the ranks."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from phalanx.engine.guide import Guide
from phalanx.errors import RequestError

if TYPE_CHECKING:
    from phalanx.engine.messages import Sampling

MAX_COMPLETIONS = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MIN_TEMPERATURE = 1e-6  # beside 0; far less would take a logit over it out of float64
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request; RequestError names any that is out of range.

    n: completions of the prompt. max_tokens: most new tokens of each. min_tokens: tokens that would end it are not
    drawn before so many others were, unless nothing else is allowed. temperature: 0 takes the most likely token
    (greedy), 1 samples the model's distribution. min_p: only tokens at least this fraction as likely as the most likely
    one. top_k: only the k most likely of those, 0 for all. top_p: of those, only the fewest most likely ones whose
    probabilities reach top_p. The filters act in this order after the temperature. seed: of the random draws, or None
    for one chosen by the engine. A draw depends on (seed, position) alone, so the same request gives the same tokens in
    any batch and any layout.

    These change the logits before the temperature, and greedy choices too, in this order. repetition_penalty: divides
    positive logits of tokens that are in the prompt or the output, and multiplies negative ones. frequency_penalty,
    presence_penalty: taken off the logit of a token for each time that it is in the output, and once if it is there.
    logit_bias: token ids and what is added to their logits. allowed_token_ids: the only tokens that may be drawn, None
    for all. guide: makes the `Guide` that says for each token of a completion which ones may be drawn, or None.

    stop: strings that end the text and are left out of it. stop_token_ids: tokens that end it. ignore_eos: goes on
    past the model's own end-of-text tokens. skip_special_tokens: leaves the model's control tokens out of the text.
    logprobs: log-probabilities of this many most likely tokens a position,
    beside the drawn one's; 0 for the drawn token's only, None for none. They are the model's own, before all that is
    above. prompt_logprobs: the same for the tokens of the prompt after its first.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    guide: Callable[[], Guide] | None = None

    def __post_init__(self) -> None:
        self._take_lists()
        for name, good, allowed in (*self._draw_limits(), *self._rule_limits(), *self._text_limits()):
            if not good:
                raise RequestError(f"{name} is {reprlib.repr(getattr(self, name))}; allowed: {allowed}")

    def _take_lists(self) -> None:
        """Lists and mappings become tuples, so that parameters are as frozen as they look."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) and not (value is None and name == "allowed_token_ids"):
                raise RequestError(f"{name} is {reprlib.repr(value)}; allowed: a list")
            object.__setattr__(self, name, None if value is None else tuple(value))
        try:
            object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        except (TypeError, ValueError):
            value = reprlib.repr(self.logit_bias)
            raise RequestError(f"logit_bias is {value}; allowed: a mapping of token ids to biases") from None

    def _draw_limits(self) -> Iterable[tuple[str, bool, str]]:
        cold = _number(self.temperature) and self.temperature == 0
        return (
            ("n", _whole(self.n) and 1 <= self.n <= MAX_COMPLETIONS, f"1 to {MAX_COMPLETIONS}"),
            (
                "temperature",
                cold or _within(self.temperature, MIN_TEMPERATURE, 100),
                f"0 (greedy), or {MIN_TEMPERATURE} to 100",
            ),
            ("top_k", _whole(self.top_k) and self.top_k >= 0, "0 (all tokens) or a whole number"),
            ("top_p", _within(self.top_p, 0, 1) and self.top_p > 0, "above 0, up to 1"),
            ("min_p", _within(self.min_p, 0, 1), "0 to 1"),
            ("seed", self.seed is None or (_whole(self.seed) and -(2**63) <= self.seed < 2**63), "a 64-bit integer"),
        )

    def _rule_limits(self) -> Iterable[tuple[str, bool, str]]:
        biases = _pairs(self.logit_bias)
        allowed = self.allowed_token_ids
        return (
            ("presence_penalty", _within(self.presence_penalty, -2, 2), "-2 to 2"),
            ("frequency_penalty", _within(self.frequency_penalty, -2, 2), "-2 to 2"),
            (
                "repetition_penalty",
                _within(self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
                f"{MIN_REPETITION_PENALTY} to {MAX_REPETITION_PENALTY:g}",
            ),
            (
                "logit_bias",
                len(biases) <= MAX_LOGIT_BIAS and all(_whole(t) and _within(bias, -100, 100) for t, bias in biases),
                f"up to {MAX_LOGIT_BIAS} token ids, each once, with biases of -100 to 100",
            ),
            (
                "allowed_token_ids",
                allowed is None or (len(allowed) > 0 and all(map(_whole, allowed))),
                "token ids, or None",
            ),
            ("guide", self.guide is None or callable(self.guide), "a callable that makes a guide, or None"),
            (
                "guide",
                self.guide is None or allowed is None,
                "None beside allowed_token_ids; let the guide leave them out",
            ),
        )

    def _text_limits(self) -> Iterable[tuple[str, bool, str]]:
        counted = _whole(self.max_tokens)
        return (
            ("max_tokens", counted and self.max_tokens >= 1, "a whole number of at least 1"),
            (
                "min_tokens",
                counted and _whole(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens,
                f"0 to max_tokens ({self.max_tokens})",
            ),
            (
                "stop",
                len(self.stop) <= MAX_STOP_STRINGS and all(isinstance(each, str) and each for each in self.stop),
                f"up to {MAX_STOP_STRINGS} strings, none of them empty",
            ),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
            ("skip_special_tokens", isinstance(self.skip_special_tokens, bool), "true or false"),
            ("stop_token_ids", all(map(_whole, self.stop_token_ids)), "token ids"),
            *(
                (name, count is None or (_whole(count) and 0 <= count <= MAX_LOGPROBS), f"0 to {MAX_LOGPROBS}")
                for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs))
            ),
        )


def check_tokens(params: SamplingParams, vocab_size: int) -> None:
    """RequestError names a parameter and its token that is not in the vocabulary."""
    for name, tokens in (
        ("logit_bias", [token for token, _ in _pairs(params.logit_bias)]),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"{name} names token {token}, which is not in the vocabulary; allowed: 0 to {vocab_size - 1}"
                )


def sampling_for(
    params: SamplingParams,
    *,
    seed: int,
    prompt: Sequence[int],
    stop_tokens: Collection[int],
    vocab_size: int,
) -> Sampling:
    """What the ranks need to draw for a sequence that takes a slot.

    stop_tokens: all that end its text. Tokens past the vocabulary, which nobody draws, stay here.
    """
    from phalanx.engine.messages import Sampling  # it knows torch; a caller who writes parameters down need not

    penalised = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
    return Sampling(
        seed=seed,
        # Numbers of libraries pass for Python's, but not over the wire.
        temperature=float(params.temperature),
        top_k=params.top_k if params.top_k < vocab_size else 0,
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        logprobs=-1 if params.logprobs is None else params.logprobs,
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        num_prompt=len(prompt),
        history=tuple(prompt) if penalised else (),
        logit_bias=tuple((token, float(bias)) for token, bias in _pairs(params.logit_bias)),
        allowed=params.allowed_token_ids,
        stop_tokens=tuple(sorted(token for token in stop_tokens if 0 <= token < vocab_size))
        if params.min_tokens
        else (),
        min_tokens=params.min_tokens,
    )


def completion_seed(seed: int, index: int) -> int:
    """Seed of completion `index` of one request, a signed 64-bit number: the request's own for the first."""
    if index == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "little", signed=True)


def _pairs(logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    """In order of their tokens, so that equal biases are equal parameters. ValueError for a token named twice."""
    pairs = dict(logit_bias)
    if len(pairs) != len(logit_bias):
        raise ValueError("a token has two biases")
    return tuple(sorted(pairs.items()))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, float) or _whole(value)


def _within(value: float, least: float, most: float) -> bool:
    return _number(value) and least <= value <= most
