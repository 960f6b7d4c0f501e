"""One rank: from its specification to the last step."""

from __future__ import annotations

import time

_IMPORTING_SINCE = time.perf_counter()  # before the imports that take seconds, so that they can be told

import gc
import os
import socket
import threading
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from phalanx.comm.communicator import Communicator
from phalanx.comm.create import create_communicator
from phalanx.comm.gpu import CudaGpu
from phalanx.comm.ledger import Ledger
from phalanx.comm.link import link_bytes_per_s
from phalanx.comm.rendezvous import connect_store, local_address, parse_rendezvous
from phalanx.comm.work import GroupBrokenError
from phalanx.engine.booked_graphs import BookedGraphs
from phalanx.engine.channel import RankChannel
from phalanx.engine.clock import ClockKeeper
from phalanx.engine.device_memory import memory_meter
from phalanx.engine.feedback import TokenReceiver, TokenSender
from phalanx.engine.host_memory import give_back
from phalanx.engine.kv_budget import num_pages_for
from phalanx.engine.late_result import LateResult
from phalanx.engine.memory_book import ACTIVATIONS, COMMUNICATORS, PAGES, WEIGHTS, WORKSPACES, MemoryBook, Sizes
from phalanx.engine.messages import (
    CommReport,
    KVMeasure,
    Progress,
    RankFailed,
    RankReady,
    RankSpec,
    Shutdown,
    StageReport,
    StageStep,
    StepPlan,
    TraceReport,
)
from phalanx.engine.runner import Links, Ran, StepRunner
from phalanx.engine.sampler import Sampler
from phalanx.engine.step_profiler import Seen, StepProfiler
from phalanx.engine.tables import SlotTables
from phalanx.engine.trial import WARMUP, try_largest_steps
from phalanx.errors import PhalanxError
from phalanx.kernels import Graphs, choose_packing, compiled_names, told_of_quantised, use_compiler
from phalanx.kernels.ceilings import Ceilings, measure_ceilings
from phalanx.kernels.triton_gpu import find_triton
from phalanx.models.batch import KVCache
from phalanx.models.captured import choose_graphs
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.decoder import Decoder
from phalanx.models.params import kv_bytes_per_token, rank_params
from phalanx.models.weights import load_params
from phalanx.native import resize_pool
from phalanx.parallel.handover import HandOver
from phalanx.parallel.overlap import Overlap

IMPORT_S = time.perf_counter() - _IMPORTING_SINCE

# A stage tells of its steps when it has nothing to do for so long, or the first of them was so long ago.
REPORT_S = 0.1
MOST_REPORTED_S = 0.5
LOOK_S = 0.001  # between two looks at a GPU's step, where no next one is known


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
        resize_pool(spec.num_threads)
        self._comms: list[Communicator] = []
        self._groups: dict[str, tuple[int, ...]] = {}  # ranks of the replica, in the order of their numbers in a group
        self._untold: Ran | None = None  # the last step, where its result has not been told
        self._times: list[StageStep] = []  # of steps that are done, and not reported
        self._profiler: StepProfiler | None = None
        self._graphs: Graphs | None = None
        self._ceilings: Ceilings | None = None
        self.ledger = Ledger()  # of all transfers of this rank, whichever group they are in
        self._params = rank_params(spec.config, spec.layout, self._place)
        self._memory = MemoryBook(memory_meter(self._device), self._sizes())
        try:
            with self._memory.during("the making of communicators", COMMUNICATORS):
                self._rendezvous()
            self._memory.book(COMMUNICATORS, COMMUNICATORS)
            with self._memory.during("the loading of weights", WEIGHTS):
                self._load()
            self._memory.book(WEIGHTS, WORKSPACES)
            self._make_runner(spec.num_pages or -(-self._widest_step // spec.page_size))
            self._warm_up()
        except BaseException:
            self.close()
            raise

    def _rendezvous(self) -> None:
        self._progress("rendezvous", 0, 1)
        spec, place = self._spec, self._place
        store = connect_store(spec.comm.store, timeout_s=spec.comm.timeout_s) if spec.layout.num_ranks > 1 else None

        def connect(group: str, ranks: Sequence[int]) -> Communicator:
            self._groups[group] = tuple(ranks)
            comm = create_communicator(
                spec.comm.backend,
                rank=ranks.index(place.rank),
                size=len(ranks),
                rendezvous=store,
                group=group,
                device=spec.device,
                interface=spec.comm.interface,
                timeout_s=spec.comm.timeout_s,
                ledger=self.ledger,
                member=f"rank {place.rank} of the replica, on {socket.gethostname()}",
            )
            self._comms.append(comm)
            return comm

        ranks = spec.layout.stage_ranks(place.stage)
        self._comm = connect(f"stage{place.stage}", ranks)
        self.choices = {"comm": f"{self._comm.backend}: {self._comm.reason}"}
        before = after = tokens_in = tokens_out = None
        layout = spec.layout
        self._everyone = self._comm
        if len(layout.stages) > 1:
            pipeline = connect("pipeline", range(layout.num_ranks))
            self._everyone = pipeline
            self.choices["comm between stages"] = f"{pipeline.backend}: {pipeline.reason}"
            if not self._stage.first:
                before = self._border(pipeline, layout.stage_ranks(place.stage - 1), ranks)
            if not self._stage.last:
                after = self._border(pipeline, ranks, layout.stage_ranks(place.stage + 1))
            if self._stage.first or self._stage.last:
                # A group of its own: tokens go back while hidden states go forward.
                last, first = layout.stage_ranks(len(layout.stages) - 1), layout.stage_ranks(0)
                ends = connect("tokens", (*last, *first))
                senders, receivers = range(len(last)), range(len(last), ends.size)
                if self._stage.first:
                    tokens_in = TokenReceiver(ends, senders, receivers, len(layout.stages) + 1)
                else:
                    tokens_out = TokenSender(ends, senders, receivers)
        self._links = Links(before, after, tokens_in, tokens_out)
        self._took("rendezvous")

    def _border(self, pipeline: Communicator, senders: range, receivers: range) -> HandOver:
        scheme = self._spec.comm.compress
        border = HandOver(pipeline, senders, receivers, self._comm, scheme)
        if scheme != "none":
            stage = self._place.stage - (pipeline.rank in receivers)
            num_links = len(senders) * len(receivers)
            self.choices[f"compression after stage {stage}"] = (
                f"{scheme}: on {border.num_compressed} of {num_links} links, those between machines"
            )
        return border

    def _load(self) -> None:
        spec, total, done = self._spec, self._sizes().weight_bytes, 0

        def on_bytes(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self._progress("weights", done, total)

        self._progress("weights", 0, total)
        checkpoint = Checkpoint(spec.entries)
        packing = choose_packing(self._dtype, self._device)
        if self._device.type == "cpu":
            quantised = spec.quantization != "none"
            self.choices["cpu products"] = told_of_quantised(self._dtype) if quantised else packing.told
        else:
            self.choices["gpu kernels"] = find_triton().told
            graphs, told = choose_graphs(self._comm, spec.max_sequences, wanted=spec.cuda_graphs)
            self._graphs = None if graphs is None else BookedGraphs(graphs, self._memory)
            self.choices["decode steps"] = told
        weights = load_params(
            self._params,
            checkpoint,
            self._dtype,
            self._device,
            packed=packing.usable,
            quantization=spec.quantization,
            num_threads=spec.num_threads,
            on_bytes=on_bytes,
        )
        give_back()
        self._weight_bytes = sum(weight.nbytes for weight in weights.values())
        self._bytes_read = checkpoint.bytes_read
        self._overlap = Overlap(spec.comm.overlap)
        part = self._place.tensor_rank
        self._decoder = Decoder(spec.config, self._stage, part, self._comm, weights, self._overlap, self._graphs)
        if spec.profile is not None:
            self._profiler = StepProfiler(spec.profile, weights, self._device)
        self._took("weights")

    def _sizes(self) -> Sizes:
        spec, place, measure = self._spec, self._place, self._spec.measure
        return Sizes(
            num_ranks=self._stage.num_ranks,
            weight_bytes=sum(param.num_elements for param in self._params) * self._dtype.itemsize,
            step_tokens=self._widest_step,
            step_rows=self._most_drawn,
            page_size=spec.page_size,
            page_bytes=spec.page_size * kv_bytes_per_token(spec.config, spec.layout, place, self._dtype.itemsize),
            least_pages=1 if measure is None else measure.least_pages,
            share=None if measure is None else measure.share,
        )

    @property
    def _widest_step(self) -> int:
        """Tokens of one sequence in one step, at most."""
        return min(self._spec.max_batch_tokens, self._spec.max_length)

    @property
    def _most_drawn(self) -> int:
        """Tokens that one step may draw."""
        return min(self._spec.max_sequences, self._spec.max_batch_tokens)

    def _make_runner(self, num_pages: int) -> None:
        spec, stage, part = self._spec, self._stage, self._place.tensor_rank
        with self._memory.during(f"the making of {num_pages} pages", PAGES):
            self._cache = KVCache(
                stage.layers.size,
                num_pages,
                spec.page_size,
                stage.kv_heads[part].size,
                spec.config.shape.head_dim,
                self._dtype,
                self._device,
            )
        self._runner = StepRunner(
            self._decoder,
            self._cache,
            SlotTables(spec.max_sequences, spec.max_length, spec.page_size, spec.config.sliding_window, self._device),
            Sampler(stage.vocab, self._comm) if stage.last else None,
            self._links,
            hidden_size=spec.config.shape.hidden_size,
            dtype=self._dtype,
            device=self._device,
            reports=part == self._lightest,
            drains=spec.comm.overlap == "none",
            gpu=CudaGpu(torch.cuda.current_device()) if self._device.type == "cuda" else None,
        )
        self._memory.book(PAGES, WORKSPACES)

    @property
    def _lightest(self) -> int:
        """Of the ranks of the stage, the one with the fewest heads: what it does beside, others wait for least."""
        heads = self._stage.query_heads.sizes
        return heads.index(min(heads))

    def _warm_up(self) -> None:
        spec, measure = self._spec, self._spec.measure
        self._compile()
        self._progress("warmup", 0, len(WARMUP))
        for done, plan in enumerate(WARMUP, start=1):
            with self._memory.during("the first steps", ACTIVATIONS):
                self._runner.run(plan)
            self._progress("warmup", done, len(WARMUP))
        self._measure_overlap()
        if self._memory.by_part or measure is not None:
            self._decoder.forget_steps()
            self._memory.book(WORKSPACES, WORKSPACES)
            try_largest_steps(
                self._runner.run,
                self._decoder,
                self._memory,
                most_tokens=min(self._widest_step, self._cache.num_pages * spec.page_size),
                page_size=spec.page_size,
                num_sequences=self._most_drawn,
                captures=self._graphs is not None,
            )
        if measure is not None:
            self._make_runner(self._measured_pages(measure))
        if self._spec.profile is not None:
            self._everyone.barrier()  # all at once, as in a step
            self._ceilings = measure_ceilings(self._device, self._dtype)
            give_back()
        self._took("warmup")

    def _compile(self) -> None:
        """What torch.compile is to take, by the first steps that call it."""
        use_compiler(self._device, self._spec.torch_compile)
        if not self._spec.torch_compile:
            return
        self._progress("compile", 0, 1)
        for plan in WARMUP:
            self._runner.run(plan)
        self._decoder.forget_steps()
        names = ", ".join(compiled_names())
        self.choices["torch.compile"] = (
            f"{names}: PyTorch's there, compiled as engine.torch_compile asks"
            if names
            else "nothing: operators of our own do what it would"
        )
        self._took("compile")

    def _measure_overlap(self) -> None:
        """Finds out, with the other ranks of the stage, how sums are best hidden."""
        if self._comm.size > 1:
            layer = self._decoder.layers[0]
            self.choices["overlap"] = self._overlap.measure(
                self._comm,
                self._decoder.work(),
                self._decoder.summed_weight,
                layer.ffn_norm,
                self._spec.max_batch_tokens,
            )

    def _measured_pages(self, measure: KVMeasure) -> int:
        """Pages that the tightest rank of the replica has room for, asked when all have run the widest step."""
        bytes_per_page = self._cache.num_bytes // self._cache.num_pages
        del self._runner, self._cache  # the next ones take their place
        self._memory.book(PAGES, WORKSPACES)
        self._memory.give_back()
        self._everyone.barrier()
        part = measure.device_part if self._memory.by_part else 1 / (self._num_here() * measure.copies)
        room_bytes = self._memory.room_bytes(part)
        self._everyone.barrier()  # nobody takes its pages before all have looked
        found = num_pages_for(
            room_bytes,
            measure.share,
            bytes_per_page,
            measure.limit_pages,
            least_pages=measure.least_pages,
            fitting=self._memory.too_few_pages(room_bytes),
        )
        fewest = self._everyone.all_reduce(torch.tensor([-found], dtype=torch.int64, device=self._device), op="max")
        return -int(fewest)

    def _num_here(self) -> int:
        """Ranks of the replica on this machine."""
        own = torch.tensor([zlib.crc32(socket.gethostname().encode())], dtype=torch.int64)
        return int((self._everyone.all_gather(own) == own).sum())

    def run(self, plan: StepPlan, on_start: Callable[[], None] | None = None) -> Ran:
        """on_start: see `StepRunner.run`."""
        self.ledger.begin_step(plan.step)
        profiling = nullcontext() if self._profiler is None else self._profiler.step(plan)
        with profiling, self._memory.during(f"step {plan.step}", ACTIVATIONS):
            ran = self._runner.run(plan, on_start)
        for comm in self._comms:
            comm.check()  # a GPU runs on where a transfer has failed: its results are none then
        return ran

    def serve(self, channel: RankChannel, clock: ClockKeeper) -> None:
        """Runs steps until the engine says `Shutdown`.

        The result of a step is told when the next one is about to be computed, where that is known already: in a
        process that the two share, the engine's thread then has the interpreter while the rank needs none. Where a GPU
        is still at it by then, it is told once the GPU has been given that next step.
        """
        self.ledger.take()  # what the warm-up took is no part of it
        plans: deque[StepPlan] = deque()  # the next step and, where transfers go behind compute, the one after it
        most = 1 if self._spec.comm.overlap == "none" else 2
        ending = False
        while plans or not ending:
            while not ending and len(plans) < most:
                message = channel.receive(0.0 if plans else self._patience_s())
                if message is None:
                    if plans or self._untold is None:
                        break
                    self._tell_result(channel, waits=False)
                    continue
                ending = isinstance(message, Shutdown)
                if isinstance(message, StepPlan):
                    self._runner.expect(message)
                    plans.append(message)
            times = self._times
            if times and not ending and (not plans or times[-1].ended_s - times[0].started_s > MOST_REPORTED_S):
                self._tell(channel, times, clock)
                if plans:
                    clock.refresh()  # while the engine is awake
                times.clear()
            if plans:
                try:
                    ran = self.run(plans.popleft(), partial(self._tell_result, channel, waits=False))
                finally:
                    self._tell_result(channel)  # where it failed before that, or a GPU was not through with it
                self._untold = ran if ran.result is not None else None
                if not isinstance(ran.result, LateResult):
                    times.append(ran.times)
        self._tell_result(channel)

    def _patience_s(self) -> float | None:
        """How long there is nothing else to do than to hear the next message."""
        result = None if self._untold is None else self._untold.result
        if result is None:
            return REPORT_S if self._times else None
        return LOOK_S if isinstance(result, LateResult) and not result.done() else 0.0

    def _tell_result(self, channel: RankChannel, *, waits: bool = True) -> None:
        """Of the last step. waits: for a GPU that is still at it."""
        if self._untold is None or self._untold.result is None:
            return
        times, result = self._untold.times, self._untold.result
        if isinstance(result, LateResult) and not waits and not result.done():
            return
        self._untold = None
        if isinstance(result, LateResult):
            result = result.read()
            for comm in self._comms:
                comm.check()
            # It began with the step before it done, and is done now, or was since a look that found it so.
            began_s = max(times.started_s, self._times[-1].ended_s if self._times else 0.0)
            self._times.append(times._replace(started_s=began_s, ended_s=time.perf_counter()))
        channel.send(result)

    def _tell(self, channel: RankChannel, times: list[StageStep], clock: ClockKeeper) -> None:
        """What was done lately: by the stage, as its first rank tells it, and by this rank's transfers."""
        rank, steps = self._spec.rank, tuple(times)
        if self._place.tensor_rank == 0:
            channel.send(StageReport(self._place.stage, steps, clock.reading()))
        taken = self.ledger.take(whole=self._spec.trace)
        if self._spec.layout.num_ranks > 1:
            known = (each for each in taken.late if each.group in self._groups)
            late = (each._replace(rank=self._groups[each.group][each.rank]) for each in known)
            others = tuple(each for each in late if each.rank != rank)
            channel.send(CommReport(rank, steps[-1].step, taken.totals, others))
        if self._spec.trace:
            seen = Seen() if self._profiler is None else self._profiler.take()
            told = taken.entries, clock.reading(), self._groups, taken.num_lost
            channel.send(TraceReport(rank, steps, *told, seen.operators, seen.torch))

    def ready(self) -> RankReady:
        return RankReady(
            rank=self._spec.rank,
            node=socket.gethostname(),
            pid=os.getpid(),
            startup_s=self.startup_s,
            weight_bytes=self._weight_bytes,
            bytes_read=self._bytes_read,
            kv_bytes=self._cache.num_bytes,
            num_pages=self._cache.num_pages,
            choices=self.choices,
            groups=self._groups,
            link_bytes_per_s=self._link_bytes_per_s(),
            cores=self._spec.cores,
            memory=self._memory.account(),
            ceilings=self._ceilings,
        )

    def _link_bytes_per_s(self) -> float:
        comm = self._spec.comm
        if self._spec.layout.num_ranks == 1:
            return 0.0
        return link_bytes_per_s(local_address(parse_rendezvous(comm.store).host, comm.interface)) or 0.0

    def close(self) -> None:
        """Releases the connections; the process's end releases the rest."""
        if self._graphs is not None:
            self._graphs.reset()  # NCCL waits for those that its transfers are in
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

    Reports `Progress`, then `RankReady`, then a `StepResult` a step (one rank of the last stage) and now and then
    a `StageReport` (the first rank of each stage) and a `CommReport` over the engine's channel, and a `TraceReport`
    where all is traced. A failure is reported there as `RankFailed` and raised. Blocks; the caller's process is the
    rank.
    """
    with RankChannel(spec.engine, spec.rank, spec.secret) as channel:
        try:
            rank = Rank(spec, channel.send)
            try:
                if threading.current_thread() is threading.main_thread():  # else this process is the caller's own
                    # What start-up made stays: a full collection that walks it stalled steps for 100 ms and more.
                    gc.collect()
                    gc.freeze()
                clock = ClockKeeper(channel.ask_time)
                channel.send(rank.ready())
                try:
                    rank.serve(channel, clock)
                finally:
                    clock.close()
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
