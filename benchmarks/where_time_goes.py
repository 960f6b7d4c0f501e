"""Where the time of a step goes: native operators beside their limits, PyTorch's operators, sampler and interpreter.

    python benchmarks/where_time_goes.py [--model smollm2-135m] [--threads 1 2] [--case "decode 8 at 2048"]
                                         [--json FILE]

One rank runs real steps (`StepRunner`, weights at random, pages scattered), launched one operator at a time, not
replayed (`phalanx profile` has those that are). Native calls are watched; `plain_us` is the median step when they are
not. The limit of an operator is what it must read and write at the bandwidth of reading memory, or what it must
multiply at the rate of bfloat16 products, whichever takes longer; both are measured in the same run. PyTorch's
operators are timed by its profiler in other steps, which makes short ones longer. The interpreter has the rest of the
time: Python, the bindings, allocation. `where_time_goes.md` has a reading.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from phalanx.comm.group import GroupSpec
from phalanx.comm.single import SingleCommunicator
from phalanx.engine.messages import Chunk, NewSequence, Sampling, StepPlan
from phalanx.engine.runner import Links, StepRunner
from phalanx.engine.sampler import Sampler
from phalanx.engine.tables import SlotTables
from phalanx.kernels import native_cpu
from phalanx.kernels.ceilings import Ceilings, measure_ceilings
from phalanx.kernels.packed import make_packed
from phalanx.kernels.watch import CallWatch, OperatorCall, Work
from phalanx.launcher.bench.report import processor
from phalanx.launcher.machine import this_machine
from phalanx.models import recorded
from phalanx.models.batch import KVCache
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.decoder import Decoder
from phalanx.models.params import rank_params
from phalanx.native import find_native, resize_pool
from phalanx.parallel.layout import StageRequest, build_layout
from phalanx.parallel.shape import ModelShape

CPU = torch.device("cpu")
PAGE_SIZE = 16
MODELS = {
    "smollm2-135m": ModelShape(576, 30, 9, 3, 64, 1536, 49152),
    "1b": ModelShape(2048, 4, 32, 8, 64, 8192, 49152),
}
"""The second with a quarter of its layers, which are all alike."""
STEPS = 8  # of each kind, less of long ones
MOST_S = 1.0  # for them


class Case(NamedTuple):
    """rows: sequences that decode at `context`, or 0 for one prompt of so many tokens."""

    rows: int
    context: int

    def __str__(self) -> str:
        return f"decode {self.rows} at {self.context}" if self.rows else f"prefill {self.context}"


CASES = [*(Case(rows, context) for rows in (1, 8, 32) for context in (256, 2048)), Case(0, 512), Case(0, 2048)]


class Bench:
    """One rank that holds a whole model."""

    def __init__(self, shape: ModelShape, cases: list[Case]) -> None:
        self.shape = shape
        self._length = max(case.context for case in cases) + 4 * STEPS
        most_tokens = max(max(case.rows, 1) * (case.context + 4 * STEPS + PAGE_SIZE) for case in cases)
        self._num_pages = -(-most_tokens // PAGE_SIZE)
        config = DecoderConfig("llama", shape, self._length, 1e-5, RopeConfig(), tie_embeddings=True)
        layout = build_layout(shape, [StageRequest(1)])
        [place], [stage] = layout.places(), layout.stages
        comm = SingleCommunicator(GroupSpec(0, 1))
        params = rank_params(config, layout, place)
        self.packed = dict(
            zip(
                [param.name for param in params if param.multiplied],
                make_packed([param.shape for param in params if param.multiplied]),
                strict=True,
            )
        )
        filling: dict[Any, torch.Tensor] = {}  # speed does not depend on the numbers: the same in all layers
        weights: dict[str, Any] = {}
        for param in params:
            if param.shape not in filling:
                filling[param.shape] = torch.randn(param.shape).div_(param.shape[-1] ** 0.5).bfloat16()
            weights[param.name] = filling[param.shape].clone()
            if param.multiplied:
                weights[param.name] = self.packed[param.name]
                weights[param.name].put(0, filling[param.shape])
        self._decoder = Decoder(config, stage, 0, comm, weights)
        self._cache = KVCache(
            shape.num_layers,
            self._num_pages,
            PAGE_SIZE,
            shape.num_kv_heads,
            shape.head_dim,
            torch.bfloat16,
            CPU,
        )
        self._cache.keys.fill_(0.1)
        self._cache.values.fill_(0.1)
        self.sampler = Sampler(stage.vocab, comm)

    def steps(self, case: Case) -> Iterator[Callable[[], object]]:
        """Steps of the case, one after another."""
        tables = SlotTables(max(case.rows, 1), self._length, PAGE_SIZE, None, CPU)
        runner = StepRunner(
            self._decoder,
            self._cache,
            tables,
            self.sampler,
            Links(),
            hidden_size=self.shape.hidden_size,
            dtype=torch.bfloat16,
            device=CPU,
            reports=True,
        )
        pages = torch.randperm(self._num_pages).tolist()
        each = -(-(case.context + 4 * STEPS) // PAGE_SIZE)
        slots = range(max(case.rows, 1))
        new = tuple(NewSequence(slot, tuple(pages[slot * each : (slot + 1) * each]), Sampling()) for slot in slots)
        numbers = count()
        if not case.rows:
            chunk = Chunk(0, 0, tuple(range(case.context)), sample=True)
            while True:
                plan = StepPlan(step=next(numbers), new=new, chunks=(chunk,))
                yield partial(runner.run, plan)
        chunks = tuple(Chunk(slot, case.context - 2, (1,), sample=True) for slot in slots)
        runner.run(StepPlan(step=next(numbers), new=new, chunks=chunks))
        while True:
            plan = StepPlan(step=next(numbers), decodes=tuple(slots))
            yield partial(runner.run, plan)

    @contextmanager
    def timed_sampler(self) -> Iterator[list[float]]:
        """Seconds of each draw."""
        taken_s: list[float] = []
        likeliest = self.sampler.likeliest

        def timed_draw(*arguments: Any) -> Any:
            began_s = time.perf_counter()
            drawn = likeliest(*arguments)
            taken_s.append(time.perf_counter() - began_s)
            return drawn

        self.sampler.likeliest = timed_draw  # type: ignore[method-assign, assignment]
        try:
            yield taken_s
        finally:
            self.sampler.likeliest = likeliest  # type: ignore[method-assign]


def timed(steps: Iterator[Callable[[], object]]) -> list[float]:
    """Seconds of several steps."""
    taken_s: list[float] = []
    while len(taken_s) < STEPS and (len(taken_s) < 2 or sum(taken_s) < MOST_S):
        step = next(steps)
        began_s = time.perf_counter()
        step()
        taken_s.append(time.perf_counter() - began_s)
    return taken_s


def torch_seconds(steps: Iterator[Callable[[], object]]) -> float:
    """Of PyTorch's operators in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        num_steps = len(timed(steps))
    events = profile.key_averages()
    return 1e-6 * float(sum(each.self_cpu_time_total for each in events if each.key.startswith("aten::"))) / num_steps


class Operator:
    """Calls of one kind in some steps: how many, how long, and the least that they must move and calculate."""

    def __init__(self) -> None:
        self.calls = 0
        self.taken_s = self.num_bytes = self.num_flops = self.limit_us = 0.0

    def add(self, call: OperatorCall, ceilings: Ceilings) -> None:
        self.calls += 1
        self.taken_s += call.ended_s - call.started_s
        self.num_bytes += call.work.num_bytes
        self.num_flops += call.work.num_flops
        self.limit_us += ceilings.least_us(call.work.num_bytes, call.work.num_flops)


def name_of(work: Work) -> str:
    return f"linear {work.sizes[1]}x{work.sizes[2]}" if work.operator == "linear" else work.operator


def account(bench: Bench, case: Case, ceilings: Ceilings) -> dict[str, Any]:
    """Of the median step of the case; times in µs."""
    steps = bench.steps(case)
    next(steps)()  # warms up
    plain_s = statistics.median(timed(steps))
    watch = CallWatch()
    with watch.watching(), bench.timed_sampler() as sampler_s:
        taken_s = timed(steps)
    num_steps = len(taken_s)
    operators: defaultdict[str, Operator] = defaultdict(Operator)
    for call in watch.take():
        operators[name_of(call.work)].add(call, ceilings)
    torch_s = torch_seconds(steps)
    native_s = sum(operator.taken_s for operator in operators.values()) / num_steps
    wall_s = statistics.mean(taken_s)
    return {
        "case": str(case),
        "plain_us": 1e6 * plain_s,
        "wall_us": 1e6 * wall_s,
        "native_us": 1e6 * native_s,
        "torch_us": 1e6 * torch_s,
        "interpreter_us": 1e6 * (wall_s - native_s - torch_s),
        "sampler_us": 1e6 * statistics.median(sampler_s),
        "limit_us": sum(operator.limit_us for operator in operators.values()) / num_steps,
        "operators": {
            name: {
                "calls": operator.calls / num_steps,
                "us": 1e6 * operator.taken_s / num_steps,
                "megabytes": 1e-6 * operator.num_bytes / num_steps,
                "gigaflop": 1e-9 * operator.num_flops / num_steps,
                "limit_us": operator.limit_us / num_steps,
            }
            for name, operator in sorted(operators.items(), key=lambda item: -item[1].taken_s)
        },
    }


def print_account(console: Console, title: str, found: dict[str, Any]) -> None:
    table = Table(title, "calls", "µs", "of the step", "MB", "GFLOP", "limit, µs", "limit reached", box=None)
    wall_us = found["wall_us"]

    def share(part_us: float) -> str:
        return f"{100 * part_us / wall_us:.1f} %"

    for name, each in found["operators"].items():
        figures = f"{each['megabytes']:.1f}", f"{each['gigaflop']:.2f}", f"{each['limit_us']:.0f}"
        reached = f"{100 * each['limit_us'] / each['us']:.0f} %"
        table.add_row(name, f"{each['calls']:.0f}", f"{each['us']:.0f}", share(each["us"]), *figures, reached)
    for name in ("torch", "interpreter"):
        table.add_row(name, "", f"{found[f'{name}_us']:.0f}", share(found[f"{name}_us"]))
    limits = "", "", f"{found['limit_us']:.0f}", f"{100 * found['limit_us'] / wall_us:.0f} %"
    table.add_row("step", "", f"{wall_us:.0f}", f"sampler {share(found['sampler_us'])}", *limits)
    console.print(table, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--case", nargs="+", choices=[str(case) for case in CASES], help="these alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if native_cpu.LIBRARY is None:
        sys.exit(f"there are no native operators to account for: {find_native().told}")
    recorded.MOST_TOKENS = 0  # what the interpreter takes is gone from a replay
    cases = [case for case in CASES if not arguments.case or str(case) in arguments.case]
    console = Console(width=120)
    runs = []
    for model in arguments.model:
        bench = Bench(MODELS[model], cases)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            resize_pool(threads)
            ceilings = measure_ceilings(CPU, torch.bfloat16)
            told = f"{ceilings.bytes_per_s / 1e9:.1f} GB/s, {ceilings.flops_per_s / 1e9:.0f} GFLOP/s"
            console.print(f"{model}, {threads} threads: {told}", "")
            accounts = []
            for case in cases:
                accounts.append(account(bench, case, ceilings))
                print_account(console, str(case), accounts[-1])
            runs.append({"model": model, "threads": threads, **ceilings._asdict(), "accounts": accounts})
    if arguments.json is not None:
        report = {
            "benchmark": "where_time_goes",
            "command": f"benchmarks/where_time_goes.py {' '.join(sys.argv[1:])}".split(" --json")[0].strip(),
            "processor": processor(),
            "cores": this_machine().num_cores,
            "native": find_native().told,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "shapes": {model: str(MODELS[model]) for model in arguments.model},
            "runs": runs,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
