"""From a name to a model: built-in, directory, file, shape, hub id, and names that are none of these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from phalanx.errors import ModelError
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.resolve import ModelSource, known_names, resolve_model

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A small Qwen3 saved by transformers in several shards, and the model itself."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3ForCausalLM(config)
    directory = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory, model


def assert_same_tensors(source: ModelSource, model: Any) -> None:
    with Checkpoint(source.entries()) as checkpoint:
        state = model.state_dict()
        assert set(checkpoint.entries) == set(state)
        for name, tensor in state.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_the_builtin_name_gives_a_whole_gguf_model(smollm2: ModelSource) -> None:
    assert (smollm2.name, smollm2.kind) == ("smollm2-135m", "gguf")
    assert len(smollm2.entries()) == 272
    assert smollm2.tokenizer().decode(smollm2.tokenizer().encode("Hello")) == "Hello"


def test_a_directory_saved_by_transformers_is_a_model(saved_model: tuple[Path, Any]) -> None:
    directory, model = saved_model
    assert len(list(directory.glob("*.safetensors"))) > 1
    source = resolve_model(str(directory))
    assert (source.kind, source.config.family) == ("safetensors", "qwen3")
    assert_same_tensors(source, model)


def test_a_gguf_file_is_a_model(
    write_gguf: Write, tiny_gguf_metadata: dict[str, Any], tiny_gguf_tensors: dict[str, Any]
) -> None:
    source = resolve_model(str(write_gguf(tiny_gguf_metadata, tiny_gguf_tensors)))
    assert source.kind == "gguf"
    assert len(source.entries()) == len(tiny_gguf_tensors)
    with pytest.raises(ModelError, match="carries no tokenizer"):
        source.tokenizer()


def test_resolving_reads_neither_tensors_nor_tokenizer(saved_model: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copy(saved_model[0] / "config.json", tmp_path)
    source = resolve_model(str(tmp_path))
    assert source.config.shape.num_layers == 2
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        source.entries()
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        source.tokenizer()


@pytest.mark.parametrize(
    ("name", "parameters", "context"),
    [
        ("shape:llama-3.1-8b", 8_030_261_248, 131072),
        ("shape:llama-3.1-70b", 70_553_706_496, 131072),
        ("shape:qwen3-30b-a3b", 30_532_122_624, 40960),
    ],
)
def test_a_shape_has_the_published_number_of_parameters(name: str, parameters: int, context: int) -> None:
    config = resolve_model(name).config
    from phalanx.models.families import expected_tensors

    assert sum(torch.Size(shape).numel() for shape in expected_tensors(config).values()) == parameters
    assert config.max_position == context
    if "llama" in name:
        assert (config.rope.scaling, config.rope.factor) == ("llama3", 8.0)


def test_a_shape_can_be_a_file_and_cannot_be_run(saved_model: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    shutil.copy(saved_model[0] / "config.json", path)
    source = resolve_model(str(path))
    assert (source.kind, source.config.family) == ("shape", "qwen3")
    with pytest.raises(ModelError, match=r"has no weights: it can be checked, not run; point model\.path at"):
        source.entries()
    with pytest.raises(ModelError, match=r"has no tokenizer: it can be checked, not run"):
        source.tokenizer()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", "did you mean smollm2-135m"),
        ("SmolLM2-135M", "did you mean smollm2-135m"),
        ("llama-3.1-70b", "did you mean shape:llama-3.1-70b"),
        ("shape:llama-3.1-80b", "did you mean shape:llama-3.1-"),
        ("zzz", "'zzz' is no model that is known: Use a built-in name"),
        ("./models/none.gguf", "is no file, directory or built-in name here"),
        ("/no/such/directory", "is no file, directory or built-in name here"),
    ],
)
def test_a_name_that_is_nothing_gets_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def test_every_known_name_but_the_fetched_ones_resolves() -> None:
    assert {resolve_model(name).kind for name in known_names() if name.startswith("shape:")} == {"shape"}


def test_files_that_are_no_model_say_what_to_name_instead(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=f"name the directory, {tmp_path}"):
        resolve_model(str(tmp_path / "model.safetensors"))
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"not a \.bin file"):
        resolve_model(str(tmp_path / "a.bin"))
    with pytest.raises(ModelError, match=r"no config\.json in it; name the directory"):
        resolve_model(str(tmp_path))
    (tmp_path / "q4.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no config\.json in it; name one of its files, such as .*q4\.gguf"):
        resolve_model(str(tmp_path))


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub without a network, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill_hub_cache(cache: Path, repository: str, files: Path, revision: str = "main") -> None:
    """Puts a directory into huggingface_hub's cache as a download would."""
    folder, commit = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(commit)
    shutil.copytree(files, folder / "snapshots" / commit)


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_hub_id_in_the_cache_works_offline(
    saved_model: tuple[Path, Any], offline_hub: Path, revision: str | None
) -> None:
    fill_hub_cache(offline_hub, "some/model", saved_model[0], revision or "main")
    source = resolve_model("some/model", revision=revision)
    assert source.kind == "safetensors"
    assert_same_tensors(source, saved_model[1])


def test_a_hub_id_that_cannot_be_fetched_says_what_to_do(offline_hub: Path) -> None:
    with pytest.raises(
        ModelError, match=r"some/model could not be fetched from the hub .*check the network.*local copy"
    ):
        resolve_model("some/model")


def test_only_the_files_that_are_asked_for_are_fetched(
    saved_model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repository, revision) == ("some/model", "v2")
        asked.append(allow_patterns)
        return str(saved_model[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = resolve_model("some/model", revision="v2")
    assert not any("safetensors" in pattern for pattern in asked[-1])
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing"):
        source.tokenizer()
    assert not any("safetensors" in pattern for pattern in asked[-1])
    source.entries()
    assert not any(
        pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for patterns in asked for pattern in patterns
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "some/model is gated: accept its terms"),
        ("RevisionNotFoundError", "some/model has no revision 'v2'"),
        ("RepositoryNotFoundError", "the hub has no model 'some/model', or it is private"),
    ],
)
def test_the_hubs_refusals_are_told_apart(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = getattr(huggingface_hub.errors, kind)

    def refuse(*_: Any, **__: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        resolve_model("some/model", revision="v2")


def test_a_hub_repository_without_a_config_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match=r"has no config\.json.*GGUF files, download one"):
        resolve_model("some/model-GGUF")


def test_a_local_directory_comes_before_a_hub_id(
    saved_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved_model[0], tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    source = resolve_model("some/model")
    assert source.hub is None
    assert json.loads(Path(source.location, "config.json").read_text())["model_type"] == "qwen3"
