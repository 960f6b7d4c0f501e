"""One rank: from its specification to the last step."""

from __future__ import annotations

import time

_IMPORTING_SINCE = time.perf_counter()  # before the imports that take seconds, so that they can be told

import os
import socket
import traceback
from collections.abc import Callable

import torch

from phalanx.comm.communicator import Communicator
from phalanx.comm.create import create_communicator
from phalanx.comm.ledger import Ledger
from phalanx.comm.rendezvous import connect_store
from phalanx.comm.work import GroupBrokenError
from phalanx.engine.channel import RankChannel
from phalanx.engine.messages import (
    NewSequence,
    Progress,
    RankFailed,
    RankReady,
    RankSpec,
    SequenceWork,
    Shutdown,
    StepPlan,
    StepResult,
)
from phalanx.engine.runner import StepRunner
from phalanx.errors import PhalanxError
from phalanx.models.batch import KVCache
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.decoder import Decoder
from phalanx.models.weights import load_params, rank_params
from phalanx.parallel.handover import HandOver

IMPORT_S = time.perf_counter() - _IMPORTING_SINCE

# Two steps of a made-up sequence take every path of a real one once, on every rank: a chunk of a prompt, then a token.
WARMUP_NAME = -1
WARMUP = (
    StepPlan(
        step=-2,
        new=(NewSequence(WARMUP_NAME, seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=-1),),
        work=(SequenceWork(WARMUP_NAME, start=0, tokens=(0, 0), pages=(0,), sample=True),),
        dropped=(),
    ),
    StepPlan(
        step=-1, new=(), work=(SequenceWork(WARMUP_NAME, start=2, tokens=(0,), pages=(), sample=True),), dropped=()
    ),
)


class Rank:
    """The running parts of one rank. Making one is the whole start: rendezvous, weights, KV cache, warm-up."""

    def __init__(self, spec: RankSpec, report: Callable[[Progress], None]) -> None:
        self._spec = spec
        self._report = report
        self._since = time.perf_counter()
        self.startup_s = {"imports": IMPORT_S}
        self._device = torch.device(spec.device)
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._place = list(spec.layout.places(spec.replica))[spec.rank]
        self._stage = spec.layout.stages[self._place.stage]
        torch.set_num_threads(spec.num_threads)
        self._comms: list[Communicator] = []
        self.ledger = Ledger()  # of all transfers of this rank, whichever group they are in
        try:
            self._rendezvous()
            self._load()
            self._warm_up()
        except BaseException:
            self.close()
            raise

    def _rendezvous(self) -> None:
        self._progress("rendezvous", 0, 1)
        spec, place = self._spec, self._place
        store = connect_store(spec.comm.store, timeout_s=spec.comm.timeout_s) if spec.layout.num_ranks > 1 else None

        def connect(group: str, rank: int, size: int) -> Communicator:
            comm = create_communicator(
                spec.comm.backend,
                rank=rank,
                size=size,
                rendezvous=store,
                group=group,
                device=spec.device,
                interface=spec.comm.interface,
                timeout_s=spec.comm.timeout_s,
                ledger=self.ledger,
            )
            self._comms.append(comm)
            return comm

        self._comm = connect(f"stage{place.stage}", place.tensor_rank, self._stage.num_ranks)
        self.choices = {"comm": f"{self._comm.backend}: {self._comm.reason}"}
        self._before = self._after = None
        if len(spec.layout.stages) > 1:
            pipeline = connect("pipeline", place.rank, spec.layout.num_ranks)
            self.choices["comm between stages"] = f"{pipeline.backend}: {pipeline.reason}"
            ranks = spec.layout.stage_ranks(place.stage)
            if not self._stage.first:
                self._before = HandOver(pipeline, spec.layout.stage_ranks(place.stage - 1), ranks, self._comm)
            if not self._stage.last:
                self._after = HandOver(pipeline, ranks, spec.layout.stage_ranks(place.stage + 1), self._comm)
        self._took("rendezvous")

    def _load(self) -> None:
        spec = self._spec
        params = rank_params(spec.config, spec.layout, self._place)
        total = sum(param.num_elements for param in params) * self._dtype.itemsize
        done = 0

        def on_bytes(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self._progress("weights", done, total)

        self._progress("weights", 0, total)
        checkpoint = Checkpoint(spec.entries)
        weights = load_params(
            params, checkpoint, self._dtype, self._device, num_threads=spec.num_threads, on_bytes=on_bytes
        )
        self._weight_bytes = sum(weight.nbytes for weight in weights.values())
        self._bytes_read = checkpoint.bytes_read
        self._cache = KVCache(
            self._stage.layers.size,
            spec.num_pages,
            spec.page_size,
            self._stage.kv_heads[self._place.tensor_rank].size,
            spec.config.shape.head_dim,
            self._dtype,
            self._device,
        )
        self._runner = StepRunner(
            self._stage,
            self._comm,
            Decoder(spec.config, self._stage, self._place.tensor_rank, self._comm, weights),
            self._cache,
            spec.config.shape.hidden_size,
            self._dtype,
            self._device,
            self._before,
            self._after,
        )
        self._took("weights")

    def _warm_up(self) -> None:
        self._progress("warmup", 0, len(WARMUP))
        for done, plan in enumerate(WARMUP, start=1):
            self._runner.run(plan)
            self._progress("warmup", done, len(WARMUP))
        self._runner.forget(WARMUP_NAME)
        self._took("warmup")

    def run(self, plan: StepPlan) -> StepResult | None:
        self.ledger.begin_step(plan.step)
        return self._runner.run(plan)

    def ready(self) -> RankReady:
        return RankReady(
            rank=self._spec.rank,
            node=socket.gethostname(),
            pid=os.getpid(),
            startup_s=self.startup_s,
            weight_bytes=self._weight_bytes,
            bytes_read=self._bytes_read,
            kv_bytes=self._cache.num_bytes,
            choices=self.choices,
        )

    def close(self) -> None:
        """Releases the connections; the process's end releases the rest."""
        for comm in self._comms:
            comm.close()
        self._comms.clear()

    def _progress(self, part: str, done: int, total: int) -> None:
        self._report(Progress(self._spec.rank, part, done, total))

    def _took(self, part: str) -> None:
        now = time.perf_counter()
        self.startup_s[part] = now - self._since
        self._since = now


def run_rank(spec: RankSpec) -> None:
    """Starts a rank and serves steps until the engine says `Shutdown`.

    Reports `Progress`, then `RankReady`, then a `StepResult` a step (the first rank of the last stage) over the
    engine's channel. A failure is reported there as `RankFailed` and raised. Blocks; the caller's process is the
    rank.
    """
    with RankChannel(spec.engine, spec.rank, spec.secret) as channel:
        try:
            rank = Rank(spec, channel.send)
            try:
                channel.send(rank.ready())
                while True:
                    message = channel.receive()
                    if isinstance(message, StepPlan):
                        result = rank.run(message)
                        if result is not None:
                            channel.send(result)
                    elif isinstance(message, Shutdown):
                        return
            finally:
                rank.close()
        except Exception as error:
            channel.send(
                RankFailed(
                    rank=spec.rank,
                    node=socket.gethostname(),
                    message=f"{error}" if isinstance(error, PhalanxError) else f"{type(error).__name__}: {error}",
                    traceback=traceback.format_exc(),
                    symptom=isinstance(error, GroupBrokenError),
                )
            )
            raise
