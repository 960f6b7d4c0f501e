"""How the tokens of one request are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request; RequestError names any that is out of range.

    max_tokens: most new tokens. temperature: 0 takes the most likely token (greedy), 1 samples the model's
    distribution. min_p: only tokens at least this fraction as likely as the most likely one. top_k: only the k most
    likely of those, 0 for all. top_p: of those, only the fewest most likely ones whose probabilities reach top_p. The
    filters act in this order after the temperature. seed: of the random draws, or None for one chosen by the engine.
    A draw depends on (seed, position) alone, so the same request gives the same tokens in any batch and any layout.
    stop: strings that end the text and are left out of it. stop_token_ids: tokens that end it. ignore_eos: goes on
    past the model's own end-of-text tokens. logprobs: log-probabilities of this many most likely tokens a position,
    beside the drawn one's; 0 for the drawn token's only, None for none. They are the model's own, before temperature
    and filters.
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
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            if not isinstance(getattr(self, name), str | list | tuple):
                raise RequestError(f"{name} is {getattr(self, name)!r}; allowed: a list")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        limits = (
            ("max_tokens", _whole(self.max_tokens) and self.max_tokens >= 1, "a whole number of at least 1"),
            ("temperature", _number(self.temperature) and 0 <= self.temperature <= 100, "0 to 100"),
            ("top_k", _whole(self.top_k) and self.top_k >= 0, "0 (all tokens) or a whole number"),
            ("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", _number(self.min_p) and 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", self.seed is None or (_whole(self.seed) and -(2**63) <= self.seed < 2**63), "a 64-bit integer"),
            (
                "stop",
                len(stop) <= MAX_STOP_STRINGS and all(isinstance(each, str) and each for each in stop),
                f"up to {MAX_STOP_STRINGS} strings, none of them empty",
            ),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
            ("stop_token_ids", all(map(_whole, self.stop_token_ids)), "token ids"),
            (
                "logprobs",
                self.logprobs is None or (_whole(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
                f"0 to {MAX_LOGPROBS}",
            ),
        )
        for name, good, allowed in limits:
            if not good:
                raise RequestError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, float) or _whole(value)
