"""Takes one reading of one engine, in a process and a Python of its own: a job as JSON on stdin, the reading on stdout.

    python benchmarks/peers/measure.py ENGINE < job.json > reading.json
    python benchmarks/peers/measure.py --versions DISTRIBUTION... > versions.json

Every engine is measured by this one file, from outside: how long it takes until it takes requests, and how long each
list of requests takes until all their tokens are there. `run_ENGINE.py` beside it only starts the engine and runs
requests; nothing here or there needs more than the standard library and the engine.

Job: `engine`, what `serving` of the engine's file is given; `warm_up`, requests; `runs`, lists of requests. A request
is [token ids, number of new tokens]. Reading: `start_s`, and for each run `elapsed_s` and its new `token_ids`.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from typing import Any  # noqa: E402


def installed(distributions: list[str]) -> dict[str, str | None]:
    """Versions of this Python and of what is installed in it; None for what is not."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in distributions:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    num_threads = job["engine"]["num_threads"]
    if hasattr(os, "sched_setaffinity"):
        # Holds helper threads of an engine to the same cores as its compute threads.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_threads])
    with importlib.import_module(f"run_{name}").serving(**job["engine"]) as generate:
        reading: dict[str, Any] = {"start_s": time.perf_counter() - STARTED, "runs": []}
        generate(job["warm_up"])
        for requests in job["runs"]:
            began = time.perf_counter()
            token_ids = generate(requests)
            reading["runs"].append({"elapsed_s": time.perf_counter() - began, "token_ids": token_ids})
    return reading


def main() -> None:
    # Engines print what they like; standard output is for the answer alone.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        first, *rest = sys.argv[1:]
        answer.write(json.dumps(installed(rest) if first == "--versions" else measure(first, json.load(sys.stdin))))


if __name__ == "__main__":
    main()
