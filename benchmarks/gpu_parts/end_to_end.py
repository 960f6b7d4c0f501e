"""Steps of a decoder as a rank runs them, with random weights made on the device: decode and prefill.

    PYTHONPATH=src python -m benchmarks.gpu_parts.end_to_end --model 1b [--device cpu] [--json FILE]

Decode ways: `eager`, the rank's step runner; `graphs`, the same with the decoder's CUDA graphs; `captured`, one CUDA
graph of forward, logits and greedy draw made here: what the GPU alone takes of a step. A step's share is of the
measured copy bandwidth, with weights, keys and values read once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.gpu_parts.readings import Readings

from phalanx.comm import create_communicator
from phalanx.engine.kv_budget import page_size_on
from phalanx.engine.messages import Chunk, NewSequence, Sampling, StepPlan
from phalanx.engine.runner import Links, StepRunner
from phalanx.engine.sampler import Sampler
from phalanx.engine.tables import SlotTables
from phalanx.kernels import CudaGraphs, Graphs, argmax
from phalanx.kernels.ceilings import Ceilings, measure_ceilings
from phalanx.models.batch import KVCache
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.decoder import Decoder
from phalanx.models.params import kv_bytes_per_token, rank_params
from phalanx.parallel.layout import StageRequest, build_layout
from phalanx.parallel.shape import ModelShape


class Load(NamedTuple):
    """batches: sequences of decode steps, each at `context` tokens when they begin. prompts: lengths to prefill. steps:
    that are timed, after `warm` others.
    """

    batches: tuple[int, ...] = (1, 8, 64)
    context: int = 1024
    prompts: tuple[int, ...] = (512, 2048, 8192)
    steps: int = 32
    warm: int = 6

    @property
    def longest(self) -> int:
        return max(self.context + 2 * (self.steps + self.warm), *self.prompts)


class Model(NamedTuple):
    shape: ModelShape
    tied: bool
    load: Load = Load()


MODELS = {
    "1b": Model(ModelShape(2048, 16, 32, 8, 64, 8192, 128256), tied=True),
    "8b": Model(ModelShape(4096, 32, 32, 8, 128, 14336, 128256), tied=False),
    "tiny": Model(ModelShape(64, 2, 4, 2, 16, 96, 200), tied=True, load=Load((1, 3), 20, (24,), steps=3, warm=1)),
}


class Machine:
    """One rank with the whole of a model: its decoder, a KV cache of random numbers, and what is measured on them."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.load, self.device, self.dtype = model, model.load, device, dtype
        self.page_size = page_size_on(device.type)
        self.config = DecoderConfig(
            "llama", model.shape, self.load.longest, 1e-5, RopeConfig(500000.0), tie_embeddings=model.tied
        )
        layout = build_layout(model.shape, [StageRequest(1)])
        [place], [self.stage] = layout.places(), layout.stages
        params = rank_params(self.config, layout, place)
        self.weights = {param.name: self._random(param.shape) for param in params}
        self.comm = create_communicator("auto", rank=0, size=1, device=device.type)
        self.kv_bytes = kv_bytes_per_token(self.config, layout, place, dtype.itemsize)
        # An embedding that is no head is not read but for a row a token.
        self.read_bytes = sum(weight.nbytes for name, weight in self.weights.items() if model.tied or name != "embed")
        num_pages = max(
            max(self.load.batches) * self._pages_each(self.load.context + self.load.steps + self.load.warm),
            self._pages_each(max(self.load.prompts)),
        )
        shape = model.shape
        self.cache = KVCache(
            shape.num_layers, num_pages, self.page_size, shape.num_kv_heads, shape.head_dim, dtype, device
        )
        for half in (self.cache.keys, self.cache.values):
            half.normal_()

    def _random(self, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=shape[-1] ** -0.5)

    def _pages_each(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def decoder(self, graphs: Graphs | None = None) -> Decoder:
        return Decoder(self.config, self.stage, 0, self.comm, self.weights, graphs=graphs)

    def tables(self) -> SlotTables:
        return SlotTables(max(self.load.batches), self.load.longest, self.page_size, None, self.device)

    def runner(self, decoder: Decoder, tables: SlotTables | None = None) -> StepRunner:
        return StepRunner(
            decoder,
            self.cache,
            self.tables() if tables is None else tables,
            Sampler(self.stage.vocab, self.comm),
            Links(),
            hidden_size=self.model.shape.hidden_size,
            dtype=self.dtype,
            device=self.device,
            reports=True,
        )

    def begin(self, batch: int) -> StepPlan:
        """Sequences whose tokens but the last are taken to be in the cache, so that nothing has to be prefilled."""
        each = self._pages_each(self.load.context + self.load.steps + self.load.warm)
        new = tuple(
            NewSequence(slot, tuple(range(slot * each, (slot + 1) * each)), Sampling()) for slot in range(batch)
        )
        last = self.load.context - 2  # the step itself adds one token, and its draw is the next step's
        return StepPlan(0, new=new, chunks=tuple(Chunk(slot, last, (slot + 1,), sample=True) for slot in range(batch)))

    def decode(self, batch: int, graphs: Graphs | None, copy_bytes_per_s: float) -> dict[str, Any]:
        """Steps of the runner one after another, each with its tokens brought to the host, as a rank alone does."""
        decoder = self.decoder(graphs)
        runner = self.runner(decoder)
        runner.run(self.begin(batch))
        taken_s: list[float] = []
        for step in range(1, self.load.warm + self.load.steps + 1):
            began_s = time.perf_counter()
            runner.run(StepPlan(step, decodes=tuple(range(batch))))
            taken_s.append(time.perf_counter() - began_s)
        decoder.forget_steps()  # before others are captured
        mean_length = self.load.context - 1 + self.load.warm + (self.load.steps + 1) // 2
        return self._share(batch, mean_length, statistics.median(taken_s[self.load.warm :]), copy_bytes_per_s)

    def fixed_step(self, batch: int) -> Callable[[], torch.Tensor]:
        """The first decode step of so many sequences, to be done again and again with a plan that stays where it is;
        gives the tokens drawn.
        """
        decoder, tables = self.decoder(), self.tables()
        self.runner(decoder, tables).run(self.begin(batch))
        plan = StepPlan(1, decodes=tuple(range(batch)))
        part = tables.batch(plan)
        tokens = tables.tokens(plan)
        return lambda: argmax(decoder.logits(decoder(tokens, part, self.cache), part.last_rows))

    def captured(self, batch: int, copy_bytes_per_s: float) -> dict[str, Any]:
        step = self.fixed_step(batch)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        taken_s = []
        for _ in range(self.load.warm + self.load.steps):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken_s.append(1e-3 * float(start.elapsed_time(end)))
        step_s = statistics.median(taken_s[self.load.warm :])
        return self._share(batch, self.load.context, step_s, copy_bytes_per_s)

    def _share(self, batch: int, length: int, step_s: float, copy_bytes_per_s: float) -> dict[str, Any]:
        num_bytes = self.read_bytes + batch * length * self.kv_bytes
        return {
            "step_us": 1e6 * step_s,
            "tokens_per_s": batch / step_s,
            "bytes": num_bytes,
            "share_of_copy": num_bytes / step_s / copy_bytes_per_s,
        }

    def prefill(self, num_tokens: int, ceilings: Ceilings) -> dict[str, Any]:
        """One prompt in one step, to its first token."""
        shape, runner = self.model.shape, self.runner(self.decoder())
        pages = tuple(range(self._pages_each(num_tokens)))
        tokens = tuple(number % shape.vocab_size for number in range(num_tokens))
        taken_s = []
        for step in range(5):
            plan = StepPlan(step, new=(NewSequence(0, pages, Sampling()),), chunks=(Chunk(0, 0, tokens, sample=True),))
            began_s = time.perf_counter()
            runner.run(plan)
            taken_s.append(time.perf_counter() - began_s)
        step_s = statistics.median(taken_s[2:])
        attended = 2.0 * num_tokens**2 * shape.num_query_heads * shape.head_dim  # two products over half of the pairs
        flops = shape.num_layers * (2.0 * num_tokens * shape.layer_params + attended) + 2.0 * shape.head_params
        return {
            "step_us": 1e6 * step_s,
            "tokens_per_s": num_tokens / step_s,
            "flops": flops,
            "share_of_products": flops / step_s / ceilings.flops_per_s,
        }


@torch.inference_mode()
def measure(readings: Readings, name: str, device: torch.device, dtype: torch.dtype) -> None:
    model, on_gpu = MODELS[name], device.type == "cuda"
    ceilings = measure_ceilings(device, dtype)
    copies = ceilings.bytes_per_s
    readings.put("ceilings", ceilings._asdict())
    torch.manual_seed(0)
    machine = Machine(model, device, dtype)
    readings.put("weight_bytes", sum(weight.nbytes for weight in machine.weights.values()))
    for batch in model.load.batches:
        at: dict[str, Any] = {"model": name, "batch": batch, "context": model.load.context}
        if on_gpu:
            readings.take("decode", {**at, "way": "captured"}, partial(machine.captured, batch, copies))
            readings.take("decode", {**at, "way": "graphs"}, partial(machine.decode, batch, CudaGraphs(), copies))
        readings.take("decode", {**at, "way": "eager"}, partial(machine.decode, batch, None, copies))
    for num_tokens in model.load.prompts:
        at = {"model": name, "prompt": num_tokens}
        readings.take("prefill", at, partial(machine.prefill, num_tokens, ceilings))
    if on_gpu:
        readings.put("peak_bytes", torch.cuda.max_memory_allocated())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no reading is begun")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    measure(Readings(arguments.json, arguments.seconds), arguments.model, device, dtype)


if __name__ == "__main__":
    main()
