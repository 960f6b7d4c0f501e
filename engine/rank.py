"""One rank: what it is made of, how that is made and warmed up, and one step of it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from phalanx.comm.gpu import CudaGpu
from phalanx.comm.ledger import Ledger
from phalanx.comm.work import GroupBrokenError
from phalanx.engine.booked_graphs import BookedGraphs
from phalanx.engine.clock import ClockReading
from phalanx.engine.device_memory import memory_meter
from phalanx.engine.host_memory import give_back
from phalanx.engine.kv_budget import num_pages_for
from phalanx.engine.memory_book import ACTIVATIONS, COMMUNICATORS, PAGES, WEIGHTS, WORKSPACES, MemoryBook, Sizes
from phalanx.engine.messages import (
    CommReport,
    KVMeasure,
    Progress,
    RankReady,
    RankSpec,
    StageReport,
    StageStep,
    StepPlan,
    ToEngine,
    TraceReport,
)
from phalanx.engine.rank_groups import RankGroups
from phalanx.engine.runner import Ran, StepRunner
from phalanx.engine.sampler import Sampler
from phalanx.engine.step_profiler import Seen, StepProfiler
from phalanx.engine.tables import SlotTables
from phalanx.engine.trial import WARMUP, try_largest_steps
from phalanx.kernels import (
    Graphs,
    choose_packing,
    compiled_names,
    told_of_kv,
    told_of_quantised,
    told_on_gpu,
    use_compiler,
)
from phalanx.kernels.ceilings import Ceilings, measure_ceilings
from phalanx.kernels.triton_gpu import find_triton
from phalanx.models.batch import KVCache
from phalanx.models.captured import choose_graphs
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.decoder import Decoder
from phalanx.models.params import kv_bytes_per_token, rank_params
from phalanx.models.quantization import held_bytes, multiplies_integers, scheme_of
from phalanx.models.weights import load_params
from phalanx.native import resize_pool
from phalanx.parallel.overlap import Overlap


class Rank:
    """The running parts of one rank. Making one is the whole start: rendezvous, weights, KV cache, warm-up.

    groups: that it is in. ledger: of all transfers of this rank, whichever group they are in. runner: of its steps.
    most_plans: how many steps it is to know of at a time: the next one and, where transfers go behind compute, the one
    after it. startup_s: seconds that the parts of the start took. choices: what was chosen, and why.
    """

    def __init__(self, spec: RankSpec, report: Callable[[Progress], None], imports_s: float = 0.0) -> None:
        """report: is told how far the start has come. imports_s: what importing took before it."""
        self._spec = spec
        self._report = report
        self._since = time.perf_counter()
        self.startup_s = {"imports": imports_s}
        self.most_plans = 1 if spec.comm.overlap == "none" else 2
        self._device = torch.device(spec.device)
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._place = list(spec.layout.places(spec.replica))[spec.rank]
        self._stage = spec.layout.stages[self._place.stage]
        torch.set_num_threads(spec.num_threads)
        resize_pool(spec.num_threads)
        self._profiler: StepProfiler | None = None
        self._graphs: Graphs | None = None
        self._ceilings: Ceilings | None = None
        self.ledger = Ledger()
        self._params = rank_params(spec.config, spec.layout, self._place)
        self._memory = MemoryBook(memory_meter(self._device), self._sizes())
        self._progress("rendezvous", 0, 1)
        with self._memory.during("the making of communicators", COMMUNICATORS):
            self.groups = RankGroups(spec, self._place, self.ledger)
        self._took("rendezvous")
        self._comm, self.choices = self.groups.stage, self.groups.choices
        try:
            self._memory.book(COMMUNICATORS, COMMUNICATORS)
            with self._memory.during("the loading of weights", WEIGHTS):
                self._load()
            self._memory.book(WEIGHTS, WORKSPACES)
            self._make_runner(spec.num_pages or -(-self._widest_step // spec.page_size))
            self._warm_up()
        except BaseException:
            self.close()
            raise

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
            told = told_of_quantised(self._dtype, integer_inputs=multiplies_integers(spec.quantization))
            self.choices["cpu products"] = packing.told if spec.quantization == "none" else told
        else:
            self.choices["gpu kernels"] = find_triton().told
            graphs, told = choose_graphs(self._comm, spec.max_sequences, wanted=spec.cuda_graphs)
            self._graphs = None if graphs is None else BookedGraphs(graphs, self._memory)
            self.choices["decode steps"] = told
        if spec.kv_cache_dtype != "auto":
            self.choices["KV pages"] = told_of_kv(spec.kv_cache_dtype, self._device)
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
        if self._device.type != "cpu" and spec.quantization != "none":
            self.choices["gpu products"] = told_on_gpu(weights.values())
        self._weight_bytes = sum(weight.nbytes for weight in weights.values())
        self._bytes_read = checkpoint.bytes_read
        self._overlap = Overlap(spec.comm.overlap)
        part = self._place.tensor_rank
        self._decoder = Decoder(
            spec.config,
            self._stage,
            part,
            self._comm,
            weights,
            self._overlap,
            self._graphs,
            self.groups.links.head_asker,
        )
        if self.groups.links.head_helper is not None and self._decoder.head is not None:
            self.groups.links.head_helper.start(self._decoder.head, self._decoder.head_rows.start)
        if spec.profile is not None:
            self._profiler = StepProfiler(spec.profile, weights, self._device)
        self._took("weights")

    def _sizes(self) -> Sizes:
        spec, measure = self._spec, self._spec.measure
        return Sizes(
            num_ranks=self._stage.num_ranks,
            weight_bytes=sum(
                held_bytes(scheme_of(spec.quantization, param, spec.entries), param, self._dtype.itemsize)
                for param in self._params
            ),
            step_tokens=self._widest_step,
            step_rows=self._most_drawn,
            page_size=spec.page_size,
            page_bytes=spec.page_size * self._token_bytes(spec.kv_cache_dtype),
            least_pages=1 if measure is None else measure.least_pages,
            share=None if measure is None else measure.share,
            narrow_page_bytes=spec.page_size * self._token_bytes("int8") if spec.kv_cache_dtype == "auto" else 0,
        )

    def _token_bytes(self, kv_cache_dtype: str) -> int:
        """Of its keys and values in all layers."""
        spec = self._spec
        return kv_bytes_per_token(spec.config, spec.layout, self._place, self._dtype.itemsize, kv_cache_dtype)

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
                spec.kv_cache_dtype,
            )
        self.runner = StepRunner(
            self._decoder,
            self._cache,
            SlotTables(spec.max_sequences, spec.max_length, spec.page_size, spec.config.sliding_window, self._device),
            Sampler(stage.vocab, self._comm) if stage.last else None,
            self.groups.links,
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
                self.runner.run(plan)
            self._progress("warmup", done, len(WARMUP))
        self._measure_overlap()
        if self._memory.by_part or measure is not None:
            self._decoder.forget_steps()
            self._memory.book(WORKSPACES, WORKSPACES)
            try_largest_steps(
                self.runner.run,
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
            self.groups.everyone.barrier()  # all at once, as in a step
            self._ceilings = measure_ceilings(self._device, self._dtype)
            give_back()
        self._overlap.follow(self._comm)
        self._took("warmup")

    def _compile(self) -> None:
        """What torch.compile is to take, by the first steps that call it."""
        use_compiler(self._device, self._spec.torch_compile)
        if not self._spec.torch_compile:
            return
        self._progress("compile", 0, 1)
        for plan in WARMUP:
            self.runner.run(plan)
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
        everyone = self.groups.everyone
        bytes_per_page = self._cache.num_bytes // self._cache.num_pages
        del self.runner, self._cache  # the next ones take their place
        self._memory.book(PAGES, WORKSPACES)
        self._memory.give_back()
        everyone.barrier()
        part = measure.device_part if self._memory.by_part else 1 / (self.groups.num_here() * measure.copies)
        room_bytes = self._memory.room_bytes(part)
        everyone.barrier()  # nobody takes its pages before all have looked
        found = num_pages_for(
            room_bytes,
            measure.share,
            bytes_per_page,
            measure.limit_pages,
            least_pages=measure.least_pages,
            fitting=self._memory.too_few_pages(room_bytes),
        )
        fewest = everyone.all_reduce(torch.tensor([-found], dtype=torch.int64, device=self._device), op="max")
        return -int(fewest)

    def run(self, plan: StepPlan, on_start: Callable[[], None] | None = None) -> Ran:
        """on_start: see `StepRunner.run`."""
        self.ledger.begin_step(plan.step)
        profiling = nullcontext() if self._profiler is None else self._profiler.step(plan)
        with profiling, self._memory.during(f"step {plan.step}", ACTIVATIONS):
            try:
                ran = self.runner.run(plan, on_start)
            except GroupBrokenError:
                self._check_helper()  # what failed behind this thread may be the cause
                raise
        for comm in self.groups.comms:
            comm.check()  # a GPU runs on where a transfer has failed: its results are none then
        return ran

    def reports(self, steps: tuple[StageStep, ...], clock: ClockReading) -> Iterator[ToEngine]:
        """What was done lately: by the stage, as its first rank tells it, and by this rank's transfers.

        steps: those that are done since the last reports, at least one. clock: this rank's against the engine's.
        """
        rank, members = self._spec.rank, self.groups.members
        if self._place.tensor_rank == 0:
            yield StageReport(self._place.stage, steps, clock)
        taken = self.ledger.take(whole=self._spec.trace)
        if self._spec.layout.num_ranks > 1:
            known = (each for each in taken.late if each.group in members)
            late = (each._replace(rank=members[each.group][each.rank]) for each in known)
            others = tuple(each for each in late if each.rank != rank)
            tells = self._overlap.has_moved and self._place.tensor_rank == 0
            overlap = self._overlap.told(self._spec.max_batch_tokens) if tells else ""
            yield CommReport(rank, steps[-1].step, taken.totals, others, overlap)
        if self._spec.trace:
            seen = Seen() if self._profiler is None else self._profiler.take()
            yield TraceReport(rank, steps, taken.entries, clock, members, taken.num_lost, seen.operators, seen.torch)

    def _check_helper(self) -> None:
        if self.groups.links.head_helper is not None:
            self.groups.links.head_helper.check()

    def finish(self) -> None:
        """Returns when what other stages need of this rank for steps that were run is done."""
        if self.groups.links.head_helper is not None:
            self.groups.links.head_helper.finish()

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
            groups=self.groups.members,
            link_bytes_per_s=self.groups.link_bytes_per_s(),
            cores=self._spec.cores,
            memory=self._memory.account(),
            ceilings=self._ceilings,
        )

    def close(self) -> None:
        """Releases the connections; the process's end releases the rest."""
        if self._graphs is not None:
            self._graphs.reset()  # NCCL waits for those that its transfers are in
        self.groups.close()

    def _progress(self, part: str, done: int, total: int) -> None:
        self._report(Progress(self._spec.rank, part, done, total))

    def _took(self, part: str) -> None:
        now = time.perf_counter()
        self.startup_s[part] = now - self._since
        self._since = now
