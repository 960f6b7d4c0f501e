"""Models by their id on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from phalanx.errors import ModelError
from phalanx.models.safetensors_index import INDEX_FILE, SINGLE_FILE

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_WEIGHT_FILES = (SINGLE_FILE, "model-*.safetensors", INDEX_FILE)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `organisation/model`."""
    return _ID.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub. revision: a branch, tag or commit, or None for the main branch.

    What is fetched is kept in huggingface_hub's own cache, and found there when the hub cannot be reached. Each method
    fetches only the files it names, and raises ModelError, with what to do, where they cannot be had.
    """

    repository: str
    revision: str | None = None

    def config_directory(self) -> Path:
        return self._fetch(_CONFIG_FILES, needs=("config.json",))

    def tokenizer_directory(self) -> Path:
        return self._fetch(_CONFIG_FILES + _TOKENIZER_FILES)

    def weights_directory(self) -> Path:
        return self._fetch(_CONFIG_FILES + _WEIGHT_FILES, needs=(SINGLE_FILE, INDEX_FILE))

    def _fetch(self, patterns: tuple[str, ...], needs: tuple[str, ...] = ()) -> Path:
        from huggingface_hub import errors, snapshot_download

        at = f" at revision {self.revision}" if self.revision else ""
        remedy = "or point model.path at a local copy (a Hugging Face directory or a .gguf file)"
        try:
            directory = Path(snapshot_download(self.repository, revision=self.revision, allow_patterns=list(patterns)))
        except errors.GatedRepoError as error:
            raise ModelError(
                f"the hub's {self.repository} is gated: accept its terms on its page and log in with `hf auth login`,"
                f" {remedy}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ModelError(
                f"the hub's {self.repository} has no revision {self.revision!r}; name another, {remedy}"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ModelError(
                f"the hub has no model {self.repository!r}, or it is private: check its name, log in with `hf auth"
                f" login`, {remedy}"
            ) from error
        except (
            Exception
        ) as error:  # no network, offline, a bad answer: types differ between releases of the hub's client
            cause = str(error).split("\n", 1)[0]
            raise ModelError(
                f"{self.repository}{at} could not be fetched from the hub and is not in its cache"
                f" ({type(error).__name__}: {cause}); check the network and HF_HUB_OFFLINE, {remedy}"
            ) from error
        if needs and not any((directory / name).is_file() for name in needs):
            raise ModelError(
                f"the hub's {self.repository}{at} has no {' or '.join(needs)}, so it is no model that can be run; of a"
                " repository of GGUF files, download one and point model.path at it"
            )
        return directory
