"""Parts of a run, each a process of its own within its share of the time, whatever becomes of the ones before it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GRACE_S = 8.0  # from being asked to stop until the process is killed: for what it wants to write down
LAST_LINES = 30  # of what a part that failed has said


class Part(NamedTuple):
    """file: of the results that its figures go to, without suffix; parts may share one. weight: of the time that is
    left, beside those of the parts not yet run. command: with the JSON that it is to write, and its seconds.
    """

    name: str
    file: str
    weight: float
    command: Callable[[Path, float], Sequence[str]]


class Outcome(NamedTuple):
    """ended: `done`, `failed`, `stopped`, at its limit, or `interrupted`, with the run. figures: what it wrote, {} if
    nothing. said: its last lines, where it was not done.
    """

    part: str
    file: str
    ended: str
    seconds: float
    limit_s: float
    command: str
    figures: dict[str, Any]
    said: str = ""


def limit_s(parts: Sequence[Part], left_s: float) -> float:
    """Of the first part: what earlier parts did not need is shared by all that come."""
    return max(0.0, left_s) * parts[0].weight / sum(part.weight for part in parts)


def run_parts(
    parts: Sequence[Part],
    total_s: float,
    folder: Path,
    environment: Mapping[str, str],
    cwd: Path,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Runs them one after another, with logs and what they write in `folder`. Ctrl-C ends the run with the part, as far
    as it has come.
    """
    ends_s = time.monotonic() + total_s
    outcomes = []
    for number, part in enumerate(parts):
        limit = limit_s(parts[number:], ends_s - time.monotonic())
        print(f"\n== {part.name}: at most {limit:.0f} s", flush=True)
        outcome = run_part(part, limit, folder, environment, cwd)
        print(f"== {part.name}: {outcome.ended} after {outcome.seconds:.0f} s", flush=True)
        if outcome.said:
            print(outcome.said, flush=True)
        outcomes.append(outcome)
        on_end(outcome)
        if outcome.ended == "interrupted":
            break
    return outcomes


def run_part(part: Part, limit: float, folder: Path, environment: Mapping[str, str], cwd: Path) -> Outcome:
    """At its limit a part is interrupted as by Ctrl-C, and killed with all that it started if that does not help."""
    stem = part.name.replace(" ", "-")
    written, log = folder / f"{stem}.json", folder / f"{stem}.log"
    written.unlink(missing_ok=True)
    # A part stops by itself, with all that it measured, before it is stopped.
    command = list(part.command(written, max(0.0, 0.85 * limit - 2)))
    began_s = time.monotonic()
    ended = ""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(environment), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit - min(GRACE_S, limit / 2))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
            ended = "stopped" if isinstance(why, subprocess.TimeoutExpired) else "interrupted"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE_S, limit / 2))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of it, whatever the way out
            process.wait()
    ended = ended or ("failed" if process.returncode else "done")
    figures: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        figures = json.loads(written.read_text())
    said = "" if ended == "done" else "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    seconds = time.monotonic() - began_s
    return Outcome(part.name, part.file, ended, seconds, limit, " ".join(command), figures, said)
