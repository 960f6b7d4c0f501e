"""torch.compile in place of PyTorch's operators: the same tokens, refused where nothing can compile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.tiny_models import TINY_MODELS, make

from phalanx import LLM, SamplingParams
from phalanx.errors import PhalanxError
from phalanx.kernels import compiled, compiled_names, native_cpu, use_compiler


@pytest.fixture(autouse=True)
def back_to_plain() -> Iterator[None]:
    yield
    use_compiler(torch.device("cpu"), False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_tokens_are_the_same_with_it_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cpu, "code_of", lambda _: None)  # as where the native library is not built
    some = [each for each in compiled._ALL if each.name == "add_rms_norm"]  # all would take half a minute
    monkeypatch.setattr(compiled, "_ALL", some)
    model = {"path": str(make(TINY_MODELS["smollm2"], tmp_path)), "dtype": "float32"}
    tokens = []
    for wanted in (False, True):
        with LLM(model=model, cluster={"ray": "none"}, engine={"torch_compile": wanted}) as llm:
            outputs = llm.generate([[5, 6, 7], [9] * 20], SamplingParams(max_tokens=12, ignore_eos=True))
            tokens.append([output.token_ids for output in outputs])
            assert ("compile" in llm.startup.startup_s) == wanted
            told = {decision.name: decision.choice for decision in llm.startup.decisions}
            assert told.get("torch.compile") == ("add_rms_norm" if wanted else None)
    assert tokens[0] == tokens[1]


def test_what_cannot_compile_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(
        PhalanxError, match=r"cannot compile for cpu here \(No working C\+\+ compiler found\); install a"
    ):
        use_compiler(torch.device("cpu"), True)
    assert compiled_names() == []
