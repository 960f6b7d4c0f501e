"""Which slices of a checkpoint the ranks of a layout hold, and the reading of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from phalanx.errors import ModelError
from phalanx.kernels import KV_DTYPES, PackedWeight, choose_packing
from phalanx.models.batch import KVCache
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.families import expected_tensors
from phalanx.models.params import kv_bytes_per_token, rank_params
from phalanx.models.resolve import ModelSource
from phalanx.models.safetensors_index import safetensors_entries
from phalanx.models.weights import load_params
from phalanx.parallel.layout import Layout, RankPlace, StageRequest, build_layout
from phalanx.parallel.shape import ModelShape

CPU = torch.device("cpu")
PACKING = choose_packing(torch.bfloat16, CPU)


class Loaded(NamedTuple):
    """What one rank read of a checkpoint."""

    place: RankPlace
    params: dict[str, torch.Tensor]
    num_elements: int
    bytes_read: int


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = ModelShape(
        hidden_size=draw(st.integers(1, 12)),
        num_layers=draw(st.integers(1, 4)),
        num_query_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        ffn_size=draw(st.integers(12, 40)),
        vocab_size=draw(st.integers(12, 90)),
    )
    tie, qkv, o, ffn, norm = (draw(st.booleans()) for _ in range(5))
    num_experts = draw(st.sampled_from([0, 0, 3]))
    if num_experts:
        shape, ffn = replace(shape, num_experts=num_experts, experts_per_token=2), False
    return DecoderConfig(
        "llama", shape, 64, 1e-5, RopeConfig(), tie, qkv_bias=qkv, o_bias=o, ffn_bias=ffn, qk_norm=norm
    )


@st.composite
def layouts(draw: st.DrawFn, shape: ModelShape) -> Layout:
    requests = []
    for _ in range(draw(st.integers(1, shape.num_layers))):
        weights = draw(st.lists(st.integers(1, 5), min_size=1, max_size=shape.num_query_heads))
        requests.append(StageRequest(len(weights), weights=tuple(weights)))
    return build_layout(shape, requests)


def numbered_tensors(config: DecoderConfig) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, in which no value occurs twice."""
    tensors, start = {}, 0
    for name, shape in expected_tensors(config).items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + size, dtype=torch.float32).view(shape)
        start += size
    return tensors


def load_ranks(config: DecoderConfig, layout: Layout, tensors: dict[str, torch.Tensor]) -> list[Loaded]:
    """What every rank of the layout reads of a file with these tensors."""
    with tempfile.TemporaryDirectory() as directory:
        save_file(tensors, Path(directory) / "model.safetensors")
        entries = safetensors_entries(Path(directory), config)
        ranks = []
        for place in layout.places():
            params = rank_params(config, layout, place)
            with Checkpoint(entries) as checkpoint:
                loaded = load_params(params, checkpoint, torch.float32, CPU, num_threads=2)
                num_elements = sum(param.num_elements for param in params)
                ranks.append(Loaded(place, loaded, num_elements, checkpoint.bytes_read))
        return ranks


def feed_forwards(
    config: DecoderConfig, source: str, down: torch.Tensor, gate_up: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, `down` and `gate_up` of a layer's feed-forward, or of each of its experts."""
    if not config.shape.num_experts:
        yield f"{source}.mlp", down, gate_up
        return
    for expert in range(config.shape.num_experts):
        yield f"{source}.mlp.experts.{expert}", down[expert], gate_up[expert]


def joined(config: DecoderConfig, layout: Layout, ranks: list[Loaded]) -> dict[str, torch.Tensor]:
    """The checkpoint put together again from what the ranks hold; fails where ranks disagree about a shared part."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in expected_tensors(config).items()}
    head_dim = config.shape.head_dim

    def put(name: str, rows: slice, part: torch.Tensor, *, shared: bool = False, columns: bool = False) -> None:
        place = whole[name][:, rows] if columns else whole[name][rows]
        assert place.shape == part.shape, name
        assert place.isnan().all() or (shared and torch.equal(place[~place.isnan()], part[~place.isnan()])), name
        place.copy_(part)

    everything = slice(None)
    for rank in ranks:
        stage, tensor_rank, params = layout.stages[rank.place.stage], rank.place.tensor_rank, rank.params
        vocab = stage.vocab[tensor_rank].slice
        if stage.first:
            put("model.embed_tokens.weight", vocab, params["embed"])
        if stage.last:
            put("model.norm.weight", everything, params["norm"], shared=True)
            if not config.tie_embeddings:
                put("lm_head.weight", vocab, params["head"])
            elif not stage.first:  # the second copy of the embedding that the last stage needs
                put("model.embed_tokens.weight", vocab, params["head"], shared=True)
        queries = stage.query_heads[tensor_rank].scaled(head_dim).slice
        keys = stage.kv_heads[tensor_rank].scaled(head_dim)
        ffn = stage.ffn[tensor_rank].slice
        for layer in range(stage.layers.start, stage.layers.stop):
            own, source = f"layers.{layer}", f"model.layers.{layer}"
            put(f"{source}.input_layernorm.weight", everything, params[f"{own}.attention_norm"], shared=True)
            put(f"{source}.post_attention_layernorm.weight", everything, params[f"{own}.ffn_norm"], shared=True)
            put(f"{source}.self_attn.o_proj.weight", queries, params[f"{own}.o"], columns=True)
            for name, down, gate_up in feed_forwards(config, source, params[f"{own}.down"], params[f"{own}.gate_up"]):
                gate, up = gate_up.chunk(2)
                put(f"{name}.down_proj.weight", ffn, down, columns=True)
                put(f"{name}.gate_proj.weight", ffn, gate)
                put(f"{name}.up_proj.weight", ffn, up)
            for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
                stacked = params[f"{own}.qkv" + "_bias" * (kind == "bias")]
                q, k, v = torch.split(stacked, [queries.stop - queries.start, keys.size, keys.size])
                put(f"{source}.self_attn.q_proj.{kind}", queries, q)
                put(f"{source}.self_attn.k_proj.{kind}", keys.slice, k, shared=True)
                put(f"{source}.self_attn.v_proj.{kind}", keys.slice, v, shared=True)
            if config.ffn_bias:
                gate, up = params[f"{own}.gate_up_bias"].chunk(2)
                put(f"{source}.mlp.gate_proj.bias", ffn, gate)
                put(f"{source}.mlp.up_proj.bias", ffn, up)
            replicated = {
                "router": "mlp.gate.weight",
                "o_bias": "self_attn.o_proj.bias",
                "down_bias": "mlp.down_proj.bias",
                "q_norm": "self_attn.q_norm.weight",
                "k_norm": "self_attn.k_norm.weight",
            }
            for name, original in replicated.items():
                if f"{own}.{name}" in params:
                    put(f"{source}.{original}", everything, params[f"{own}.{name}"], shared=True)
    return whole


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_the_ranks_hold_is_the_whole_checkpoint(data: st.DataObject) -> None:
    """Every value is held by exactly one rank but for border KV heads, what all ranks of a stage hold, and a tied
    head on a stage of its own.
    """
    config = data.draw(configs())
    layout = data.draw(layouts(config.shape))
    tensors = numbered_tensors(config)
    whole = joined(config, layout, load_ranks(config, layout, tensors))
    for name, tensor in tensors.items():
        assert torch.equal(whole[name], tensor), name


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_rank_reads_the_bytes_of_its_parameters_and_no_more(data: st.DataObject) -> None:
    config = data.draw(configs())
    layout = data.draw(layouts(config.shape))
    for rank in load_ranks(config, layout, numbered_tensors(config)):
        assert rank.num_elements == sum(tensor.numel() for tensor in rank.params.values())
        assert rank.bytes_read == rank.num_elements * torch.float32.itemsize


def test_a_rank_of_four_reads_about_a_quarter_of_smollm2(smollm2: ModelSource) -> None:
    """9 query heads over 4 ranks are 3 + 2 + 2 + 2, so that two of the 3 KV heads are held by two ranks each."""
    entries = smollm2.entries()
    total = sum(entry.num_bytes for entry in entries.values())
    layout = build_layout(smollm2.config.shape, [StageRequest(4)])
    read = []
    for place in layout.places():
        with Checkpoint(entries) as checkpoint:
            params = rank_params(smollm2.config, layout, place)
            load_params(params, checkpoint, torch.bfloat16, CPU, num_threads=2)
            read.append(checkpoint.bytes_read / total)
    assert all(0.24 < share < 0.27 for share in read)
    assert 1.0 < sum(read) < 1.04  # the KV heads that are held twice are 3.3 % of the model


def test_a_rank_of_a_stage_reads_its_own_layers_alone(tiny: DecoderConfig) -> None:
    layout = build_layout(tiny.shape, [StageRequest(), StageRequest()])
    first, last = load_ranks(tiny, layout, numbered_tensors(tiny))
    assert {name.split(".")[1] for name in first.params if name.startswith("layers")} == {"0"}
    assert {name.split(".")[1] for name in last.params if name.startswith("layers")} == {"1"}
    assert "embed" in first.params
    assert "embed" not in last.params
    assert {"norm", "head"} <= set(last.params)
    assert not {"norm", "head"} & set(first.params)


@pytest.mark.parametrize("tied", [False, True])
def test_a_shared_head_is_held_in_two_parts_of_which_the_embedding_may_be_one(tiny: DecoderConfig, tied: bool) -> None:
    config = replace(tiny, tie_embeddings=tied, shape=replace(tiny.shape, vocab_size=200))
    tensors = numbered_tensors(config)
    layout = build_layout(config.shape, [StageRequest(), StageRequest()], shares_head=True)
    first, last = load_ranks(config, layout, tensors)
    head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    rows = layout.stages[0].head[0]
    assert torch.equal(last.params["head"], head[: rows.start])
    assert torch.equal(first.params["embed"], tensors["model.embed_tokens.weight"])
    assert ("head" in first.params) != tied
    assert tied or torch.equal(first.params["head"], head[rows.slice])


def test_a_tensor_that_is_missing_is_named(tiny: DecoderConfig, tiny_directory: Path) -> None:
    entries = safetensors_entries(tiny_directory, tiny)
    del entries["model.layers.1.mlp.up_proj.weight"]
    layout = build_layout(tiny.shape, [StageRequest(2)])
    params = rank_params(tiny, layout, RankPlace(0, 1, 0, 1))
    with Checkpoint(entries) as checkpoint, pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_params(params, checkpoint, torch.float32, CPU)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_every_byte_loaded_is_reported(tiny: DecoderConfig, tiny_directory: Path, num_threads: int) -> None:
    layout = build_layout(tiny.shape, [StageRequest(2)])
    params = rank_params(tiny, layout, RankPlace(0, 0, 0, 0))
    heard: list[int] = []
    with Checkpoint(safetensors_entries(tiny_directory, tiny)) as checkpoint:
        load_params(params, checkpoint, torch.bfloat16, CPU, num_threads=num_threads, on_bytes=heard.append)
    assert heard == [param.num_elements * torch.bfloat16.itemsize for param in params]


def test_parameters_come_in_the_dtype_asked_for_rounded_from_the_stored_one(
    tiny: DecoderConfig, tiny_directory: Path, tiny_tensors: dict[str, torch.Tensor]
) -> None:
    layout = build_layout(tiny.shape, [StageRequest()])
    params = rank_params(tiny, layout, RankPlace(0, 0, 0, 0))
    with Checkpoint(safetensors_entries(tiny_directory, tiny)) as checkpoint:
        loaded = load_params(params, checkpoint, torch.bfloat16, CPU)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert torch.equal(loaded["layers.0.o"], tiny_tensors["model.layers.0.self_attn.o_proj.weight"].bfloat16())


@pytest.mark.skipif(not PACKING.usable, reason=f"needs native products: {PACKING.told}")
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_of_products_are_packed_and_nothing_else(
    tiny: DecoderConfig, tiny_directory: Path, tied: bool
) -> None:
    config = replace(tiny, tie_embeddings=tied)
    layout = build_layout(config.shape, [StageRequest(2)])
    with Checkpoint(safetensors_entries(tiny_directory, tiny)) as checkpoint:
        for place in layout.places():
            params = rank_params(config, layout, place)
            plain = load_params(params, checkpoint, torch.bfloat16, CPU)
            packed = load_params(params, checkpoint, torch.bfloat16, CPU, packed=True, num_threads=2)
            assert list(packed) == list(plain)
            for name, weight in packed.items():
                part = name.rpartition(".")[2]
                multiplied = part in ("qkv", "o", "gate_up", "down", "head") or (part == "embed" and tied)
                assert isinstance(weight, PackedWeight) == multiplied, name
                rows = weight[torch.arange(weight.shape[0])]
                assert torch.equal(rows, plain[name]), name


def test_a_token_costs_the_keys_and_values_of_the_ranks_own_layers_and_heads() -> None:
    """Nine query heads over two ranks: five and four, which need two of the three KV heads each."""
    config = DecoderConfig("llama", ModelShape(576, 30, 9, 3, 64, 1536, 49152), 2048, 1e-5, RopeConfig())
    layout = build_layout(config.shape, [StageRequest(2, 20), StageRequest(1, 10)])
    costs = [kv_bytes_per_token(config, layout, place, dtype_bytes=2) for place in layout.places()]
    assert costs == [2 * 20 * 2 * 64 * 2, 2 * 20 * 2 * 64 * 2, 2 * 10 * 3 * 64 * 2]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", *KV_DTYPES])
def test_a_cache_takes_the_bytes_that_its_tokens_cost(kv_cache_dtype: str) -> None:
    """Heads of 64, in 8 bits a byte a number and a scale of 2."""
    config = DecoderConfig("llama", ModelShape(576, 30, 9, 3, 64, 1536, 49152), 2048, 1e-5, RopeConfig())
    layout = build_layout(config.shape, [StageRequest()])
    [place] = layout.places()
    cost = kv_bytes_per_token(config, layout, place, 2, kv_cache_dtype)
    assert cost == 2 * 30 * 3 * {"auto": 128, "int8": 66, "fp8": 66}[kv_cache_dtype]
    cache = KVCache(30, 5, 16, 3, 64, torch.bfloat16, torch.device("cpu"), kv_cache_dtype)
    assert cache.num_bytes == 5 * 16 * cost
