"""What a run of the benchmarks is asked to do, and whether the configuration can do it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from phalanx.errors import RequestError
from phalanx.launcher.bench.readings import LatencyLimits
from phalanx.launcher.bench.workloads import WORKLOADS, OpenLoop, RequestShape, WorkloadName, workload
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.schema import Config
from phalanx.launcher.served import checked_plan
from phalanx.models.resolve import resolve_model

# What MLPerf Inference asks of a server of Llama 2 70B (v4.0, at the 99th percentile).
LIMITS = LatencyLimits(time_to_first_token_s=2.0, time_per_output_token_s=0.2)


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """scale: of all lengths in tokens; figures of another scale than 1 are not those of the workloads. limits: of a
    request that counts for goodput.
    """

    workloads: tuple[WorkloadName, ...]
    num_rounds: int
    seed: int = 0
    scale: float = 1.0
    open_loop: OpenLoop = field(default_factory=OpenLoop)
    limits: LatencyLimits = LIMITS


@dataclass(frozen=True, slots=True)
class Job:
    """A workload and its requests, in order of arrival."""

    name: WorkloadName
    requests: tuple[RequestShape, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return max(len(shape.prompt) + shape.max_tokens for shape in self.requests)


def plan_jobs(config: Config, options: BenchOptions) -> list[Job]:
    """The requests of each workload, once each. Starts nothing.

    Raises ConfigError and ModelError as a start would, RequestError where a request is longer than sequences may be.
    """
    source = resolve_model(config.model.path, revision=config.model.revision)
    plan, vocab_size = checked_plan(config, source, source.known_entries()), source.config.shape.vocab_size
    jobs = []
    for name in dict.fromkeys(options.workloads):
        shapes = workload(name, vocab_size=vocab_size, seed=options.seed, open_loop=options.open_loop)
        jobs.append(Job(name, tuple(scaled(shape, options.scale) for shape in shapes)))
    _check_longest(max(jobs, key=lambda job: job.longest), options.scale, config, plan)
    return jobs


def title(name: WorkloadName, options: BenchOptions) -> str:
    """What the workload is, as these options make it."""
    words = WORKLOADS[name]
    if name == "W4":
        words += f"; {options.open_loop.rate_per_s:g} a second"
    return words if options.scale == 1 else f"{words}; lengths times {options.scale:g}"


def scaled(shape: RequestShape, scale: float) -> RequestShape:
    """The beginning of the prompt, and as many tokens of output, in proportion; at least one of each."""
    return shape._replace(
        prompt=shape.prompt[: _scaled(len(shape.prompt), scale)], max_tokens=_scaled(shape.max_tokens, scale)
    )


def _scaled(length: int, scale: float) -> int:
    return max(1, math.floor(length * scale))


def _check_longest(job: Job, scale: float, config: Config, plan: RunPlan) -> None:
    asked, most = job.longest, plan.max_length
    if asked <= most:
        return
    if most == config.model.max_length:
        reason, remedy = "model.max_length says", "raise it"
    elif most == plan.kv_capacity_tokens:
        reason, remedy = "the KV cache holds", "raise engine.kv_cache"
    else:
        reason, remedy = "the model can address", "take a model of longer sequences"
    fitting = math.floor(1000 * scale * most / asked) / 1000
    raise RequestError(
        f"{job.name} has sequences of up to {asked} tokens, but {most} are all that {reason}; {remedy}, leave this "
        f"workload out, or shorten all with --scale {fitting:g}"
    )
