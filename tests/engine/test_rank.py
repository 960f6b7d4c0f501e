"""A rank by itself: every transfer of a step stands in its ledger under that step."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.tiny_models import TINY_MODELS, make

from phalanx.engine.messages import CommSettings, RankSpec
from phalanx.engine.rank import WARMUP, Rank
from phalanx.models.resolve import resolve_model
from phalanx.parallel.layout import StageRequest, build_layout


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    source = resolve_model(str(make(TINY_MODELS["smollm2"], tmp_path)))
    spec = RankSpec(
        replica=0,
        rank=0,
        layout=build_layout(source.config.shape, [StageRequest()]),
        config=source.config,
        entries=source.entries(),
        dtype="float32",
        device="cpu",
        num_threads=1,
        num_pages=4,
        page_size=16,
        comm=CommSettings(store=""),
        engine="",
        secret="",
    )
    return Rank(spec, lambda _: None)


def test_the_transfers_of_a_step_stand_in_the_ledger_under_it(rank: Rank) -> None:
    num_layers = TINY_MODELS["smollm2"].config["num_hidden_layers"]
    rank.run(msgspec.structs.replace(WARMUP[0], step=7))
    rank.run(msgspec.structs.replace(WARMUP[1], step=8))
    for step in (7, 8):
        assert rank.ledger.summary(step)["all_reduce"].num_ops == 2 * num_layers
    rank.close()
