"""Quantised matrices as ranks load them: the same whole, however it is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phalanx.kernels import PackedExperts, QuantisedWeight, choose_packing, quantise
from phalanx.kernels.quantised_weight import dequantise
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.families import expected_tensors
from phalanx.models.params import Param, rank_params
from phalanx.models.quantised_slice import weight_format
from phalanx.models.quantization import INT4, INT8, scheme_of
from phalanx.models.resolve import ModelSource
from phalanx.models.safetensors_index import safetensors_entries
from phalanx.models.weights import load_params
from phalanx.parallel.layout import Layout, StageRequest, build_layout
from phalanx.parallel.shape import ModelShape

CPU = torch.device("cpu")
SHAPE = ModelShape(
    hidden_size=72, num_layers=2, num_query_heads=6, num_kv_heads=3, head_dim=24, ffn_size=112, vocab_size=90
)
CONFIG = DecoderConfig("llama", SHAPE, 64, 1e-5, RopeConfig(), tie_embeddings=True)
LAYOUTS = {
    "tensor 2": [StageRequest(2)],
    "tensor 3": [StageRequest(3)],
    "weights 2:1 and 1": [StageRequest(2, weights=(2.0, 1.0)), StageRequest(1)],
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_tensors(CONFIG).items()}


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("plain")
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(safetensors_entries(folder, CONFIG))


def load(
    checkpoint: Checkpoint, layout: Layout, quantization: str, config: DecoderConfig = CONFIG
) -> list[tuple[list[Param], dict[str, object]]]:
    """Of each rank."""
    return [
        (params, load_params(params, checkpoint, torch.float32, CPU, quantization=quantization))
        for params in (rank_params(config, layout, place) for place in layout.places())
    ]


def standing_for(weight: object) -> torch.Tensor:
    assert isinstance(weight, QuantisedWeight)
    return weight[torch.arange(weight.shape[0])]


@pytest.mark.parametrize("requests", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_rank_holds_its_part_of_what_the_whole_matrix_is_quantised_to(
    checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], requests: list[StageRequest], quantization: str
) -> None:
    """Cuts fall into groups of 32: heads of 24, and 112 columns over three ranks."""
    compared = 0
    for params, loaded in load(checkpoint, build_layout(SHAPE, requests), quantization):
        for param in params:
            scheme = scheme_of(quantization, param, {})
            if scheme is None:
                continue
            held = weight_format(scheme)
            rows = []
            for piece in param.slices:
                whole = dequantise(quantise(tensors[piece.tensor], held), held)
                part = piece.rows.slice if piece.rows else slice(None)
                columns = piece.columns.slice if piece.columns else slice(None)
                rows.append(whole[part, columns])
            assert torch.equal(standing_for(loaded[param.name]), torch.cat(rows)), param.name
            compared += 1
    assert compared >= 2 * 4 + 1


def test_head_and_tied_embedding_have_eight_bits_and_layers_four(checkpoint: Checkpoint) -> None:
    layout = build_layout(SHAPE, [StageRequest(1), StageRequest(1)])
    (_, first), (_, last) = load(checkpoint, layout, "int4")
    for weight in (first["embed"], last["head"]):
        assert isinstance(weight, QuantisedWeight)
        assert weight.format == weight_format(INT8)
    assert torch.equal(standing_for(first["embed"]), standing_for(last["head"]))
    down = last["layers.1.down"]
    assert isinstance(down, QuantisedWeight)
    assert down.format == weight_format(INT4)
    assert not isinstance(first["layers.0.ffn_norm"], QuantisedWeight)


def test_a_cut_may_leave_no_eight_inputs_together(tensors: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Heads of 12, each on a rank of its own."""
    shape = replace(SHAPE, head_dim=12, num_query_heads=12, num_kv_heads=6)
    name = "model.layers.0.self_attn.o_proj.weight"
    held = weight_format(INT4)
    whole = dequantise(quantise(tensors[name], held), held)
    ranks = load(checkpoint, build_layout(shape, [StageRequest(12)]), "int4", replace(CONFIG, shape=shape))
    parts = [standing_for(loaded["layers.0.o"]) for _, loaded in ranks]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_experts_are_quantised_and_their_router_is_not(tmp_path: Path) -> None:
    shape = replace(SHAPE, num_experts=3, experts_per_token=2)
    config = replace(CONFIG, shape=shape)
    tensors = {name: torch.randn(size) for name, size in expected_tensors(config).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    layout = build_layout(shape, [StageRequest(2)])
    with Checkpoint(safetensors_entries(tmp_path, config)) as checkpoint:
        for _, loaded in load(checkpoint, layout, "int8", config):
            assert isinstance(loaded["layers.0.router"], torch.Tensor)
            experts = loaded["layers.0.down"]
            assert isinstance(experts, PackedExperts)
            assert [isinstance(each, QuantisedWeight) for each in experts] == [True] * 3


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_blocks_of_a_file_stand_for_what_they_are_read_as(smollm2: ModelSource, num_ranks: int) -> None:
    """One layer and the head of the built-in model, in Q4_1 and Q8_0, heads in the order of GGUF's Llama."""
    config = replace(smollm2.config, shape=replace(smollm2.config.shape, num_layers=1))
    layout = build_layout(config.shape, [StageRequest(num_ranks)])
    place = list(layout.places())[-1]
    params = rank_params(config, layout, place)
    native = choose_packing(torch.bfloat16, CPU).usable
    with Checkpoint(smollm2.entries()) as checkpoint:
        plain = load_params(params, checkpoint, torch.float32, CPU)
        for dtype in (torch.float32, torch.bfloat16) if native else (torch.float32,):
            stored = load_params(params, checkpoint, dtype, CPU, quantization="stored")
            for param in params:
                if param.multiplied:
                    assert torch.equal(standing_for(stored[param.name]), plain[param.name].to(dtype)), param.name
                else:
                    assert torch.equal(stored[param.name], plain[param.name].to(dtype)), param.name
