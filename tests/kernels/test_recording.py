"""A recording makes the same calls again, on what is there then, and takes no more memory than two turns need."""

from __future__ import annotations

import time

import pytest
import torch
from tests.native_library import excuse_for_no_library

from phalanx.kernels import (
    Arena,
    NotRecordableError,
    PackedWeight,
    Recording,
    argmax,
    argmax_keys,
    choose_packing,
    columns_of_keys,
    linear,
    rms_norm,
    silu_mul,
    top,
)
from phalanx.kernels.watch import CallWatch, Work

needs_native = pytest.mark.skipif(
    not choose_packing(torch.bfloat16, torch.device("cpu")).usable and bool(excuse_for_no_library()),
    reason=f"the native library: {excuse_for_no_library()}",
)
EPS = 1e-5


def block(x: torch.Tensor, norm: torch.Tensor, up: PackedWeight, down: PackedWeight) -> torch.Tensor:
    return linear(silu_mul(linear(rms_norm(x, norm, EPS), up)), down)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@needs_native
def test_a_replay_computes_what_the_calls_would() -> None:
    arena = Arena()
    norm = random(48)
    layers = [(PackedWeight.pack(random(80, 48)), PackedWeight.pack(random(48, 40))) for _ in range(5)]
    x = random(3, 48)
    seen = []
    recording = Recording(arena)
    with recording.record():
        y = x
        for up, down in layers:
            arena.turn()
            y = block(y, norm, up, down)
        recording.by_hand(lambda: seen.append(y.clone()))

    def expected() -> torch.Tensor:
        y = x
        for up, down in layers:
            y = block(y, norm, up, down)
        return y

    assert not seen
    for _ in range(3):
        x.copy_(random(3, 48))
        recording.replay()
        assert torch.equal(y, expected())
    assert len(seen) == 3
    assert torch.equal(seen[-1], y)


@needs_native
def test_recordings_of_many_layers_and_sizes_share_the_memory_of_two_turns() -> None:
    arena = Arena()
    norm, up, down = random(64), PackedWeight.pack(random(128, 64)), PackedWeight.pack(random(64, 64))
    made = set()
    inputs = {num_rows: random(num_rows, 64) for num_rows in (16, 7, 2)}
    recordings = {}
    for num_rows, x in inputs.items():
        recording = Recording(arena)
        with recording.record():
            y = x
            for _ in range(20):
                arena.turn()
                y = block(y, norm, up, down)
                made.add(y.data_ptr())
        recordings[num_rows] = recording, y
    assert len(made) == 2
    for num_rows, (recording, y) in recordings.items():
        recording.replay()
        expected = inputs[num_rows]
        for _ in range(20):
            expected = block(expected, norm, up, down)
        assert torch.equal(y, expected)


@needs_native
def test_memory_that_is_outgrown_stays_for_those_who_know_it() -> None:
    arena = Arena()
    norm, up, down = random(64), PackedWeight.pack(random(128, 64)), PackedWeight.pack(random(64, 64))
    small, large = random(2, 64), random(50, 64)
    first, second = Recording(arena), Recording(arena)
    with first.record():
        of_small = block(small, norm, up, down)
    with second.record():
        of_large = block(large, norm, up, down)
    for recording, y, x in ((first, of_small, small), (second, of_large, large), (first, of_small, small)):
        recording.replay()
        assert torch.equal(y, block(x, norm, up, down))


@needs_native
def test_what_is_made_before_the_first_turn_stays_to_the_end() -> None:
    arena = Arena()
    norm, up, down = random(64), PackedWeight.pack(random(128, 64)), PackedWeight.pack(random(64, 64))
    x = random(3, 64)
    recording = Recording(arena)
    with recording.record():
        first = y = rms_norm(x, norm, EPS)
        for _ in range(4):
            arena.turn()
            y = block(y, norm, up, down)
    recording.replay()
    assert torch.equal(first, rms_norm(x, norm, EPS))


@needs_native
def test_a_search_is_done_by_the_replay() -> None:
    x = torch.zeros(2, 300)
    recording = Recording(Arena())
    with recording.record():
        best, keys, (values, columns) = argmax(x), argmax_keys(x, 1000), top(x, 2)
    x[0, 7] = x[1, 299] = 3.0
    recording.replay()
    assert best.tolist() == columns[:, 0].tolist() == [7, 299]
    assert columns_of_keys(keys).tolist() == [1007, 1299]
    assert values.tolist() == [[3, 0], [3, 0]]


@needs_native
def test_what_torch_computes_is_refused() -> None:
    x = random(3, 48)
    recording = Recording(Arena())
    with pytest.raises(NotRecordableError, match=r"aten\.add\.Tensor is computed by torch"), recording.record():
        _ = x.view(-1)[5:] + 1
    assert torch.equal(x + 1, 1 + x)  # which may be computed again


@needs_native
def test_a_call_outside_is_not_recorded() -> None:
    norm, x = random(48), random(3, 48)
    recording = Recording(Arena())
    with recording.record():
        y = rms_norm(x, norm, EPS)
    other = rms_norm(random(3, 48), norm, EPS)
    kept = other.clone()
    x.copy_(random(3, 48))
    recording.replay()
    assert torch.equal(other, kept)
    assert torch.equal(y, rms_norm(x, norm, EPS))


@needs_native
def test_a_replay_tells_who_watches_what_it_calls_and_nobody_else() -> None:
    norm, weight = random(48), PackedWeight.pack(random(80, 48))
    x = random(3, 48)
    recording = Recording(Arena())
    with recording.record():
        linear(rms_norm(x, norm, EPS), weight)
    watch = CallWatch()
    recording.replay()
    began_s = time.perf_counter()
    with watch.watching():
        recording.replay()
    ended_s = time.perf_counter()
    recording.replay()
    normed, product = watch.take()
    assert normed.work == Work("rms_norm", (3, 48), 2 * 3 * 48 * 2)
    assert product.work == Work("linear", (3, 80, 48), weight.nbytes + 3 * 128 * 2, 2 * 3 * 80 * 48, weight.data_ptr())
    assert began_s <= normed.started_s <= normed.ended_s <= product.started_s <= product.ended_s <= ended_s
    assert watch.take() == []
