"""All that is decided before a run: the layout, and everything a configuration leaves open, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from phalanx.errors import LayoutError
from phalanx.launcher.kv_pool import KVPool, plan_kv_pool
from phalanx.launcher.machine import Machine
from phalanx.launcher.rank_plan import RankPlan, plan_rank
from phalanx.launcher.schema import Config
from phalanx.launcher.sizes import format_bytes
from phalanx.models.config import DecoderConfig
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.layout import Layout, RankPlace, build_layout, head_obstacle, head_weighs

LEAST_HEAD = 0.05  # of the layers of a stage: sharing costs a step an exchange of rows for logits
NODE_SHARE = 0
"""`num_threads` that stands for the rank's share of its node's cores, known once the rank is placed."""


class Decision(NamedTuple):
    """name: what was to be decided. choice: what was taken. reason: why."""

    name: str
    choice: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A configuration with nothing left open.

    dtype: `float32`, `bfloat16` or `float16`. device: `cpu` or `cuda`. backend: of the communicators, or `auto`.
    cpus_per_rank, gpus_per_rank: what a rank takes. num_threads: compute threads of a rank, or NODE_SHARE.
    kv_pool: pages of the KV cache. max_length: most tokens of a sequence; where the pages are measured, less if they
    hold less. ranks: of replica 0; the others are like it. decisions: for the start-up table. quantization: of the
    weights, as `model.quantization`, but for `auto`.
    """

    layout: Layout
    dtype: str
    device: str
    backend: str
    cpus_per_rank: float
    gpus_per_rank: float
    num_threads: int
    kv_pool: KVPool
    max_length: int
    ranks: tuple[RankPlan, ...]
    decisions: tuple[Decision, ...]
    quantization: str = "none"

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.kv_pool.page_size

    @property
    def num_pages(self) -> int:
        """Pages of every rank; 0 where they are measured at start."""
        return self.kv_pool.num_pages

    @property
    def tightest(self) -> RankPlace:
        """The rank with room for the fewest pages, which therefore sets how many all have."""
        return self.ranks[self.kv_pool.tightest].place

    @property
    def kv_capacity_tokens(self) -> int | None:
        """Tokens that the KV cache of one replica holds: by estimate where that is measured at start, None for none."""
        pages = self.kv_pool.expected_pages
        return None if pages is None else pages * self.page_size

    @property
    def num_ranks(self) -> int:
        """Ranks of all replicas."""
        return self.layout.num_ranks * self.layout.replicas


def plan_run(
    config: Config, model: DecoderConfig, machine: Machine, entries: Mapping[str, TensorEntry] | None = None
) -> RunPlan:
    """Decides everything that `config` leaves open for `model`. Pure: `machine` is all it knows of where it runs, and
    `entries` of the checkpoint, as far as they are known.

    It decides also where the outcome cannot run: `run_faults.find_faults` says so. Raises LayoutError where the model
    cannot be cut as asked.
    """
    requests = config.parallel.stage_requests()
    device, device_reason = _device(config, machine)
    dtype, dtype_reason = _dtype(config, model, device, machine)
    shares_head, head_reason = _head(config, model, device, dtype)
    layout = build_layout(model.shape, requests, config.parallel.replicas, shares_head=shares_head)
    cpus, num_threads, cpus_reason = _cpus(config, machine, layout)
    gpus, gpus_reason = _gpus(config, device, machine, layout)
    shares_gpu = device == "cuda" and gpus < 1
    backend = "gloo" if config.comm.backend == "auto" and shares_gpu and layout.num_ranks > 1 else config.comm.backend

    scheme, scheme_reason = _quantization(config, model)
    bare = [plan_rank(config.engine, model, layout, place, dtype, device, scheme, entries) for place in layout.places()]
    pool, kv_choice, kv_reason = plan_kv_pool(config, model, machine, device, gpus, bare, layout.replicas)
    expected_tokens = (pool.expected_pages or 0) * pool.page_size
    ranks = tuple(replace(rank, kv_bytes=rank.kv_bytes_per_token * expected_tokens) for rank in bare)
    max_length, length_reason = _max_length(config, model, pool)
    decisions = [
        Decision("ray", config.cluster.ray, _RAY_REASONS.get(config.cluster.ray, "the cluster with that head")),
        Decision("placement", *_placement(config)),
        Decision("device", device, device_reason),
        Decision("dtype", dtype, dtype_reason),
        *([Decision("quantization", scheme, scheme_reason)] if scheme != "none" or model.quantization else []),
        *_cut_costs(bare),
        Decision("layers", "+".join(str(stage.layers.size) for stage in layout.stages), _layers_reason(config)),
        *([Decision("head", _head_choice(layout), head_reason)] if len(requests) > 1 else []),
        Decision("CPUs per rank", f"{cpus:g}", cpus_reason),
        Decision("threads per rank", str(num_threads), "its whole cores, at least one")
        if num_threads != NODE_SHARE
        else Decision("threads per rank", "a share", "the cores of its node over the ranks there"),
    ]
    if device == "cuda":
        decisions.append(Decision("GPUs per rank", f"{gpus:g}", gpus_reason))
    kv_dtype = config.engine.kv_cache_dtype
    decisions += [
        *([] if kv_dtype == "auto" else [Decision("KV cache dtype", kv_dtype, _KV_DTYPE_REASON)]),
        Decision("KV cache", kv_choice, kv_reason),
        Decision("longest sequence", f"{max_length} tokens", length_reason),
    ]
    if backend != config.comm.backend:
        decisions.append(Decision("comm", backend, "ranks share a GPU, which NCCL does not do"))
    return RunPlan(
        layout=layout,
        dtype=dtype,
        device=device,
        backend=backend,
        cpus_per_rank=cpus,
        gpus_per_rank=gpus,
        num_threads=num_threads,
        kv_pool=pool,
        max_length=max_length,
        ranks=ranks,
        decisions=tuple(decisions),
        quantization=scheme,
    )


_RAY_REASONS = {
    "none": "plain processes on this machine",
    "local": "a Ray of our own on this machine",
    "auto": "the cluster this machine belongs to",
}


def _placement(config: Config) -> tuple[str, str]:
    if not config.cluster.elsewhere:
        return "this machine", "cluster.ray is " + config.cluster.ray
    if config.cluster.spread_stage:
        return "anywhere", "cluster.spread_stage is set"
    return "whole stages", "ranks of a stage stay on one node"


def _device(config: Config, machine: Machine) -> tuple[str, str]:
    if config.cluster.device != "auto":
        return config.cluster.device, "as configured"
    if config.cluster.gpus_per_rank is not None:
        device = "cuda" if config.cluster.gpus_per_rank else "cpu"
        return device, f"cluster.gpus_per_rank is {config.cluster.gpus_per_rank:g}"
    for index, stage in enumerate(config.parallel.stages or ()):
        if stage.accelerator is not None:
            return "cuda", f"stage {index} asks for {stage.accelerator}"
    if machine.gpus:
        return "cuda", f"this machine has {_gpu_words(machine)}"
    return "cpu", "PyTorch sees no GPU on this machine"


def _gpu_words(machine: Machine) -> str:
    if not machine.gpus:
        return "no GPU that PyTorch can use"
    names = ", ".join(dict.fromkeys(gpu.name for gpu in machine.gpus))
    return f"{len(machine.gpus)} GPU{'s' if len(machine.gpus) > 1 else ''} ({names})"


def _dtype(config: Config, model: DecoderConfig, device: str, machine: Machine) -> tuple[str, str]:
    if config.model.dtype != "auto":
        return config.model.dtype, "as configured"
    if device == "cuda":
        if model.dtype == "float16":
            return "float16", "as the checkpoint is stored"
        return "bfloat16", "half the memory of float32, with its range"
    # A float16 product of 64 rows took 31 ms on a Zen 4 core, 8 in float32 and 3 in bfloat16: never taken unasked.
    if machine.bfloat16:
        return "bfloat16", "this CPU has instructions for it"
    return "float32", "this CPU has no bfloat16 instructions"


def _quantization(config: Config, model: DecoderConfig) -> tuple[str, str]:
    asked, stored = config.model.quantization, model.quantization
    if asked == "auto" and stored is not None:
        return "stored", f"matrices of products stay as {stored.method} has stored them, by config.json"
    chosen = "none" if asked == "auto" else asked
    return chosen, _QUANTIZATION_REASONS[chosen]


def _cut_costs(ranks: Sequence[RankPlan]) -> list[Decision]:
    extra, weights = sum(rank.cut_bytes for rank in ranks), sum(rank.weight_bytes for rank in ranks)
    if extra <= 0:
        return []
    reason = f"{extra / weights:.1%} of the weights: scales held twice, or room, where cuts fall into groups of inputs"
    return [Decision("cuts in groups", f"+{format_bytes(extra)}", reason)]


_KV_DTYPE_REASON = "as configured: a byte a number, and a scale in 2 for each head of each token"
_QUANTIZATION_REASONS = {
    "none": "in model.dtype, dequantised while they are loaded",
    "stored": "matrices of products stay as the checkpoint has them",
    "int8": "matrices of products in 8 bits, a scale an output, quantised while they are loaded",
    "int4": "matrices of layers in 4 bits, a scale and an offset for 32 inputs, the head in 8; while they are loaded",
    "w8a8": "matrices of products in 8 bits, a scale an output; activations of layers, too; while they are loaded",
    "w4a8": "layers in 4 bits, a scale and an offset for 32 inputs, head in 8; on CPUs activations of layers in 8, too",
    "fp8": "matrices of layers in E4M3, a scale an output, head in int8; on GPUs with units for it activations, too",
}


def _cpus(config: Config, machine: Machine, layout: Layout) -> tuple[float, int, str]:
    cpus = config.cluster.cpus_per_rank
    if cpus is not None:
        return cpus, max(1, math.floor(cpus)), "as configured"
    if config.cluster.elsewhere:
        return 1.0, NODE_SHARE, "what each reserves of its node"
    ranks = layout.num_ranks * layout.replicas
    share = machine.num_cores / ranks
    # Ray counts in ten-thousandths, and rounding up would ask for more than there is.
    cpus = float(math.floor(share)) if share >= 1 else math.floor(share * 1e4) / 1e4
    return cpus, max(1, math.floor(cpus)), f"{machine.num_cores} cores over {ranks} ranks"


def _gpus(config: Config, device: str, machine: Machine, layout: Layout) -> tuple[float, str]:
    if device == "cpu":
        return 0.0, "ranks on the CPU take none"
    gpus = config.cluster.gpus_per_rank
    if gpus is not None:
        return gpus, "as configured"
    ranks = layout.num_ranks * layout.replicas
    if config.cluster.elsewhere or ranks <= len(machine.gpus) or not machine.gpus:
        return 1.0, "a GPU of its own"
    together = -(-ranks // len(machine.gpus))
    return math.floor(1e4 / together) / 1e4, f"{ranks} ranks share {_gpu_words(machine)}, up to {together} on one"


def _max_length(config: Config, model: DecoderConfig, pool: KVPool) -> tuple[int, str]:
    if config.model.max_length is not None:
        return config.model.max_length, "as configured"
    if pool.measured:
        return model.max_position, "what the model can address, unless the KV cache holds less"
    capacity = pool.num_pages * pool.page_size
    if capacity < model.max_position:
        return capacity, "what the KV cache holds"
    return model.max_position, "what the model can address"


def _head(config: Config, model: DecoderConfig, device: str, dtype: str) -> tuple[bool, str]:
    """Whether the first stage and the last share the head."""
    asked, requests = config.parallel.head, config.parallel.stage_requests()
    if asked == "shared" and device != "cpu":
        raise LayoutError("parallel.head is shared, which ranks on GPUs do not do; set it to last, or to auto")
    if asked != "auto":
        return asked == "shared", "as configured"
    weighs = head_weighs(model.shape, len(requests))
    obstacles = (
        (device != "cpu", "ranks on GPUs do not share it"),
        (dtype != "bfloat16", f"sharing it was measured to pay in bfloat16, this is {dtype}"),
        (config.cluster.elsewhere, "stages may be on several machines"),
        (weighs < LEAST_HEAD, f"half of it is {weighs:.1%} of a stage's layers"),
    )
    obstacle = next((why for stands, why in obstacles if stands), head_obstacle(model.shape, requests))
    return (
        obstacle is None,
        obstacle or f"half of it is {weighs:.0%} of a stage's layers: no deal of these evens it out",
    )


def _head_choice(layout: Layout) -> str:
    if not layout.shares_head:
        return "last stage"
    first, last = (sum(rows.size for rows in layout.stages[end].head) for end in (0, -1))
    return f"first {first / (first + last):.0%}, last {last / (first + last):.0%}"


def _layers_reason(config: Config) -> str:
    asked = [request.num_layers for request in config.parallel.stage_requests()]
    if None not in asked:
        return "as configured"
    if len(asked) == 1:
        return "one stage holds them all"
    dealt = "dealt by the weights a rank multiplies a token by"
    return f"as configured, the others {dealt}" if any(asked) else dealt
