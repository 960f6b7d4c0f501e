"""The nucleus of top_p as a lagging device finds it: exact, the same on every split, and without a word to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.engine.sampler_ranks import SPLITS, VOCAB, draw, each_rank

from phalanx.comm import Communicator, GroupSpec
from phalanx.comm.single import SingleCommunicator
from phalanx.engine import sampler as sampler_module
from phalanx.engine import vocab_shard
from phalanx.engine.messages import Sampling
from phalanx.engine.nucleus import find_nucleus
from phalanx.engine.sampler import Sampler
from phalanx.engine.vocab_shard import VocabShard
from phalanx.parallel.split import Split

ROWS = 8
KINDS = [
    Sampling(temperature=1, top_p=0.3),
    Sampling(temperature=3, top_p=0.999),
    Sampling(temperature=0.6, top_p=0.95, min_p=0.02),
    Sampling(temperature=2, top_p=1e-9),
    Sampling(temperature=2, top_k=30, top_p=0.9),
    Sampling(temperature=1, min_p=0.05),
    Sampling(),
]


@pytest.mark.parametrize("split", SPLITS)
def test_a_lagging_device_draws_what_others_do(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    samplings = [msgspec.structs.replace(kind, seed=seed) for kind in KINDS for seed in range(ROWS)]
    logits = torch.randn(len(samplings), VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    logits = logits.bfloat16().float()  # so that there are equals
    logits[:, 100:300] = -torch.inf
    expected = draw(split, logits, samplings)
    monkeypatch.setattr(sampler_module, "lags", lambda _: True)
    monkeypatch.setattr(vocab_shard, "HOST_BLOCK", 3 * VOCAB)
    assert draw(split, logits, samplings) == expected


@settings(max_examples=60)
@given(st.data())
def test_it_is_the_fewest_likeliest_tokens_that_have_the_mass_and_of_equals_the_first(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from((0.0, -0.0, 1.5, 1.25, -3.0, -40.0)), min_size=2, max_size=30))
    bounds = sorted(data.draw(st.sets(st.integers(1, len(values) - 1), max_size=2)))
    top_p = data.draw(st.floats(0.01, 0.99))
    logits = torch.tensor([values], dtype=torch.float32)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    mass = logits.double().softmax(1)[0, order].cumsum(0)
    assume(bool(((mass - top_p).abs() > 1e-9).all()))
    expected = set(order[: int((mass < top_p).sum()) + 1])
    split = Split.explicit(len(values), [0, *bounds, len(values)])

    def held(comm: Communicator, part: slice) -> list[int]:
        own = logits[:, part].contiguous()
        top = torch.tensor([[max(values)]], dtype=torch.float64)
        share = torch.tensor([[top_p]], dtype=torch.float64)
        nucleus = find_nucleus(VocabShard(split, comm), own, lambda block: own[block].double(), top, share)
        kept = nucleus.holds(own, slice(None))[0].nonzero().squeeze(1) + part.start
        return [int(token) for token in kept]

    assert {token for found in each_rank(split, held) for token in found} == expected


class Unanswering(SingleCommunicator):
    """One of two ranks, whose transfers end in tensors that nobody can read."""

    def __init__(self) -> None:
        super().__init__(GroupSpec(0, 1, device="meta"))
        self.size = 2

    def all_reduce(self, x: torch.Tensor, **_: Any) -> Any:
        return x

    def all_gather(self, x: torch.Tensor, *, sizes: Sequence[int] | None = None, **_: Any) -> Any:
        return x.new_empty((sum(sizes) if sizes else 2 * len(x), *x.shape[1:]))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_draw_asks_the_device_anything(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors on the device `meta` nothing can be read."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    rules: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "history": (1, 2, 3),
        "logit_bias": ((4, 1.0),),
        "allowed": (4, 5, 700),
    }
    kinds = [*KINDS, Sampling(temperature=1, **rules), Sampling(temperature=1, top_p=0.5, logprobs=3)]
    comm = Unanswering() if num_ranks == 2 else SingleCommunicator(GroupSpec(0, 1, device="meta"))
    sampler = Sampler(Split.even(VOCAB, num_ranks), comm)
    for slot, kind in enumerate(kinds):
        sampler.admit(slot, kind)
    for slots in (range(len(kinds)), *([slot] for slot in range(len(kinds)))):
        logits = torch.empty(len(slots), VOCAB // num_ranks, device="meta")
        assert sampler.sample(logits, slots, [9] * len(slots)).tokens.shape == (len(slots),)
