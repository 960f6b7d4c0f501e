"""Ranks without a model, to run where `run_rank` would: they speak the engine's protocol and fail on demand.

What a rank does is written in its `dtype`: the behaviour of each rank, in order, separated by commas. It starts
no torch work, so that what is measured and waited for is the host alone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback

from msgspec.structs import replace

from phalanx.engine.channel import RankChannel
from phalanx.engine.messages import (
    CommSettings,
    Progress,
    RankFailed,
    RankReady,
    RankSpec,
    Shutdown,
    StepPlan,
    StepResult,
)
from phalanx.errors import CommError
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.parallel.layout import StageRequest, build_layout
from phalanx.parallel.shape import ModelShape

SHAPE = ModelShape(
    hidden_size=64, num_layers=4, num_query_heads=8, num_kv_heads=4, head_dim=8, ffn_size=128, vocab_size=256
)
ECHO = StepPlan(step=7)


def make_specs(*stages: StageRequest | int, behaviour: str = "serve") -> list[RankSpec]:
    """Specifications of one replica. behaviour: of every rank, or one a rank separated by commas."""
    requests = [StageRequest(num_ranks=stage) if isinstance(stage, int) else stage for stage in stages]
    layout = build_layout(SHAPE, requests)
    config = DecoderConfig("llama", SHAPE, max_position=128, norm_eps=1e-5, rope=RopeConfig())
    return [
        RankSpec(
            replica=0,
            rank=rank,
            layout=layout,
            config=config,
            entries={},
            dtype=behaviour,
            device="cpu",
            num_threads=0,
            num_pages=1,
            page_size=16,
            max_sequences=4,
            max_batch_tokens=64,
            max_length=64,
            comm=CommSettings(store=""),
            engine="",
            secret="",
        )
        for rank in range(layout.num_ranks)
    ]


def run(spec: RankSpec) -> None:
    """Takes the place of `run_rank`."""
    behaviours = spec.dtype.split(",")
    behaviour = behaviours[min(spec.rank, len(behaviours) - 1)]
    with RankChannel(spec.engine, spec.rank, spec.secret) as channel:
        try:
            _serve(spec, behaviour, channel)
        except Exception as error:
            if behaviour != "mute":
                node, symptom = socket.gethostname(), isinstance(error, CommError)
                channel.send(RankFailed(spec.rank, node, str(error), traceback.format_exc(), symptom))
            raise


def _serve(spec: RankSpec, behaviour: str, channel: RankChannel) -> None:
    channel.send(Progress(spec.rank, "weights", 1, 2))
    if behaviour == "bad-weights":
        _read_broken_file()
    if behaviour == "mute":
        raise ValueError("said nothing over the channel")
    if behaviour == "slow-symptom":  # what a rank sees whose neighbour is gone
        time.sleep(0.2)
        raise CommError("rank 1 closed the connection")
    if behaviour == "quick-symptom":
        raise CommError("rank 1 closed the connection")
    if behaviour == "late-cause":
        time.sleep(0.4)
        _read_broken_file()
    if behaviour == "hang-in-start":
        time.sleep(600)
    if behaviour == "exit-at-once":
        return
    ready = RankReady(spec.rank, socket.gethostname(), os.getpid(), {"imports": 0.0}, 0, 0, 0, 1, _facts(spec))
    channel.send(replace(ready, cores=spec.cores))
    while True:
        message = channel.receive()
        if isinstance(message, Shutdown):
            if behaviour == "ignore-shutdown":
                time.sleep(600)
            return
        if isinstance(message, StepPlan):
            _step(spec, behaviour, message, channel)


def _step(spec: RankSpec, behaviour: str, plan: StepPlan, channel: RankChannel) -> None:
    if behaviour == "ignore-step":
        return
    if behaviour == "fail-in-step":
        _read_broken_file()
    if behaviour == "killed-in-step":
        print("last words of the rank", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "segfault-in-step":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "return-in-step":
        raise SystemExit(0)
    if behaviour == "symptom-in-step":
        time.sleep(0.05)
        raise CommError("all_reduce 12 waited for rank 1")
    if spec.rank == spec.layout.num_ranks - 1:
        channel.send(StepResult(plan.step, ()))


def _read_broken_file() -> None:
    raise ValueError("model.safetensors: tensor lm_head is truncated")


def _facts(spec: RankSpec) -> dict[str, str]:
    """What a test may want to know of the process."""
    return {
        "threads": str(spec.num_threads),
        "omp": os.environ.get("OMP_NUM_THREADS", ""),
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "store": spec.comm.store,
        "cpus": " ".join(map(str, sorted(os.sched_getaffinity(0)))),
    }
