"""Logits of every family in every layout against transformers; the ranks are threads, their transfers real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.rank_threads import Join, run_ranks
from tests.tiny_models import TINY_MODELS, VOCAB, Reference, TinyModel, make

from phalanx.comm import Communicator
from phalanx.kernels import Recording, choose_packing, plan_attention
from phalanx.models import recorded
from phalanx.models.batch import Batch, KVCache, Part
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.decoder import Decoder
from phalanx.models.params import rank_params
from phalanx.models.resolve import ModelSource, resolve_model
from phalanx.models.weights import load_params
from phalanx.parallel.handover import HandOver
from phalanx.parallel.layout import Layout, StageRequest, build_layout
from phalanx.parallel.overlap import Overlap

CPU = torch.device("cpu")
PAGE_SIZE = 4
LAYOUTS = {
    "1x1": [StageRequest()],
    "tensor-2": [StageRequest(2)],
    "tensor-3": [StageRequest(3)],
    "tensor-4": [StageRequest(4)],
    "weights-2-1": [StageRequest(2, weights=(2, 1))],
    "pipeline-2": [StageRequest(), StageRequest()],
    "ragged-3-1": [StageRequest(3, 3), StageRequest(1, 1)],
    "ragged-1-2-1": [StageRequest(1, 1), StageRequest(2, 2), StageRequest(1, 1)],
}


def random_tokens(length: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


SEQUENCES = tuple(random_tokens(length) for length in (23, 1, 98, 9))

# How many tokens of each sequence a step takes, step by step: the prompts whole, in one step; and cut into chunks, each
# sequence in its own rhythm, so that one step holds first chunks, later ones and single tokens.
WHOLE = (tuple(len(sequence) for sequence in SEQUENCES),)
CHUNKED = ((5, 0, 40, 1), (17, 1, 1, 0), (1, 0, 13, 7), (0, 0, 43, 1), (0, 0, 1, 0))
# Nearly all steps have seven tokens, of ever different sequences.
ALIKE = (
    ((7, 0, 0, 0), (0, 1, 5, 1), (5, 0, 1, 1), (1, 0, 2, 4), (0, 0, 7, 0), (7, 0, 0, 0), (3, 0, 1, 3))
    + 11 * ((0, 0, 7, 0),)
    + ((0, 0, 5, 0),)
)


class Model(NamedTuple):
    """A tiny model: as Phalanx finds it, and what transformers makes of SEQUENCES in a dtype: [tokens, VOCAB] each."""

    source: ModelSource
    reference: Callable[[torch.dtype], list[torch.Tensor]]


Models = Callable[[str], Model]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    @cache
    def model(name: str) -> Model:
        directory = make(TINY_MODELS[name], tmp_path_factory.mktemp(name))

        @cache
        def reference(dtype: torch.dtype) -> list[torch.Tensor]:
            network = Reference(directory, dtype)
            return [network.logits(sequence) for sequence in SEQUENCES]

        return Model(resolve_model(str(directory)), reference)

    return model


Work = list[tuple[int, range]]


def batches(schedule: Sequence[Sequence[int]], window: int | None) -> Iterator[tuple[Work, Callable[[int], Batch]]]:
    """The steps of a schedule: which positions of which sequences, and the batch that says so to the decoder, in so
    many parts.
    """
    done = [0] * len(SEQUENCES)
    for counts in schedule:
        work = [(i, range(done[i], done[i] + count)) for i, count in enumerate(counts) if count]
        for i, span in work:
            done[i] = span.stop

        def batch(num_parts: int, work: Work = work) -> Batch:
            num_rows = sum(len(span) for _, span in work)
            bounds = [num_rows * part // num_parts for part in range(num_parts + 1)]
            parts = (part_of(rows_of(work, start, stop), window) for start, stop in pairwise(bounds))
            return Batch(tuple(parts), None)

        yield work, batch


def rows_of(work: Work, start: int, stop: int) -> Work:
    """What is in rows `start` to `stop` of a step."""
    found = []
    row = 0
    for i, span in work:
        inside = span[max(0, start - row) : max(0, stop - row)]
        if inside:
            found.append((i, inside))
        row += len(span)
    return found


def part_of(work: Work, window: int | None) -> Part:
    """Pages of the sequences lie interleaved in the cache, so that none has neighbouring ones."""
    num_sequences = len(SEQUENCES)
    table = torch.zeros((len(work), -(-max(map(len, SEQUENCES)) // PAGE_SIZE)), dtype=torch.int64)
    positions: list[int] = []
    slots: list[int] = []
    for row, (i, span) in enumerate(work):
        pages = [i + page * num_sequences for page in range(-(-span.stop // PAGE_SIZE))]
        positions += span
        slots += [pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in span]
        table[row, : len(pages)] = torch.tensor(pages)
    attention = plan_attention(
        table,
        [len(span) for _, span in work],
        [span.stop for _, span in work],
        page_size=PAGE_SIZE,
        window=window,
        device=CPU,
    )
    return Part(torch.tensor(positions), torch.tensor(slots), attention)


def phalanx_logits(
    source: ModelSource,
    requests: Sequence[StageRequest],
    schedule: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    config: DecoderConfig | None = None,
    overlap: str = "none",
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
) -> list[torch.Tensor]:
    """Logits [tokens, VOCAB] of every position of SEQUENCES, computed by the ranks of a layout step by step."""
    config = config or source.config
    layout = build_layout(config.shape, requests)
    places = list(layout.places())
    entries = source.entries()

    @torch.inference_mode()
    def rank(number: int, join: Join) -> list[torch.Tensor]:
        place = places[number]
        stage = layout.stages[place.stage]
        comm = join(f"stage{place.stage}", place.tensor_rank, stage.num_ranks)
        before, after = borders(layout, number, join, comm)
        with Checkpoint(entries) as checkpoint:
            packed = choose_packing(dtype, CPU).usable  # as ranks do
            params = rank_params(config, layout, place)
            weights = load_params(params, checkpoint, dtype, CPU, packed=packed, quantization=quantization)
        decoder = Decoder(config, stage, place.tensor_rank, comm, weights, Overlap(overlap))
        num_pages = len(SEQUENCES) * -(-max(map(len, SEQUENCES)) // PAGE_SIZE)
        num_kv_heads = stage.kv_heads[place.tensor_rank].size
        head_dim = config.shape.head_dim
        shape = (stage.layers.size, num_pages, PAGE_SIZE, num_kv_heads, head_dim)
        cache = KVCache(*shape, dtype, CPU, kv_cache_dtype)
        for each in (cache.keys, cache.values) if cache.scales is None else cache.scales:
            each.fill_(torch.nan)  # what no step has written must not be read
        logits = []
        for work, batch_of in batches(schedule, config.sliding_window):
            num_tokens = sum(len(span) for _, span in work)
            batch = batch_of(decoder.num_parts(num_tokens))
            if before is None:
                x = torch.tensor([SEQUENCES[i][at] for i, span in work for at in span])
            else:
                before.expect(num_tokens, config.shape.hidden_size, dtype, CPU)
                x = before.receive()
            hidden = decoder(x, batch, cache)
            if after is None:
                logits.append(decoder.logits(hidden, batch.last_rows).clone())  # the next step may write there
            else:
                after.send(hidden)
        if after is not None:
            after.flush()
        return logits

    results = run_ranks(layout.num_ranks, rank)
    shards = [results[number] for number in layout.stage_ranks(len(layout.stages) - 1)]
    found: list[list[torch.Tensor]] = [[] for _ in SEQUENCES]
    for step, (work, _) in enumerate(batches(schedule, config.sliding_window)):
        whole = torch.cat([shard[step] for shard in shards], dim=1)
        parts = torch.split(whole, [len(span) for _, span in work])
        for (i, _), part in zip(work, parts, strict=True):
            found[i].append(part)
    return [torch.cat(steps) for steps in found]


def borders(layout: Layout, number: int, join: Join, comm: Communicator) -> tuple[HandOver | None, HandOver | None]:
    """The borders of a rank's stage to the stages before and after it."""
    num_stages = len(layout.stages)
    if num_stages == 1:
        return None, None
    pipeline = join("pipeline", number, layout.num_ranks)
    stage = next(place.stage for place in layout.places() if place.rank == number)
    ranks = [layout.stage_ranks(index) for index in range(num_stages)]
    before = HandOver(pipeline, ranks[stage - 1], ranks[stage], comm) if stage > 0 else None
    after = HandOver(pipeline, ranks[stage], ranks[stage + 1], comm) if stage + 1 < num_stages else None
    return before, after


class Errors(NamedTuple):
    """Distances between two sets of logits, over all of them. scale: standard deviation of those expected."""

    mean: float
    largest: float
    scale: float


def errors(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> Errors:
    assert [logits.shape for logits in found] == [logits.shape for logits in expected]
    exact = torch.cat(list(expected))
    distance = (torch.cat(list(found)) - exact).abs()
    return Errors(distance.mean().item(), distance.max().item(), exact.std().item())


MIXTURES = tuple(name for name, model in TINY_MODELS.items() if "num_experts_per_tok" in model.config)
every_family = pytest.mark.parametrize("name", TINY_MODELS)
every_dense_family = pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in MIXTURES])


@pytest.mark.parametrize("layout", LAYOUTS)
@every_family
def test_float32_logits_are_those_of_transformers(models: Models, name: str, layout: str) -> None:
    model = models(name)
    error = errors(phalanx_logits(model.source, LAYOUTS[layout], CHUNKED), model.reference(torch.float32))
    assert error.largest < 1e-4 * error.scale


@pytest.mark.parametrize(("kv_cache_dtype", "mean", "largest"), [("int8", 0.03, 0.3), ("fp8", 0.15, 1.5)])
@pytest.mark.parametrize("layout", ["1x1", "ragged-3-1"])
def test_logits_from_a_cache_in_8_bits_are_within_its_rounding(
    models: Models, layout: str, kv_cache_dtype: str, mean: float, largest: float
) -> None:
    """Those of attention in float64 over the same numbers of the cache, but for an odd one that is rounded the other
    way there; and those of transformers as far as the format allows, over random weights.
    """
    model = models("smollm2")
    found = phalanx_logits(model.source, LAYOUTS[layout], CHUNKED, kv_cache_dtype=kv_cache_dtype)
    exact = phalanx_logits(model.source, LAYOUTS["1x1"], WHOLE, dtype=torch.float64, kv_cache_dtype=kv_cache_dtype)
    over_the_same, over_exact = errors(found, exact), errors(found, model.reference(torch.float32))
    assert over_the_same.mean < 1e-4 * over_the_same.scale
    assert over_exact.mean < mean * over_exact.scale
    assert over_exact.largest < largest * over_exact.scale


@pytest.mark.parametrize("layout", ["1x1", "ragged-3-1"])
@every_family
def test_prompts_in_one_step_have_the_logits_of_prompts_in_chunks(models: Models, name: str, layout: str) -> None:
    model = models(name)
    error = errors(phalanx_logits(model.source, LAYOUTS[layout], WHOLE), model.reference(torch.float32))
    assert error.largest < 1e-4 * error.scale


@pytest.mark.parametrize("overlap", ["chunks", "parts", "sequence"])
@pytest.mark.parametrize("layout", ["tensor-2", "weights-2-1", "ragged-3-1"])
@every_family
def test_hiding_transfers_leaves_the_logits_those_of_transformers(
    models: Models, name: str, layout: str, overlap: str
) -> None:
    assert Overlap(overlap).way(sum(map(len, SEQUENCES))).name == overlap
    model = models(name)
    found = phalanx_logits(model.source, LAYOUTS[layout], WHOLE, overlap=overlap)
    error = errors(found, model.reference(torch.float32))
    assert error.largest < 1e-4 * error.scale


@pytest.mark.skipif(not choose_packing(torch.bfloat16, CPU).usable, reason="needs the native products")
@pytest.mark.parametrize("layout", ["tensor-4", "ragged-3-1"])
def test_hiding_transfers_changes_no_bit(models: Models, layout: str) -> None:
    """So that the choice may change while sequences run."""
    ways = [
        phalanx_logits(models("smollm2").source, LAYOUTS[layout], WHOLE, torch.bfloat16, overlap=way)
        for way in ("none", "chunks", "parts", "sequence")
    ]
    assert all(torch.equal(one, other) for way in ways[1:] for one, other in zip(ways[0], way, strict=True))


@pytest.mark.parametrize("layout", ["1x1", "tensor-4", "weights-2-1", "ragged-3-1"])
@every_dense_family  # in a mixture one choice of experts that nearly ties, and turns, turns all that follows
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(
    models: Models, name: str, layout: str
) -> None:
    """The mean is steady (0.9 to 1.06 of transformers' here); the largest of some thousands is a draw from a long tail
    and swings from 0.9 to 1.5.
    """
    model = models(name)
    exact = model.reference(torch.float32)
    own = errors(phalanx_logits(model.source, LAYOUTS[layout], CHUNKED, torch.bfloat16), exact)
    theirs = errors(model.reference(torch.bfloat16), exact)
    assert own.mean < 1.2 * theirs.mean
    assert own.largest < 2 * theirs.largest


@pytest.mark.parametrize("layout", ["tensor-2", "ragged-3-1"])
@pytest.mark.parametrize(("name", "quantization"), [("smollm2", "int8"), ("smollm2", "int4"), ("mixtral", "int8")])
def test_quantised_logits_do_not_depend_on_the_layout(
    models: Models, name: str, quantization: str, layout: str
) -> None:
    """Nor on who multiplies: what others are compared with are those of one rank in float32, by PyTorch."""
    source = models(name).source
    alone = phalanx_logits(source, LAYOUTS["1x1"], CHUNKED, quantization=quantization)
    error = errors(phalanx_logits(source, LAYOUTS[layout], CHUNKED, quantization=quantization), alone)
    assert error.largest < 1e-4 * error.scale
    plain = phalanx_logits(source, LAYOUTS["1x1"], CHUNKED)
    assert errors(plain, alone).mean > 1e-3 * error.scale  # it is quantised
    if name not in MIXTURES:  # see below
        rounded = phalanx_logits(source, LAYOUTS["1x1"], CHUNKED, torch.bfloat16, quantization=quantization)
        plain_rounded = phalanx_logits(source, LAYOUTS["1x1"], CHUNKED, torch.bfloat16)
        assert errors(rounded, alone).mean < 1.5 * errors(plain_rounded, plain).mean


@pytest.mark.parametrize("quantization", ["w8a8", "w4a8"])
def test_activations_in_8_bits_are_the_same_in_every_layout(tmp_path: Path, quantization: str) -> None:
    """Cuts leave the inputs together that share a scale: heads, and columns in granules of 64. But for those few that
    lie between two integers, and that the last bits of a sum turn.
    """
    config = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 768}
    source = resolve_model(str(make(TinyModel("Llama", config | {"num_hidden_layers": 4}), tmp_path)))
    alone = phalanx_logits(source, LAYOUTS["1x1"], CHUNKED, quantization=quantization)
    for layout in ("tensor-2", "ragged-3-1"):
        error = errors(phalanx_logits(source, LAYOUTS[layout], WHOLE, quantization=quantization), alone)
        assert error.mean < 0.01 * error.scale  # else 0.03
    plain = phalanx_logits(source, LAYOUTS["1x1"], CHUNKED)
    weights_alone = phalanx_logits(source, LAYOUTS["1x1"], CHUNKED, quantization=f"int{quantization[1]}")
    assert errors(alone, weights_alone).mean > 1e-4 * errors(alone, plain).scale  # activations are quantised, too
    rounded = phalanx_logits(source, LAYOUTS["tensor-2"], CHUNKED, torch.bfloat16, quantization=quantization)
    plain_rounded = phalanx_logits(source, LAYOUTS["tensor-2"], CHUNKED, torch.bfloat16)
    assert errors(rounded, alone).mean < 3 * errors(plain_rounded, plain).mean


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_packed_experts_has_the_same_bits_in_any_batch(models: Models, name: str) -> None:
    if not choose_packing(torch.bfloat16, CPU).usable:
        pytest.skip("needs the native library and AVX2")
    source = models(name).source
    chunked, whole = (phalanx_logits(source, LAYOUTS["1x1"], each, torch.bfloat16) for each in (CHUNKED, WHOLE))
    assert all(torch.equal(one, other) for one, other in zip(chunked, whole, strict=True))


@pytest.mark.parametrize("layout", ["1x1", "tensor-2", "ragged-3-1"])
@every_dense_family  # steps of mixtures are not recorded
def test_recorded_steps_have_the_bits_of_others(
    models: Models, name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not choose_packing(torch.bfloat16, CPU).usable:
        pytest.skip("only steps of native operators are recorded: needs the native library and AVX2")
    replays = []
    replay = Recording.replay

    def counted(recording: Recording) -> None:
        replays.append(recording)
        replay(recording)

    monkeypatch.setattr(Recording, "replay", counted)
    source = models(name).source
    found = phalanx_logits(source, LAYOUTS[layout], ALIKE, torch.bfloat16)
    num_ranks = build_layout(source.config.shape, LAYOUTS[layout]).num_ranks
    assert len(replays) == num_ranks * (len(ALIKE) - 2)  # all but the first of each size
    monkeypatch.setattr(recorded, "MOST_TOKENS", 0)
    expected = phalanx_logits(source, LAYOUTS[layout], ALIKE, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("llama-3.1", {"rope": RopeConfig(theta=500.0)}),
        ("llama-3.1", {"rope": RopeConfig(theta=500.0, scaling="linear", factor=8.0)}),
        ("llama-3.1", {"norm_eps": 1e-2}),
        ("llama-biased", {"qkv_bias": False}),
        ("llama-biased", {"o_bias": False}),
        ("llama-biased", {"ffn_bias": False}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {"qkv_bias": False}),
        ("qwen3", {"qk_norm": False}),
        ("qwen3-moe", {"renormalise_experts": True}),
        ("mixtral", {"renormalise_experts": False}),
        ("qwen3-windowed", {"qkv_bias": False, "o_bias": False}),
        ("qwen3-windowed", {"sliding_window": None}),
        ("qwen3-windowed", {"rope": RopeConfig()}),
    ],
)
def test_what_sets_a_family_apart_shows_in_its_logits(models: Models, name: str, without: dict[str, object]) -> None:
    """Or the comparisons above would hold of a decoder that ignores it."""
    model = models(name)
    changed = replace(model.source.config, **without)  # type: ignore[arg-type]
    error = errors(phalanx_logits(model.source, LAYOUTS["1x1"], WHOLE, config=changed), model.reference(torch.float32))
    assert error.largest > 1e-2 * error.scale
