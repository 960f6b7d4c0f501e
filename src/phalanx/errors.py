"""Errors a user can cause. Each message names the cause, the figures and the remedy; a traceback is for bugs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PhalanxError(Exception):
    """Base of every error that a user, a file or a machine can cause.

    `exit_code` is what the command line returns for it: 2 where the input is wrong, 3 where it cannot run here.
    """

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration.

    path: dotted path in the YAML file, such as `parallel.stages.0.tensor`; empty for the file as a whole.
    message: what is wrong. found: the value found, as written. allowed: what is allowed there.
    suggestion: what to do about it. line: line in the file, from 1, where known.
    """

    path: str
    message: str
    found: str | None = None
    allowed: str | None = None
    suggestion: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = self.path or "(file)"
        if self.line is not None:
            place += f" (line {self.line})"
        text = f"{place}: {self.message}"
        for label, value in (("found", self.found), ("allowed", self.allowed), ("try", self.suggestion)):
            if value is not None:
                text += f"\n    {label}: {value}"
        return text


class ConfigError(PhalanxError):
    """A configuration with every problem found in it, all at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], source: str = "configuration") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {problem}" for problem in self.problems))


class LayoutError(PhalanxError):
    """A division that cannot be done: more ranks than heads, a stage without layers, weights of the wrong length."""

    exit_code = 2


class ModelError(PhalanxError):
    """A model that cannot be found, read or understood. Names the file and, where it is about one, the tensor."""


class RequestError(PhalanxError, ValueError):
    """A request that can never be served: too long, empty, or with parameters out of range."""

    exit_code = 2


class ContextLengthError(RequestError):
    """A prompt that, with the tokens asked for, is longer than the model or the KV cache allows."""


class QueueFullError(PhalanxError):
    """A request refused because too many are waiting. It may be sent again later."""


class CommError(PhalanxError):
    """A transfer that failed or waited too long. Names the operation, its sequence number and the ranks involved."""


class PlacementError(PhalanxError):
    """Ranks that cannot be placed on the machines at hand. Names what is missing and where."""


class RankFailedError(PhalanxError):
    """A rank that failed or died. Names replica, stage, rank and node, and carries the rank's own traceback.

    The first cause is what is raised; what the other ranks reported because of it is in `symptoms`.
    """

    def __init__(self, message: str, *, rank: int | None = None, symptoms: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.rank = rank
        self.symptoms = tuple(symptoms)
