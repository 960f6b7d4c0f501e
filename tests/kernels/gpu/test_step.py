"""Steps of a decoder as a rank runs them, with plans that its tables make: in Triton, and in PyTorch alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from phalanx.comm.group import GroupSpec
from phalanx.comm.single import SingleCommunicator
from phalanx.engine.messages import Chunk, NewSequence, Sampling, StepPlan
from phalanx.engine.tables import SlotTables
from phalanx.kernels import DevicePlan
from phalanx.models.batch import KVCache
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.decoder import Decoder
from phalanx.models.params import rank_params
from phalanx.parallel.layout import StageRequest, build_layout
from phalanx.parallel.shape import ModelShape

SHAPE = ModelShape(96, 2, 9, 3, 64, 128, 200)  # of two ranks, the first has 5 query heads over 2 KV heads
PAGE_SIZE = 16


def new(slot: int, *pages: int) -> NewSequence:
    return NewSequence(slot, pages, Sampling())


STEPS = (
    StepPlan(0, new=(new(0, 5, 2), new(2, 7)), chunks=(Chunk(0, 0, (*range(30),), True), Chunk(2, 0, (9,), True))),
    StepPlan(1, new=(new(1, 1, 4),), decodes=(0, 2), chunks=(Chunk(1, 0, (*range(50, 68),), False),)),
    StepPlan(2, pages=((0, 3),), decodes=(2, 0)),
    StepPlan(3, decodes=(0,), chunks=(Chunk(1, 18, (3, 4, 5), True),)),
)


def run(plans: Sequence[StepPlan], device: torch.device, window: int | None, num_parts: int) -> list[torch.Tensor]:
    """Hidden states of each step of the first of two ranks, without what the other would add to them."""
    config = DecoderConfig("qwen3", SHAPE, 64, 1e-5, RopeConfig(), qk_norm=True, sliding_window=window)
    layout = build_layout(SHAPE, [StageRequest(2)])
    [place, _], [stage] = layout.places(), layout.stages
    torch.manual_seed(0)
    weights = {
        param.name: (torch.randn(param.shape) / param.shape[-1] ** 0.5).to(device)
        for param in rank_params(config, layout, place)
    }
    decoder = Decoder(config, stage, 0, SingleCommunicator(GroupSpec(0, 1)), weights)
    cache = KVCache(2, 8, PAGE_SIZE, stage.kv_heads[0].size, 64, torch.float32, device)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    tables = SlotTables(3, 64, PAGE_SIZE, window, device)
    found = []
    with torch.inference_mode():
        for plan in plans:
            tables.apply(plan)
            batch = tables.batch(plan, num_parts)
            found.append(decoder(tables.tokens(plan), batch, cache).cpu())
    kinds = {type(part.attention) for part in batch.parts}
    return [*found, torch.tensor(kinds == {DevicePlan})]


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("window", [None, 20])
def test_a_decoder_on_a_gpu_computes_what_one_on_a_cpu_does(
    window: int | None, num_parts: int, device: torch.device
) -> None:
    *actual, in_triton = run(STEPS, device, window, num_parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.kernels.triton_gpu.DEVICE_TYPE", "none")
        *expected, in_torch = run(STEPS, torch.device("cpu"), window, num_parts)
    assert in_triton
    assert not in_torch
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
