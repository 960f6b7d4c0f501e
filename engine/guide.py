"""Guides: what structured output plugs in. A guide says, token by token, which tokens may come next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from phalanx.errors import RequestError


class Guide(Protocol):
    """Follows the text of one completion. The engine asks `allowed` before each draw and tells it what was drawn.

    It is made anew for each completion. Both methods are between two tokens of a sequence: they should be quick.
    """

    def allowed(self) -> bytes:
        """The tokens that may come next: bit t % 8 of byte t // 8 for token t. Tokens past the last byte may not."""
        ...

    def accept(self, token: int) -> None:
        """Goes on past a token that was drawn."""
        ...


def mask_of(tokens: Iterable[int], vocab_size: int) -> bytes:
    """These tokens as bits, as `Guide.allowed` gives them. RequestError for one that is not in the vocabulary."""
    mask = bytearray(-(-vocab_size // 8))
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(f"token {token} cannot be allowed: the vocabulary is 0 to {vocab_size - 1}")
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


def next_mask(guide: Guide, vocab_size: int) -> bytes:
    """What a guide allows next. RequestError where that is none of the vocabulary's tokens: nothing could be drawn."""
    mask = bytes(memoryview(guide.allowed()))[: -(-vocab_size // 8)]  # any buffer: an array of bytes is natural too
    # As one number, since the last byte may hold bits past the vocabulary.
    if not int.from_bytes(mask, "little") & ((1 << vocab_size) - 1):
        raise RequestError(
            f"the guide {type(guide).__name__} allows none of the {vocab_size} tokens, so that nothing can be drawn; "
            "where its text is complete, it must allow a token that ends it"
        )
    return mask


class ChoiceGuide:
    """Allows exactly one of several token sequences, then a token that ends the text.

    >>> guide = ChoiceGuide([[5, 6], [5, 7, 8]], end_tokens=[2], vocab_size=16)
    >>> guide.allowed() == mask_of([5], 16)
    True
    >>> guide.accept(5)
    >>> guide.allowed() == mask_of([6, 7], 16)
    True
    """

    def __init__(self, choices: Sequence[Sequence[int]], end_tokens: Collection[int], vocab_size: int) -> None:
        """RequestError where there is no choice, one is empty, nothing ends it, or a token is not in the vocabulary."""
        if not choices or not all(choices):
            raise RequestError(
                f"choices are {[list(choice) for choice in choices]}; allowed: token sequences, none empty"
            )
        if not end_tokens:
            raise RequestError("choices need a token that ends the text; give at least one in end_tokens")
        self._end_mask = mask_of(end_tokens, vocab_size)
        for choice in choices:
            mask_of(choice, vocab_size)
        self._end_tokens = frozenset(end_tokens)
        self._vocab_size = vocab_size
        self._open = [tuple(choice) for choice in choices]  # those that begin with what was drawn
        self._num_drawn = 0
        self._ended = False

    def allowed(self) -> bytes:
        return self._end_mask if self._ended else mask_of(self._next(), self._vocab_size)

    def accept(self, token: int) -> None:
        """ValueError for a token that was not allowed."""
        if token not in (self._end_tokens if self._ended else self._next()):
            raise ValueError(f"token {token} was drawn after {self._num_drawn} others, where it was not allowed")
        going_on = [choice for choice in self._open if choice[self._num_drawn : self._num_drawn + 1] == (token,)]
        self._ended = not going_on
        self._open = going_on
        self._num_drawn += 1

    def _next(self) -> set[int]:
        tokens = {choice[self._num_drawn] for choice in self._open if len(choice) > self._num_drawn}
        if any(len(choice) == self._num_drawn for choice in self._open):
            tokens |= self._end_tokens
        return tokens
