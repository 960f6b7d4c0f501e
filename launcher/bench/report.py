"""What a run of the benchmarks found, as data."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phalanx.launcher.bench.figures import Spread, read_figures
from phalanx.launcher.bench.jobs import BenchOptions, Job
from phalanx.launcher.bench.memory import PeakMemory, peak_memory
from phalanx.launcher.bench.readings import RequestReading, Round
from phalanx.launcher.bench.stages import busy_shares
from phalanx.launcher.bench.workloads import WORKLOADS
from phalanx.launcher.machine import this_machine
from phalanx.launcher.schema import Config
from phalanx.launcher.served import Served


@dataclass(frozen=True, slots=True)
class JobResult:
    """The rounds of a workload, in order."""

    job: Job
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """command: as it can be typed elsewhere. config: what was served, and how. startup_s: seconds by part."""

    command: str
    config: Mapping[str, Any]
    startup_s: Mapping[str, float]
    peak_memory: PeakMemory
    options: BenchOptions
    results: tuple[JobResult, ...]

    @classmethod
    def of(cls, served: Served, command: str, options: BenchOptions, results: tuple[JobResult, ...]) -> BenchReport:
        """To be made before the ranks end."""
        return cls(
            command=command,
            config=config_facts(served),
            startup_s=served.startup.startup_s,
            peak_memory=peak_memory(served.startup.ranks),
            options=options,
            results=results,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; names say the units."""
        return {
            "benchmark": "phalanx bench",
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": dict(self.config),
            "machine": machine_facts(),
            "startup_s": dict(self.startup_s),
            "peak_memory": self.peak_memory._asdict(),
            "workloads": {result.job.name: self._workload(result) for result in self.results},
        }

    def _workload(self, result: JobResult) -> dict[str, Any]:
        rounds = [self._round(result.job, taken) for taken in result.rounds]
        spreads = {
            name: Spread.over(each["figures"][name] for each in rounds)
            for name in read_figures(result.job.name, result.rounds[0], self.options.limits)
        }
        return {
            "parameters": self._parameters(result.job),
            "figures": {name: spread and spread._asdict() for name, spread in spreads.items()},
            "rounds": rounds,
        }

    def _parameters(self, job: Job) -> dict[str, Any]:
        options, prompts = self.options, [len(shape.prompt) for shape in job.requests]
        outputs = [shape.max_tokens for shape in job.requests]
        parameters: dict[str, Any] = {
            "description": WORKLOADS[job.name],
            "seed": options.seed,
            "scale": options.scale,
            "num_requests": len(job.requests),
            "prompt_tokens": {"least": min(prompts), "most": max(prompts), "total": sum(prompts)},
            "output_tokens": {"least": min(outputs), "most": max(outputs), "total": sum(outputs)},
        }
        if job.name == "W4":
            parameters |= {
                "rate_per_s": options.open_loop.rate_per_s,
                "prompt_tokens_distribution": options.open_loop.prompt_tokens._asdict(),
                "output_tokens_distribution": options.open_loop.output_tokens._asdict(),
                "limits": options.limits._asdict(),
            }
        return parameters

    def _round(self, job: Job, taken: Round) -> dict[str, Any]:
        return {
            "figures": read_figures(job.name, taken, self.options.limits),
            "elapsed_s": taken.elapsed_s,
            "stage_busy": [busy_shares(stages) for stages in taken.stages],
            "steps": taken.steps,
            "communication": [use.to_json() for use in taken.comm],
            "preemptions": taken.preemptions,
            "prompt_tokens_cached": taken.cached_tokens,
            "requests": [_request(request) for request in taken.requests],
        }


def machine_facts() -> dict[str, Any]:
    """What a reader must know of this machine to judge figures taken on it, as plain data."""
    import torch

    machine = this_machine()
    return {
        "processor": processor(),
        "num_cores": machine.num_cores,
        "gpus": [gpu.name for gpu in machine.gpus],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def model_name(config: Config) -> str:
    """The model as it was named; where it lies is nobody's business but this machine's."""
    path = Path(config.model.path)
    return path.name if path.is_absolute() else config.model.path


def processor() -> str:
    """The name of the processor, where this system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def config_facts(served: Served) -> dict[str, Any]:
    """What is served, and how, as plain data."""
    config, plan = served.config, served.plan
    return {
        "model": model_name(config),
        "dtype": plan.dtype,
        "device": plan.device,
        "layout": str(plan.layout),
        "ray": config.cluster.ray,
        "threads_per_rank": plan.num_threads or None,
        "page_size": plan.page_size,
        "num_pages": served.startup.ranks[0].num_pages,
        "max_length": plan.max_length,
        **{name: getattr(config.engine, name) for name in ("max_sequences", "max_batch_tokens", "prefix_cache")},
    }


def _request(request: RequestReading) -> dict[str, Any]:
    return {
        "prompt_tokens": request.num_prompt_tokens,
        "output_tokens": len(request.token_s),
        "arrival_s": request.arrival_s,
        "time_to_first_token_s": request.time_to_first_token_s,
        "time_per_output_token_s": request.time_per_output_token_s,
    }
