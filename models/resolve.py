"""From the name of a model to what it is: built-in, directory, file, shape or hub id."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phalanx.errors import ModelError
from phalanx.models.builtin import BUILTIN_MODELS, builtin_path
from phalanx.models.config import DecoderConfig
from phalanx.models.gguf_config import gguf_decoder_config
from phalanx.models.gguf_file import read_gguf
from phalanx.models.gguf_index import gguf_entries
from phalanx.models.gguf_tokenizer import gguf_tokenizer
from phalanx.models.hf_config import read_hf_config
from phalanx.models.hf_tokenizer import hf_tokenizer
from phalanx.models.hub import HubModel, is_hub_id
from phalanx.models.safetensors_index import safetensors_entries
from phalanx.models.tensor_entry import TensorEntry
from phalanx.models.tokenizer import Tokenizer

SHAPE_PREFIX = "shape:"
_SHAPES = Path(__file__).parent / "shapes"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that has been found, of which only the configuration has been read.

    name: as the user gave it. kind: `safetensors`, `gguf`, or `shape` for a configuration without weights.
    location: the directory or file. hub: where the rest of its files are fetched from, when they are asked for.
    """

    name: str
    kind: Literal["safetensors", "gguf", "shape"]
    location: str
    config: DecoderConfig
    hub: HubModel | None = None

    def entries(self) -> dict[str, TensorEntry]:
        """Where every tensor lies, by canonical name, compared with what the configuration calls for.

        Raises ModelError, naming file and tensor, where one is missing, misshapen, duplicated, unexpected or cut off,
        and for a shape, which has none.
        """
        match self.kind:
            case "gguf":
                return gguf_entries(read_gguf(Path(self.location)), self.config)
            case "safetensors":
                return safetensors_entries(
                    self.hub.weights_directory() if self.hub else Path(self.location), self.config
                )
        raise self._without("weights")

    def known_entries(self) -> dict[str, TensorEntry]:
        """The same without fetching anything: none of a model on the hub, and none of a shape."""
        return {} if self.hub is not None or self.kind == "shape" else self.entries()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ModelError where there is none, or it is of an unknown kind."""
        match self.kind:
            case "gguf":
                return gguf_tokenizer(read_gguf(Path(self.location)), self.config)
            case "safetensors":
                return hf_tokenizer(self.hub.tokenizer_directory() if self.hub else Path(self.location), self.config)
        raise self._without("tokenizer")

    def _without(self, what: str) -> ModelError:
        return ModelError(
            f"{self.location}: {self.name!r} is the shape of a model and has no {what}: it can be checked, not run;"
            " point model.path at a Hugging Face directory, a .gguf file or a hub id to run it"
        )


def known_names() -> tuple[str, ...]:
    """Every name that is neither a path nor a hub id."""
    shapes = sorted(SHAPE_PREFIX + file.stem for file in _SHAPES.glob("*.json"))
    return (*BUILTIN_MODELS, *shapes)


def resolve_model(path: str, *, revision: str | None = None) -> ModelSource:
    """Finds a model and reads its configuration; no tensor and no tokenizer is read.

    path: a built-in name (fetched on first use), `shape:NAME`, a Hugging Face directory, a `.gguf` file, a shape in a
    `.json` file like Hugging Face's config.json, or a hub id `organisation/model`. revision: of a hub id.

    Raises ModelError, with near matches or what else to do, where it cannot be found, fetched or understood.
    """
    if path in BUILTIN_MODELS:
        return _gguf(path, builtin_path(BUILTIN_MODELS[path]))
    if path.startswith(SHAPE_PREFIX):
        file = _SHAPES / f"{path.removeprefix(SHAPE_PREFIX)}.json"
        if path in known_names():
            return ModelSource(path, "shape", str(file), read_hf_config(file))
        raise _unknown(path)
    local = Path(path).expanduser()
    if local.is_dir():
        return _directory(path, local)
    if local.is_file():
        return _file(path, local)
    if is_hub_id(path) and local.suffix not in (".gguf", ".json"):
        hub = HubModel(path, revision)
        directory = hub.config_directory()
        return ModelSource(path, "safetensors", str(directory), read_hf_config(directory / "config.json"), hub)
    raise _unknown(path)


def _directory(name: str, directory: Path) -> ModelSource:
    config = directory / "config.json"
    if config.is_file():
        return ModelSource(name, "safetensors", str(directory.resolve()), read_hf_config(config))
    files = sorted(file.name for file in directory.glob("*.gguf"))
    hint = (
        f"name one of its files, such as {directory / files[0]}"
        if files
        else "name the directory of a Hugging Face model"
    )
    raise ModelError(f"{directory}: no config.json in it; {hint}")


def _file(name: str, file: Path) -> ModelSource:
    match file.suffix:
        case ".gguf":
            return _gguf(name, file.resolve())
        case ".json":
            return ModelSource(name, "shape", str(file.resolve()), read_hf_config(file))
        case ".safetensors":
            raise ModelError(
                f"{file}: name the directory, {file.parent}, which must hold config.json beside the weights"
            )
    raise ModelError(
        f"{file}: a model is a directory, a .gguf file or a .json shape, not a {file.suffix or 'bare'} file"
    )


def _gguf(name: str, file: Path) -> ModelSource:
    return ModelSource(name, "gguf", str(file), gguf_decoder_config(read_gguf(file)))


def _unknown(path: str) -> ModelError:
    known = known_names()
    bare = {name.removeprefix(SHAPE_PREFIX): name for name in known}
    close = [
        bare[match]
        for match in difflib.get_close_matches(path.removeprefix(SHAPE_PREFIX).lower(), bare, n=2, cutoff=0.5)
    ]
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    looked = (
        "is no file, directory or built-in name here" if "/" in path or "." in path else "is no model that is known"
    )
    return ModelError(
        f"{path!r} {looked}: {meant}Use a built-in name ({', '.join(known)}), a Hugging Face directory, a .gguf "
        "file, a .json shape, or a hub id such as Qwen/Qwen3-0.6B"
    )
