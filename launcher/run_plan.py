"""All that is decided before a run: the layout, and everything a configuration leaves open, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from phalanx.launcher.machine import Machine
from phalanx.launcher.schema import Config
from phalanx.launcher.sizes import format_bytes
from phalanx.models.config import DecoderConfig
from phalanx.models.weights import kv_bytes_per_token, rank_params
from phalanx.parallel.layout import Layout, RankPlace, build_layout

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NODE_SHARE = 0
"""`num_threads` that stands for the rank's share of its node's cores, known once the rank is placed."""

_CUDA_CONTEXT_BYTES = 2**30  # context, kernels and communicator buffers of one process; about 0.6 to 1 GB on an H100


class Decision(NamedTuple):
    """name: what was to be decided. choice: what was taken. reason: why."""

    name: str
    choice: str
    reason: str


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank holds. kv_bytes: its pages. work_bytes: an estimate, from above, of what a step's activations and
    logits take, and on a GPU a process by itself. All in bytes but `parameters`.
    """

    place: RankPlace
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    work_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.work_bytes


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A configuration with nothing left open.

    dtype: `float32`, `bfloat16` or `float16`. device: `cpu` or `cuda`. backend: of the communicators, or `auto`.
    cpus_per_rank, gpus_per_rank: what a rank takes. num_threads: compute threads of a rank, or NODE_SHARE.
    num_pages: pages of the KV cache, the same on every rank of a replica because they share page tables.
    max_length: most tokens of a sequence. ranks: of replica 0; the others are like it. tightest: the rank with the most
    KV bytes a token, which therefore sets `num_pages`. decisions: for the start-up table.
    """

    layout: Layout
    dtype: str
    device: str
    backend: str
    cpus_per_rank: float
    gpus_per_rank: float
    num_threads: int
    page_size: int
    num_pages: int
    max_length: int
    ranks: tuple[RankPlan, ...]
    tightest: RankPlace
    decisions: tuple[Decision, ...]

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache of one replica holds."""
        return self.num_pages * self.page_size

    @property
    def num_ranks(self) -> int:
        """Ranks of all replicas."""
        return self.layout.num_ranks * self.layout.replicas


def plan_run(config: Config, model: DecoderConfig, machine: Machine) -> RunPlan:
    """Decides everything that `config` leaves open for `model`. Pure: `machine` is all it knows of where it runs.

    It decides also where the outcome cannot run: `run_faults.find_faults` says so. Raises LayoutError where the model
    cannot be cut as asked.
    """
    requests = config.parallel.stage_requests()
    layout = build_layout(model.shape, requests, config.parallel.replicas)
    device, device_reason = _device(config, machine)
    dtype, dtype_reason = _dtype(config, model, device, machine)
    cpus, num_threads, cpus_reason = _cpus(config, machine, layout)
    gpus, gpus_reason = _gpus(config, device, machine, layout)
    shares_gpu = device == "cuda" and gpus < 1
    backend = "gloo" if config.comm.backend == "auto" and shares_gpu and layout.num_ranks > 1 else config.comm.backend

    kv_costs = [kv_bytes_per_token(model, layout, place, DTYPE_BYTES[dtype]) for place in layout.places()]
    most = max(kv_costs)
    page_size = config.engine.page_size
    num_pages = config.engine.kv_cache // (most * page_size)
    ranks = tuple(
        _rank_plan(config, model, layout, place, dtype, device, num_pages * page_size) for place in layout.places()
    )
    tightest = ranks[kv_costs.index(most)].place
    capacity = num_pages * page_size
    asked = config.model.max_length
    max_length = min(model.max_position, capacity) if asked is None else asked
    limit = "what the model can address" if max_length == model.max_position else "what the KV cache holds"
    decisions = [
        Decision("ray", config.cluster.ray, _RAY_REASONS.get(config.cluster.ray, "the cluster with that head")),
        Decision("placement", *_placement(config)),
        Decision("device", device, device_reason),
        Decision("dtype", dtype, dtype_reason),
        Decision("layers", "+".join(str(stage.layers.size) for stage in layout.stages), _layers_reason(config)),
        Decision("CPUs per rank", f"{cpus:g}", cpus_reason),
        Decision("threads per rank", str(num_threads), "its whole cores, at least one")
        if num_threads != NODE_SHARE
        else Decision("threads per rank", "a share", "the cores of its node over the ranks there"),
    ]
    if device == "cuda":
        decisions.append(Decision("GPUs per rank", f"{gpus:g}", gpus_reason))
    decisions += [
        Decision(
            "KV cache",
            f"{num_pages} pages of {page_size} tokens",
            f"{format_bytes(config.engine.kv_cache)} a rank, {format_bytes(most)} a token on rank {tightest.rank}",
        ),
        Decision("longest sequence", f"{max_length} tokens", limit if asked is None else "as configured"),
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
        page_size=page_size,
        num_pages=num_pages,
        max_length=max_length,
        ranks=ranks,
        tightest=tightest,
        decisions=tuple(decisions),
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


def _layers_reason(config: Config) -> str:
    asked = [request.num_layers for request in config.parallel.stage_requests()]
    if None not in asked:
        return "as configured"
    if len(asked) == 1:
        return "one stage holds them all"
    dealt = "dealt by the weights a rank reads in a step"
    return f"as configured, the others {dealt}" if any(asked) else dealt


def _rank_plan(
    config: Config,
    model: DecoderConfig,
    layout: Layout,
    place: RankPlace,
    dtype: str,
    device: str,
    capacity_tokens: int,
) -> RankPlan:
    parameters = sum(param.num_elements for param in rank_params(model, layout, place))
    per_token = kv_bytes_per_token(model, layout, place, DTYPE_BYTES[dtype])
    stage = layout.stages[place.stage]
    part, shape = place.tensor_rank, model.shape
    heads = stage.query_heads[part].size + 2 * stage.kv_heads[part].size
    # A token's residual stream, its normed copy and a partial sum (float32 at most), then the widest of projections and
    # gated feed-forward; the logits of a step in float32, with a copy to sample from.
    widest = max(heads * shape.head_dim * 2, 3 * stage.ffn[part].size)
    work = config.engine.max_batch_tokens * (3 * 4 * shape.hidden_size + DTYPE_BYTES[dtype] * widest)
    if stage.last:
        work += config.engine.max_sequences * stage.vocab[part].size * 4 * 2
    if device == "cuda":
        work += _CUDA_CONTEXT_BYTES
    return RankPlan(
        place=place,
        parameters=parameters,
        weight_bytes=parameters * DTYPE_BYTES[dtype],
        kv_bytes_per_token=per_token,
        kv_bytes=per_token * capacity_tokens,
        work_bytes=work,
    )
