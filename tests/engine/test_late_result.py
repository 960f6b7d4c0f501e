"""Steps that a GPU runs behind the thread: nobody waits for it between them, and the tokens are the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from tests.comm.fake_gpu import FakeGpu
from tests.tiny_models import TINY_MODELS, make

from phalanx.comm.create import create_communicator
from phalanx.engine.late_result import LateResult
from phalanx.engine.messages import Chunk, NewSequence, Sampling, StepPlan, StepResult
from phalanx.engine.runner import Links, StepRunner
from phalanx.engine.sampler import Sampler
from phalanx.engine.tables import SlotTables
from phalanx.kernels import native_cpu
from phalanx.models.batch import KVCache
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.decoder import Decoder
from phalanx.models.params import rank_params
from phalanx.models.resolve import resolve_model
from phalanx.models.weights import load_params
from phalanx.parallel.layout import StageRequest, build_layout

SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.8, seed=5, logprobs=2),
    Sampling(repetition_penalty=1.3, num_prompt=3, history=(5, 6, 7), prompt_logprobs=1),
)
PLANS = (
    StepPlan(
        step=0,
        new=tuple(NewSequence(slot, (slot,), sampling) for slot, sampling in enumerate(SAMPLINGS)),
        chunks=tuple(Chunk(slot, 0, (5, 6, 7), sample=True) for slot in range(3)),
    ),
    StepPlan(step=1, decodes=(0, 1, 2)),
    StepPlan(step=2, decodes=(2, 0)),
)


def make_runner(folder: Path, gpu: FakeGpu | None) -> StepRunner:
    source = resolve_model(str(folder))
    config, cpu = source.config, torch.device("cpu")
    layout = build_layout(config.shape, [StageRequest()])
    place, stage = next(layout.places(0)), layout.stages[0]
    comm = create_communicator("single", rank=0, size=1, device="cpu")
    weights = load_params(rank_params(config, layout, place), Checkpoint(source.entries()), torch.float32, cpu)
    tables = SlotTables(4, 16, 16, None, cpu)
    if gpu is not None:
        tables._last = None  # drawn tokens stay where they are
    kv_heads, head_dim = stage.kv_heads[0].size, config.shape.head_dim
    return StepRunner(
        Decoder(config, stage, 0, comm, weights),
        KVCache(stage.layers.size, 4, 16, kv_heads, head_dim, torch.float32, cpu),
        tables,
        Sampler(stage.vocab, comm),
        Links(),
        hidden_size=config.shape.hidden_size,
        dtype=torch.float32,
        device=cpu,
        reports=True,
        gpu=gpu,
    )


@contextmanager
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What asks a GPU for a number, and so waits for it, is an error."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a number was asked for")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


def test_nothing_waits_for_a_gpu_between_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_cpu.LIBRARY is None:
        pytest.skip("needs the native library: without any operators but PyTorch's, `top` asks which rows have ties")
    folder = make(TINY_MODELS["smollm2"], tmp_path)
    plain = make_runner(folder, None)
    expected = [plain.run(plan).result for plan in PLANS]
    gpu, busy = FakeGpu(), threading.Event()
    runner = make_runner(folder, gpu)
    gpu.run(lambda: busy.wait(30))
    late = []
    with nobody_waits(monkeypatch):
        for plan in PLANS:
            result = runner.run(plan).result
            assert isinstance(result, LateResult)
            late.append(result)
        assert not any(result.done() for result in late)
    busy.set()
    found = [result.read() for result in late]
    assert all(result.done() for result in late)
    assert found == expected
    assert isinstance(found[0], StepResult)
    assert found[0].logprobs
    assert found[0].prompt_logprobs
