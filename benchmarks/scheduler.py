"""What the scheduler costs: microseconds a step and a sequence, by the number of running sequences.

    python benchmarks/scheduler.py [--steps 300] [--json FILE]

Nothing runs but the scheduler: it is told made-up tokens. A step is planned and completed; prompts are planned before
the clock starts, and pages fill and are added as in service. The clock is that of this thread's own work, so that
neighbours on a shared machine count for less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from phalanx.engine.messages import Sampling, StepPlan, StepResult
from phalanx.engine.scheduler import Limits, Scheduler

NUM_SEQUENCES = (16, 64, 256, 1024)
NUM_STAGES = (1, 2, 4)
PROMPT_TOKENS = 64
PAGE_SIZE = 16


class Reading(NamedTuple):
    """Of one number of sequences and stages. step_us: median of a step; sequence_us: of that, for each decoded."""

    sequences: int
    stages: int
    step_us: float
    sequence_us: float


def measure(num_sequences: int, num_stages: int, num_steps: int) -> Reading:
    new_tokens = num_steps + 100
    pages = num_sequences * -(-(PROMPT_TOKENS + 16 + new_tokens) // PAGE_SIZE)
    scheduler = Scheduler(Limits(num_sequences, 10**6, pages, PAGE_SIZE, 10**6, num_stages))
    for name in range(num_sequences):
        # Unlike lengths, so that pages fill at unlike times.
        prompt = [name + 1] * (PROMPT_TOKENS + name % PAGE_SIZE)
        scheduler.add(name, prompt, new_tokens, Sampling(num_prompt=len(prompt)), stop_tokens=(0,))
    in_flight: deque[StepPlan] = deque()
    costs_us: list[float] = []
    decoded: list[int] = []
    for _ in range(num_steps):
        started_s = time.thread_time()
        while (plan := scheduler.schedule()) is not None:
            in_flight.append(plan)
        planned_s = time.thread_time()
        oldest = in_flight.popleft()
        result = StepResult(oldest.step, (1,) * len(oldest.drawn_slots))
        resumed_s = time.thread_time()
        scheduler.complete(result)
        ended_s = time.thread_time()
        if not oldest.chunks and not in_flight[-1].chunks:
            costs_us.append((planned_s - started_s + ended_s - resumed_s) * 1e6)
            decoded.append(len(oldest.decodes))
    step_us = statistics.median(costs_us)
    return Reading(num_sequences, num_stages, step_us, step_us / statistics.median(decoded))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    readings = [measure(count, stages, arguments.steps) for stages in NUM_STAGES for count in NUM_SEQUENCES]
    table = Table("stages", "running", "µs a step", "µs a sequence", box=None)
    for reading in readings:
        table.add_row(
            str(reading.stages), str(reading.sequences), f"{reading.step_us:.0f}", f"{reading.sequence_us:.2f}"
        )
    Console().print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "scheduler",
            "command": f"benchmarks/scheduler.py --steps {arguments.steps}",
            "page_size": PAGE_SIZE,
            "readings": [reading._asdict() for reading in readings],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
