"""The requests that a server is measured with: lengths of W4, or of a file."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from phalanx.errors import ConfigError, Problem
from phalanx.launcher.bench.jobs import scaled
from phalanx.launcher.bench.rounds import turned
from phalanx.launcher.bench.workloads import LengthDistribution, OpenLoop, RequestShape, workload

_Length = Annotated[int, msgspec.Meta(ge=1)]
_FORMS = 'lines such as {"prompt_tokens": 100, "output_tokens": 20}, or CSV below prompt_tokens,output_tokens'


class LengthPair(msgspec.Struct, frozen=True):
    """Of one request."""

    prompt_tokens: _Length
    output_tokens: _Length


@dataclass(frozen=True, slots=True)
class RequestSource:
    """Draws requests: the same for a seed, whatever the rate, but for the times between them.

    pairs: lengths to draw from, those of W4 where there are none. scale: of all lengths. vocab_size: token ids of
    prompts are below it.
    """

    vocab_size: int
    pairs: tuple[LengthPair, ...] = ()
    scale: float = 1.0
    seed: int = 0

    def draw(self, rate_per_s: float, num_requests: int, number: int) -> list[RequestShape]:
        """In order of arrival. number: of the draw; another one has other prompts of the same lengths, so that a server
        finds none in its cache.
        """
        if self.pairs:
            shapes = self._from_pairs(rate_per_s, num_requests)
        else:
            shapes = self._workload(OpenLoop(rate_per_s, num_requests))
        return [turned(scaled(shape, self.scale), number) for shape in shapes]

    def _workload(self, open_loop: OpenLoop) -> list[RequestShape]:
        return workload("W4", vocab_size=self.vocab_size, seed=self.seed, open_loop=open_loop)

    def _from_pairs(self, rate_per_s: float, num_requests: int) -> list[RequestShape]:
        chosen = random.Random(f"lengths {self.seed}").choices(self.pairs, k=num_requests)
        longest = max(pair.prompt_tokens for pair in self.pairs)
        # Arrivals and ids as in W4: prompts as long as the longest, of which each request has the beginning.
        shapes = self._workload(OpenLoop(rate_per_s, num_requests, LengthDistribution(longest, 0.0, longest, longest)))
        return [
            shape._replace(prompt=shape.prompt[: pair.prompt_tokens], max_tokens=pair.output_tokens)
            for shape, pair in zip(shapes, chosen, strict=True)
        ]


def read_lengths(path: Path) -> tuple[LengthPair, ...]:
    """The pairs of a file: JSON lines `{"prompt_tokens": 100, "output_tokens": 20}`, or CSV whose first line names
    these two columns. What else a line has is left aside. Raises ConfigError with everything that is wrong, by line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}")], str(path)) from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    read: Callable[[str], LengthPair] = _from_json
    if lines and not lines[0][1].lstrip().startswith("{"):
        (number, heading), *lines = lines
        names = _cells(heading)
        if not {*LengthPair.__struct_fields__} <= {*names}:
            raise ConfigError([Problem("", "is no heading of lengths", heading[:80], _FORMS, line=number)], str(path))
        read = partial(_from_csv, names)
    pairs, problems = [], []
    for number, line in lines:
        try:
            pairs.append(read(line))
        except msgspec.DecodeError as error:
            problems.append(Problem("", str(error), found=line[:80], line=number))
    if problems or not pairs:
        raise ConfigError(problems or [Problem("", "has no lengths", allowed=_FORMS)], str(path))
    return tuple(pairs)


def _from_json(line: str) -> LengthPair:
    return msgspec.json.decode(line, type=LengthPair)


def _from_csv(names: Sequence[str], line: str) -> LengthPair:
    return msgspec.convert(dict(zip(names, _cells(line), strict=False)), LengthPair, strict=False)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line]))]
