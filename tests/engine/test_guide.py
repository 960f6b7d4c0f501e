"""Masks, and the guide that allows one of several token sequences."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.engine.guide import ChoiceGuide, Guide, mask_of, next_mask
from phalanx.errors import RequestError

VOCAB = 50
END = (2, 49)


def tokens_in(mask: bytes) -> set[int]:
    return {token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1}


class Silent:
    """A guide that allows nothing of the vocabulary."""

    def __init__(self, mask: bytes) -> None:
        self.mask = mask

    def allowed(self) -> bytes:
        return self.mask

    def accept(self, token: int) -> None: ...


@given(st.sets(st.integers(0, VOCAB - 1)))
def test_a_mask_has_the_bits_of_its_tokens(tokens: set[int]) -> None:
    mask = mask_of(tokens, VOCAB)
    assert tokens_in(mask) == tokens
    assert len(mask) == 7


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_past_the_vocabulary_cannot_be_allowed(token: int) -> None:
    with pytest.raises(RequestError, match=f"token {token} cannot be allowed: the vocabulary is 0 to 49"):
        mask_of([1, token], VOCAB)


@given(st.lists(st.lists(st.sampled_from((5, 6, 7)), min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_what_choices_allow_always_ends_as_one_of_them(choices: list[list[int]], data: st.DataObject) -> None:
    guide: Guide = ChoiceGuide(choices, END, VOCAB)
    drawn: list[int] = []
    while not drawn or drawn[-1] not in END:
        drawn.append(data.draw(st.sampled_from(sorted(tokens_in(next_mask(guide, VOCAB))))))
        guide.accept(drawn[-1])
    assert drawn[:-1] in choices


@given(st.lists(st.lists(st.sampled_from((5, 6, 7)), min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_every_choice_can_be_reached(choices: list[list[int]], data: st.DataObject) -> None:
    guide = ChoiceGuide(choices, END, VOCAB)
    for token in (*data.draw(st.sampled_from(choices)), END[0]):
        assert token in tokens_in(guide.allowed())
        guide.accept(token)


def test_after_the_end_only_the_end_is_allowed() -> None:
    guide = ChoiceGuide([[5]], END, VOCAB)
    for token in (5, 2, 49):
        guide.accept(token)
    assert tokens_in(guide.allowed()) == set(END)


def test_a_token_that_was_not_allowed_is_an_error() -> None:
    guide = ChoiceGuide([[5, 6]], END, VOCAB)
    guide.accept(5)
    with pytest.raises(ValueError, match="token 7 was drawn after 1 others"):
        guide.accept(7)


@pytest.mark.parametrize(
    ("choices", "end_tokens", "message"),
    [
        ([], END, "choices are"),
        ([[5], []], END, "none empty"),
        ([[5]], (), "end_tokens"),
        ([[5, VOCAB]], END, "token 50 cannot be allowed"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(
    choices: list[list[int]], end_tokens: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        ChoiceGuide(choices, end_tokens, VOCAB)


@pytest.mark.parametrize("mask", [b"", bytes(7), b"\0" * 6 + b"\xfc", bytes(7) + b"\xff"])
def test_a_guide_that_allows_no_token_of_the_vocabulary_is_refused(mask: bytes) -> None:
    with pytest.raises(RequestError, match="Silent allows none of the 50 tokens"):
        next_mask(Silent(mask), VOCAB)


def test_what_makes_a_guide_can_be_sent_to_another_process() -> None:
    make = pickle.loads(pickle.dumps(partial(ChoiceGuide, ((5, 6),), END, VOCAB)))
    assert make().allowed() == mask_of([5], VOCAB)
