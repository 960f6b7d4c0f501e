"""Reading a text that arrives in pieces, as if it were there already: a grammar waits where its text ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields where more text is needed; returns what was read

JSON_MARKS = re.compile(r'["{}\[\]]')
PYTHON_MARKS = re.compile(r"""["'(){}\[\]]""")
_STRING_MARKS = {'"': re.compile(r'["\\]'), "'": re.compile(r"['\\]")}


class Broken(Exception):  # noqa: N818 (it is no error: the text is something else than it seemed)
    """The text does not go on as the grammar wants, or has ended."""


class Marks:
    """Finds the first of several texts in one that arrives in pieces: the longest, where two begin at one place."""

    def __init__(self, texts: Collection[str]) -> None:
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._beginnings = frozenset(text[:num] for text in longest_first for num in range(1, len(text)))
        self._most_held = max(map(len, self._beginnings), default=0)

    def find(self, text: str, start: int, ended: bool) -> tuple[int, int]:
        """Bounds of the first mark from `start` on; both the same where there is none.

        They are then where a mark may have begun that more text would complete: the end, if none has.
        """
        match = self._pattern.search(text, start)
        open_from = len(text)
        if not ended:
            first = max(start, len(text) - self._most_held)
            open_from = next((at for at in range(first, len(text)) if text[at:] in self._beginnings), len(text))
        return match.span() if match is not None and match.start() < open_from else (open_from, open_from)


@lru_cache(maxsize=16)
def marks_of(texts: frozenset[str]) -> Marks:
    """`Marks`, made once: a model may have hundreds of special tokens."""
    return Marks(texts)


class Sieve:
    """Takes marks out of a text that arrives in pieces."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._held = ""

    def pass_on(self, text: str, ended: bool) -> str:
        """What is certain to remain. ended: whether this is the last piece."""
        text = self._held + text
        remaining = []
        position = 0
        while True:
            start, end = self._marks.find(text, position, ended)
            remaining.append(text[position:start])
            position = end
            if start == end:
                self._held = text[end:]
                return "".join(remaining)


class Reader:
    """The text so far, read from front to back. What was read is kept until it is dropped, to be given back if need be.

    Where the pieces are cut makes no difference to what a grammar reads.
    """

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._ended = False
        self._kept: list[str] = []

    @property
    def num_unread(self) -> int:
        """Characters that have arrived and were not read."""
        return len(self._text) - self._position

    @property
    def at_end(self) -> bool:
        """Whether nothing is left to read, nor will be."""
        return self._ended and not self.num_unread

    def feed(self, text: str, ended: bool = False) -> None:
        """Appends a piece. ended: whether it is the last."""
        self._text = self._text[self._position :] + text
        self._position = 0
        self._ended = ended

    def take(self, num: int) -> str:
        """Reads characters that are there."""
        piece = self._text[self._position : self._position + num]
        self._position += num
        self._kept.append(piece)
        return piece

    def keep(self, text: str) -> None:
        """Keeps a text as if it had just been read."""
        self._kept.append(text)

    def drop(self) -> str:
        """Forgets what was kept, and returns it."""
        text = "".join(self._kept)
        self._kept.clear()
        return text

    def peek(self) -> Reading[str]:
        """The next character, unread; empty at the end."""
        while not self.num_unread:
            if self._ended:
                return ""
            yield
        return self._text[self._position]

    def run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Reads on while single characters match. pattern: of one or more of these characters."""
        pieces = []
        while (yield from self.peek()):
            match = pattern.match(self._text, self._position)
            if match is None:
                break
            pieces.append(self.take(len(match[0])))
        return "".join(pieces)

    def literal(self, text: str) -> Reading[bool]:
        """Whether this text is next; then it is read. A beginning of it that ends the whole counts as well."""
        while not self._ended and self.num_unread < len(text) and text.startswith(self._text[self._position :]):
            yield
        num = min(len(text), self.num_unread)
        if not num or not self._text.startswith(text[:num], self._position):
            return False
        self.take(num)
        return True

    def until(self, marks: Marks, emit: Callable[[str], None]) -> Reading[str]:
        """Reads up to and with the first mark, and returns that; empty at the end. Hands on what is before it."""
        while True:
            start, end = marks.find(self._text, self._position, self._ended)
            if start > self._position:
                emit(self.take(start - self._position))
            if end > start:
                return self.take(end - start)
            if self._ended:
                return ""
            yield

    def balanced(self, emit: Callable[[str], None], marks: re.Pattern[str] = JSON_MARKS) -> Reading[None]:
        """Reads a string, or what is between brackets and the brackets, and hands on each piece of it as it comes.

        The next character begins it. Brackets are counted, not matched by kind. marks: the quotes and brackets.
        Raises Broken where the text ends within.
        """
        depth = 0
        quote = ""
        while (yield from self.peek()):
            match = (_STRING_MARKS[quote] if quote else marks).search(self._text, self._position)
            if match is None:
                emit(self.take(self.num_unread))
                continue
            emit(self.take(match.end() - self._position))
            mark = match[0]
            if mark == "\\":
                if (yield from self.peek()):
                    emit(self.take(1))
                continue
            if mark in _STRING_MARKS:
                quote = "" if quote else mark
            else:
                depth += 1 if mark in "([{" else -1
            if not depth and not quote:
                return
        raise Broken
