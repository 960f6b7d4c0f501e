"""Quantised weights as a rank on a GPU loads them, and steps of a decoder by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.kernels.gpu.poison import relative_error
from tests.kernels.gpu.test_step import PAGE_SIZE, new

from phalanx.comm.group import GroupSpec
from phalanx.comm.single import SingleCommunicator
from phalanx.engine.messages import Chunk, StepPlan
from phalanx.engine.tables import SlotTables
from phalanx.kernels import (
    Activations,
    PackedExperts,
    QuantisedActivations,
    QuantisedRows,
    QuantisedWeight,
    QuantisingNorm,
    WeightFormat,
    make_quantised,
    make_quantised_on,
    quantise,
    quantise_rows,
)
from phalanx.kernels.gpu.target import A100, assumed
from phalanx.models.batch import KVCache
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.decoder import Decoder
from phalanx.models.families import expected_tensors
from phalanx.models.params import rank_params
from phalanx.models.safetensors_index import safetensors_entries
from phalanx.models.weights import load_params
from phalanx.parallel.layout import Layout, StageRequest, build_layout
from phalanx.parallel.shape import ModelShape

STEPS = (
    StepPlan(0, new=(new(0, 5),), chunks=(Chunk(0, 0, (7, 3, 9, 100, 20), True),)),
    StepPlan(1, decodes=(0,)),
)
CPU = torch.device("cpu")
SHAPE = ModelShape(
    hidden_size=96, num_layers=2, num_query_heads=9, num_kv_heads=3, head_dim=16, ffn_size=176, vocab_size=120
)
CONFIG = DecoderConfig("llama", SHAPE, 96, 1e-5, RopeConfig(), tie_embeddings=True)
LAYOUTS = {"whole": [StageRequest(1)], "5 heads of 9, 88 columns": [StageRequest(2)]}
SCHEMES = {"int8": None, "int4": None, "w8a8": torch.int8, "fp8": torch.float8_e4m3fn}


def saved(config: DecoderConfig, folder: Path) -> Checkpoint:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) == 2 else torch.ones(shape)
        for name, shape in expected_tensors(config).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(safetensors_entries(folder, config))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved(CONFIG, tmp_path_factory.mktemp("plain"))


class Exact(QuantisedWeight):
    """What a weight stands for, multiplied in float64; by activations that are quantised as it takes them."""

    __slots__ = ("_takes", "_weight")

    def __init__(self, weight: QuantisedWeight) -> None:
        super().__init__(weight.shape[0], weight.shape[1], weight.format, torch.float32)
        self._takes = weight.takes
        self._weight = weight[torch.arange(weight.shape[0], device=weight.device)].double().cpu()

    @property
    def takes(self) -> torch.dtype | None:
        return self._takes

    def multiply(
        self, x: Activations, bias: torch.Tensor | None, instructions: int = 0, outputs: slice | None = None
    ) -> torch.Tensor:
        if self._takes is not None and isinstance(x, torch.Tensor):
            x = QuantisedActivations(*quantise_rows(x, self._takes))
        wide = x.q.double() * x.scales.double().unsqueeze(1) if isinstance(x, QuantisedActivations) else x.double()
        return (wide @ self._weight.T).float()

    def part(self, x: Activations) -> torch.Tensor:
        return self.multiply(x, None)

    def held_rows(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        return self._weight[rows - first].float()


def exact(held: object) -> object:
    if isinstance(held, PackedExperts):
        return PackedExperts(Exact(each) for each in held if isinstance(each, QuantisedWeight))
    if isinstance(held, QuantisedWeight):
        return Exact(held)
    assert isinstance(held, torch.Tensor)
    return held.cpu()


def loaded(
    checkpoint: Checkpoint,
    layout: Layout,
    rank: int,
    quantization: str,
    device: torch.device,
    config: DecoderConfig = CONFIG,
) -> dict[str, object]:
    params = rank_params(config, layout, list(layout.places())[rank])
    return load_params(params, checkpoint, torch.float32, device, quantization=quantization)


def logits_of(
    weights: dict[str, object], layout: Layout, device: torch.device, config: DecoderConfig = CONFIG
) -> tuple[Decoder, torch.Tensor]:
    """Of all tokens of a prompt, and of a decode."""
    [stage] = layout.stages
    decoder = Decoder(config, stage, 0, SingleCommunicator(GroupSpec(0, 1)), weights)
    cache = KVCache(2, 8, PAGE_SIZE, 3, 16, torch.float32, device)
    tables = SlotTables(3, 96, PAGE_SIZE, None, device)
    found = []
    with torch.inference_mode():
        for plan in STEPS:
            tables.apply(plan)
            hidden = decoder(tables.tokens(plan), tables.batch(plan, 1), cache)
            found.append(decoder.logits(hidden, None).cpu())
    return decoder, torch.cat(found)


@pytest.mark.parametrize("quantization", ["int4", "w8a8", "fp8"])
def test_a_quantised_decoder_on_a_gpu_computes_what_its_weights_stand_for(
    checkpoint: Checkpoint, device: torch.device, quantization: str
) -> None:
    layout = build_layout(SHAPE, LAYOUTS["whole"])
    weights = loaded(checkpoint, layout, 0, quantization, device)
    decoder, actual = logits_of(weights, layout, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.kernels.triton_gpu.DEVICE_TYPE", "none")
        _, expected = logits_of({name: exact(held) for name, held in weights.items()}, layout, CPU)
    takes = SCHEMES[quantization]
    assert {isinstance(layer.ffn_norm, QuantisingNorm) for layer in decoder.layers} == {takes is not None}
    # A last bit of a sum decides which way an activation is rounded to 8 bits.
    assert relative_error(actual, expected.double()) < (1e-5 if takes is None else 1e-2)


def test_a_gpu_without_units_for_fp8_takes_activations_as_they_are(
    checkpoint: Checkpoint, device: torch.device
) -> None:
    if device.type == "cuda":
        pytest.skip("needs no GPU")
    layout = build_layout(SHAPE, LAYOUTS["whole"])
    with assumed(A100):
        weights = loaded(checkpoint, layout, 0, "fp8", device)
        down = weights["layers.0.down"]
        assert isinstance(down, QuantisedWeight)
        x = torch.randn(3, down.shape[1])
        assert relative_error(down.multiply(x, None), Exact(down).multiply(x, None).double()) < 1e-5
    assert {held.takes for held in weights.values() if isinstance(held, QuantisedWeight)} == {None}


def test_a_quantised_mixture_of_experts(device: torch.device, tmp_path: Path) -> None:
    shape = replace(SHAPE, num_layers=1, num_experts=3, experts_per_token=2)
    config = replace(CONFIG, shape=shape)
    layout = build_layout(shape, LAYOUTS["whole"])
    with saved(config, tmp_path) as checkpoint:
        weights = loaded(checkpoint, layout, 0, "int4", device, config)
    _, actual = logits_of(weights, layout, device, config)
    assert isinstance(weights["layers.0.down"], PackedExperts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.kernels.triton_gpu.DEVICE_TYPE", "none")
        _, expected = logits_of({name: exact(held) for name, held in weights.items()}, layout, CPU, config)
    assert relative_error(actual, expected.double()) < 1e-5


@pytest.mark.parametrize("requests", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("quantization", SCHEMES)
def test_a_rank_on_a_gpu_holds_what_one_on_a_cpu_does(
    checkpoint: Checkpoint, device: torch.device, requests: list[StageRequest], quantization: str
) -> None:
    layout = build_layout(SHAPE, requests)
    for rank in range(layout.num_ranks):
        here = loaded(checkpoint, layout, rank, quantization, device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("phalanx.kernels.triton_gpu.DEVICE_TYPE", "none")
            there = loaded(checkpoint, layout, rank, quantization, CPU)
        for name, held in here.items():
            other = there[name]
            assert isinstance(held, QuantisedWeight) == isinstance(other, QuantisedWeight)
            if isinstance(held, QuantisedWeight) and isinstance(other, QuantisedWeight):
                every = torch.arange(held.shape[0], device=device)
                assert torch.equal(held[every].cpu(), other[every.cpu()]), name
                if name == "layers.1.o" and held.takes is None:
                    x = torch.randn(2, held.shape[1])
                    y = held.multiply(x.to(device), None).cpu()
                    assert relative_error(y, other.multiply(x, None).double()) < 1e-5, name


@pytest.mark.parametrize(
    "held",
    [
        WeightFormat(8),
        WeightFormat(8, 32, torch.float16),
        WeightFormat(4, 32, torch.float16, offsets=True),
        WeightFormat(4, 128, torch.float16),
        WeightFormat(8, e4m3=True),
    ],
)
def test_it_takes_the_bytes_of_its_numbers_and_gives_rows_of_a_vocabulary_shard(
    device: torch.device, held: WeightFormat
) -> None:
    rows = quantise(torch.randn(120, 576), held)
    [weight] = make_quantised_on(device, (120, 576), held, torch.float32, [None])
    [other] = make_quantised([(120, 576)], [held], torch.float32)
    for each in (weight, other):
        each.put(0, rows)
    assert weight.nbytes <= 1.02 * held.num_bytes(120, 576)
    tokens = torch.tensor([250, 3, 200, 199, 319, 320])
    assert torch.equal(weight.held_rows(tokens.to(device), 200).cpu(), other.held_rows(tokens, 200))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scattered", [False, True])
def test_zeros_and_inputs_in_any_order_multiply_as_what_they_stand_for(
    device: torch.device, bits: int, scattered: bool
) -> None:
    """As AWQ's and GPTQ's checkpoints have them, act-order and room between groups included."""
    held, num_outputs, num_inputs = WeightFormat(bits, 32, torch.float16, zeros=True), 40, 90
    generator = torch.Generator().manual_seed(bits)
    order = torch.randperm(96, generator=generator) if scattered else torch.arange(96)
    order = torch.where(order < num_inputs, order, -1)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    q = torch.randint(low, high, (num_outputs, 96), generator=generator, dtype=torch.int8)
    scales = torch.rand(num_outputs, 3, generator=generator).add(0.1).half()
    zeros = torch.randint(0, 2**bits, (num_outputs, 3), generator=generator, dtype=torch.uint8)
    group = torch.arange(96) // 32
    less = zeros.double() - (128 if bits == 8 else 0)
    exact = torch.zeros(num_outputs, num_inputs, dtype=torch.float64)
    exact[:, order[order >= 0]] = (scales.double()[:, group] * (q.double() - less[:, group]))[:, order >= 0]
    [weight] = make_quantised_on(device, (num_outputs, num_inputs), held, torch.float32, [order])
    weight.put(0, QuantisedRows(q, scales, None, zeros))
    x = torch.randn(5, num_inputs, generator=generator)
    assert relative_error(weight.multiply(x.to(device), None).cpu(), x.double() @ exact.T) < 1e-5
    taken = weight.held_rows(torch.tensor([7, 100, 139, 140]).to(device), 100).cpu().double()
    assert relative_error(taken[2], exact[39]) < 1e-6
    assert relative_error(taken[1], exact[0]) < 1e-6
    assert not taken[[0, 3]].any()


def test_what_a_weight_does_not_take_is_refused(device: torch.device) -> None:
    [weight] = make_quantised_on(device, (16, 64), WeightFormat(8), torch.float32, [None])
    x = QuantisedActivations(*quantise_rows(torch.randn(2, 64, device=device), torch.int8))
    with pytest.raises(ValueError, match=r"int8, for a weight \[16, 64\] that takes None"):
        weight.multiply(x, None)
