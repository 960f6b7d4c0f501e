"""Takes the tool calls out of one completion while it is being written."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from phalanx.serve.tool_reader import Broken, Reader, Reading, Sieve, marks_of

SPACE = re.compile(r"\s+")
_SEPARATORS = ",;]} \t\r\n"  # what may follow a call and means nothing where the text ends


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """A piece of a call. index: which call of the completion, from 0. id, name: with its first piece, else None.

    arguments: the next piece of its arguments' JSON text, which may be empty.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


class Pieces(NamedTuple):
    """What has become certain since the last time: content for the user, and pieces of calls."""

    content: str
    deltas: list[ToolDelta]


class ToolParser:
    """Splits one completion into content and calls. Where its text is cut into pieces makes no difference to either.

    Content goes out at once, but for what may be the beginning of a call and for white space, of which nobody knows
    yet whether a call follows: white space beside calls is left out. Arguments go out as they come, as the model wrote
    them, once the call's name is known. What turns out to be no call is content, mark and all; so is a call that the
    end cuts off before its name and the beginning of its arguments. A call that was begun stays, cut off or not.

    No name is held against the tools of the request: what a name that is none of them means, the client decides.
    """

    def __init__(
        self,
        read_calls: Callable[[ToolParser], Reading[None]],
        marks: Collection[str],
        bare: str,
        new_id: Callable[[], str],
        hidden: Collection[str] = (),
    ) -> None:
        """read_calls: the grammar of what follows a mark; it raises Broken where it is no call. marks: after which
        calls are looked for. bare: characters with which the whole text may begin a call without a mark. new_id: makes
        the id of a call. hidden: texts to be left out wherever they are.
        """
        self.reader = Reader()
        self._read_calls = read_calls
        self._marks = marks_of(frozenset(marks))
        self._bare = bare
        self._new_id = new_id
        self._sieve = Sieve(marks_of(frozenset(hidden)))
        self._content: list[str] = []
        self._deltas: list[ToolDelta] = []
        self._reading = self._read()
        self.num_calls = 0  # begun so far
        self.in_call = False

    def push(self, text: str) -> Pieces:
        """Goes on with the next piece of the completion."""
        return self._go_on(text, ended=False)

    def finish(self) -> Pieces:
        """What was held back, once no more text follows."""
        return self._go_on("", ended=True)

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        """For the grammar: from here on it is a call."""
        self._deltas.append(ToolDelta(self.num_calls, call_id or self._new_id(), name, ""))
        self.num_calls += 1
        self.in_call = True

    def add_arguments(self, piece: str) -> None:
        """For the grammar: the next piece of the call's arguments."""
        self._deltas.append(ToolDelta(self.num_calls - 1, None, None, piece))

    def end_call(self) -> None:
        """For the grammar: what was read belongs to the call, and is no content."""
        self.in_call = False
        self.reader.drop()

    def _go_on(self, text: str, ended: bool) -> Pieces:
        self.reader.feed(self._sieve.pass_on(text, ended), ended)
        next(self._reading, None)
        content = "".join(self._content)
        deltas = []
        for _, group in groupby(self._deltas, key=attrgetter("index")):
            pieces = list(group)
            deltas.append(replace(pieces[0], arguments="".join(each.arguments for each in pieces)))
        self._content.clear()
        self._deltas.clear()
        return Pieces(content, deltas)

    def _read(self) -> Reading[None]:
        yield from self.reader.run(SPACE)
        head = yield from self.reader.peek()
        if head and head in self._bare:
            yield from self._try_calls()
        while (yield from self.reader.until(self._marks, self._add_content)):
            yield from self._try_calls()
        if not self.num_calls:
            self._content.append(self.reader.drop())

    def _try_calls(self) -> Reading[None]:
        with suppress(Broken):
            yield from self._read_calls(self)
        if self.in_call:
            self.end_call()
            return
        kept = self.reader.drop()
        if kept.strip(_SEPARATORS) or not self.reader.at_end:
            self.reader.keep(kept)
            self._add_content(kept)

    def _add_content(self, piece: str) -> None:
        """What was kept, of which this is the last piece, is content; white space at its end perhaps."""
        if piece.strip():
            text = self.reader.drop()
            content = text.rstrip()
            self._content.append(content)
            self.reader.keep(text[len(content) :])
