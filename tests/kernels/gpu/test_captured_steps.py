"""Steps of one token a sequence, captured: on a GPU in CUDA graphs, else by remembering what is to be called again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch

from phalanx.comm.group import GroupSpec
from phalanx.comm.single import SingleCommunicator
from phalanx.engine.messages import Chunk, NewSequence, Sampling, StepPlan
from phalanx.engine.tables import SlotTables
from phalanx.kernels import CudaGraphs, Graph, Graphs, argmax
from phalanx.models.batch import KVCache
from phalanx.models.captured import choose_graphs, num_places_for
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.decoder import Decoder
from phalanx.models.params import rank_params
from phalanx.parallel.layout import StageRequest, build_layout
from phalanx.parallel.shape import ModelShape

SHAPE = ModelShape(64, 2, 4, 2, 32, 96, 120)
MIXTURE = ModelShape(64, 2, 4, 2, 32, 24, 120, num_experts=5, experts_per_token=2)
PAGE_SIZE = 4
WINDOW = 10
MAX_SEQUENCES = 5


class Remembered(NamedTuple):
    replay: Callable[[], None]


class RememberedGraphs:
    """`Graphs` of any device."""

    def __init__(self) -> None:
        self.num_captured = 0

    def capture(self, run: Callable[[], None]) -> Graph:
        self.num_captured += 1
        return Remembered(run)

    def reset(self) -> None:
        pass


class CountedCudaGraphs(CudaGraphs):
    num_captured = 0

    def capture(self, run: Callable[[], None]) -> Graph:
        self.num_captured += 1
        return super().capture(run)


def new(slot: int, *pages: int) -> NewSequence:
    return NewSequence(slot, pages, Sampling())


def prompt(slot: int, *tokens: int) -> Chunk:
    return Chunk(slot, 0, tokens, True)


# Nobody is given page 0, where what is missing would be written.
PLANS = (
    StepPlan(0, new=(new(0, 5),), chunks=(prompt(0, 7, 8, 9),)),
    StepPlan(1, decodes=(0,)),
    StepPlan(2, decodes=(0,), pages=((0, 9),)),
    StepPlan(3, decodes=(0,)),
    StepPlan(4, new=(new(3, 2, 4), new(1, 8)), decodes=(0,), chunks=(prompt(3, *range(20, 27)), prompt(1, 50))),
    StepPlan(5, decodes=(3, 0, 1)),
    StepPlan(6, decodes=(0, 1, 3), pages=((3, 7), (0, 1))),
    StepPlan(7, decodes=(1, 3), pages=((1, 3),)),
    StepPlan(8, decodes=(3, 1)),
    StepPlan(
        9,
        new=(new(0, 6, 5), new(2, 1), new(4, 9)),
        decodes=(1, 3),
        chunks=(prompt(0, 1), prompt(2, 2), prompt(4, 3)),
    ),
    StepPlan(10, decodes=(0, 1, 2, 3, 4), pages=((3, 10),)),
    StepPlan(11, decodes=(4, 3, 2, 1, 0)),
    StepPlan(12, decodes=(2, 4, 3)),
)


class Ran(NamedTuple):
    """logits, tokens: of each step. caches: of each stage."""

    logits: list[torch.Tensor]
    tokens: list[list[int]]
    caches: list[KVCache]


@pytest.fixture(autouse=True)
def _few_programs(_runs_kernels: None) -> Iterator[None]:
    """To be interpreted: as many as fill a small GPU. Those that a longer sequence would need return at once."""
    from phalanx.kernels.gpu.target import Target, assumed

    with assumed(Target(arch=90, num_sms=3)):
        yield


def run(
    plans: Sequence[StepPlan], device: torch.device, graphs: Sequence[Graphs | None], shape: ModelShape = SHAPE
) -> Ran:
    """Steps of a model whose every token is the likeliest one. graphs: of each stage."""
    config = DecoderConfig("qwen3", shape, 64, 1e-5, RopeConfig(), qk_norm=True, sliding_window=WINDOW)
    layout = build_layout(shape, [StageRequest(1) for _ in graphs])
    torch.manual_seed(0)
    decoders, caches = [], []
    for place, stage, each in zip(layout.places(), layout.stages, graphs, strict=True):
        weights = {
            param.name: (torch.randn(param.shape) / param.shape[-1] ** 0.5).to(device)
            for param in rank_params(config, layout, place)
        }
        decoders.append(Decoder(config, stage, 0, SingleCommunicator(GroupSpec(0, 1)), weights, graphs=each))
        cache = KVCache(stage.layers.size, 11, PAGE_SIZE, stage.kv_heads[0].size, 32, torch.float32, device)
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        caches.append(cache)
    tables = SlotTables(MAX_SEQUENCES, 64, PAGE_SIZE, WINDOW, device)
    ran = Ran([], [], caches)
    with torch.inference_mode():
        for plan in plans:
            tables.apply(plan)
            batch = tables.batch(plan)
            x = tables.tokens(plan)
            for decoder, cache in zip(decoders, caches, strict=True):
                x = decoder(x, batch, cache)
            logits = decoders[-1].logits(x, batch.last_rows)
            drawn = argmax(logits)
            tables.note(plan.drawn_slots, drawn)
            ran.logits.append(logits.cpu().clone())
            ran.tokens.append(drawn.tolist())
    return ran


@pytest.mark.filterwarnings("ignore:overflow encountered")  # at places without a token, which hold anything
def test_captured_steps_compute_what_others_do(device: torch.device) -> None:
    graphs = [CountedCudaGraphs() if device.type == "cuda" else RememberedGraphs() for _ in range(2)]
    captured = run(PLANS, device, graphs)
    expected = run(PLANS, device, [None, None])
    assert captured.tokens == expected.tokens
    torch.testing.assert_close(captured.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for cache, other in zip(captured.caches, expected.caches, strict=True):
        assert cache.keys[:, 0].isnan().all()
        torch.testing.assert_close(cache.keys, other.keys, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(cache.values, other.values, rtol=1e-4, atol=1e-4, equal_nan=True)
    # Of 1 place, 2, 4 (with 3 sequences) and 5, of each of which there is a second step.
    assert [each.num_captured for each in graphs] == [4, 4]
    for each in graphs:
        each.reset()


@pytest.mark.filterwarnings("ignore")  # at places without a token, which hold anything
def test_a_mixture_of_experts_is_captured_whatever_its_routing(device: torch.device) -> None:
    """Of more sequences the second step replays what the first has captured, with other experts."""
    graphs = CountedCudaGraphs() if device.type == "cuda" else RememberedGraphs()
    captured = run(PLANS[:7], device, [graphs], MIXTURE)
    expected = run(PLANS[:7], device, [None], MIXTURE)
    assert captured.tokens == expected.tokens
    torch.testing.assert_close(captured.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert graphs.num_captured == 2
    graphs.reset()


def test_graphs_are_of_few_sizes() -> None:
    assert [num_places_for(num, 20) for num in range(1, 21)] == [1, 2, 4, 4, *[8] * 4, *[16] * 8, *[20] * 4]


def test_a_choice_against_graphs_says_why() -> None:
    class Uncapturable(SingleCommunicator):
        backend = "staged"
        capturable = False

    comm, uncapturable = SingleCommunicator(GroupSpec(0, 1)), Uncapturable(GroupSpec(0, 1))
    assert choose_graphs(comm, 64, wanted=True).graphs is not None
    assert "for 1, 2, 4, 8 and, in steps of 8, up to 64 sequences" in choose_graphs(comm, 64, wanted=True).told
    assert "for 1, 2, 3 sequences" in choose_graphs(comm, 3, wanted=True).told
    for choice, why in (
        (choose_graphs(comm, 64, wanted=False), "engine.cuda_graphs is false"),
        (choose_graphs(uncapturable, 64, wanted=True), "transfers by staged cannot be captured"),
    ):
        assert choice.graphs is None
        assert why in choice.told
