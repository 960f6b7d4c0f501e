"""A rank that dies while tokens are drawn ends the call with an error that names it; nothing hangs, nothing is left."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
import pytest

from phalanx import LLM, SamplingParams
from phalanx.engine.request import Delta
from phalanx.errors import RankFailedError
from phalanx.models.resolve import ModelSource

SECTIONS: dict[str, Any] = {"cluster": {"ray": "none", "device": "cpu"}, "engine": {"kv_cache": "64MiB"}}


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_killed_rank_is_named_within_seconds(victim: int, smollm2: ModelSource) -> None:
    with LLM(model=smollm2.name, parallel={"tensor": 2, "pipeline": 2, "head": "shared"}, **SECTIONS) as llm:
        pids = [ready.pid for ready in llm.startup.ranks]
        stream = llm.stream("Once upon a time", SamplingParams(max_tokens=500, ignore_eos=True))
        assert isinstance(next(stream), Delta)
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(RankFailedError, match=f"rank {victim} .*killed by SIGKILL") as failed:
            list(stream)
        assert time.monotonic() - killed < 10
        assert failed.value.rank == victim
        with pytest.raises(RankFailedError):
            llm.generate("again", SamplingParams(max_tokens=1))
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_closing_a_stream_leaves_the_others_their_tokens(smollm2: ModelSource) -> None:
    with LLM(model=smollm2.name, parallel={"tensor": 2}, **SECTIONS) as llm:
        expected = llm.generate("The capital of France is", SamplingParams(max_tokens=4))[0].token_ids
        stream = llm.stream(["Once upon a time", "Hello"], SamplingParams(max_tokens=200))
        next(stream)
        stream.close()
        assert llm.generate("The capital of France is", SamplingParams(max_tokens=4))[0].token_ids == expected
