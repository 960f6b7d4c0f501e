"""Sets up `.venv` with the `phalanx` command in it. Called by `make setup`; needs Python 3.11 and nothing else.

A stamp in the environment holds a digest of all that decides its contents, so that a second call returns at once. An
interrupted call leaves no stamp, and the next one goes on from what is there.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "phalanx-setup.json"
LOG = VENV / "phalanx-setup.log"
CONSTRAINTS = ROOT / "constraints.txt"
NATIVE = (ROOT / "CMakeLists.txt", ROOT / "src" / "native.cpp", *sorted(ROOT.glob("*/csrc/*.[ch]pp")))
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve(), *NATIVE)
NUM_STEPS = 4
TERMINAL_BEAT_S, LOG_BEAT_S = 0.5, 15.0
DETAIL_WIDTH = 70
MIRROR_HINT = "pip looks where its own settings say (`pip config list`); a mirror goes into its index-url."


class SetupError(Exception):
    """A step that failed: the cause, then the remedy."""


class Attempt(NamedTuple):
    """One way to get PyTorch. arguments: of `pip install`. fallible: whether a failure leads to the next way."""

    label: str
    arguments: tuple[str, ...]
    fallible: bool = False


class Status:
    """One step on the terminal: its number, its title, what it is at and the seconds it took."""

    def __init__(self, number: int, title: str) -> None:
        self._title = f"[{number}/{NUM_STEPS}] {title}"
        self._detail = ""
        self._result = "done"
        self._start = time.monotonic()
        self._live = sys.stdout.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def at(self, detail: str) -> None:
        self._detail = detail

    def result(self, text: str) -> None:
        self._result = text

    def note(self, text: str) -> None:
        self._write(f"      {text}", "\n")

    def __enter__(self) -> Self:
        if not self._live:
            print(self._title, flush=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        result = self._result if kind is None else "failed"
        self._write(f"{self._title}: {result} ({self._seconds():.1f} s)", "\n")

    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def _beat(self) -> None:
        while not self._stop.wait(TERMINAL_BEAT_S if self._live else LOG_BEAT_S):
            self._write(f"{self._title} {self._seconds():.0f} s {self._detail}", "" if self._live else "\n")

    def _write(self, text: str, end: str) -> None:
        if self._live:
            text = "\r\033[K" + (text if end else text[: shutil.get_terminal_size().columns - 1])
        print(text, end=end, flush=True)


def run(status: Status, command: Sequence[str | Path]) -> tuple[bool, str]:
    """Runs a command, its output into the log and its current line into the status. Returns success and last lines."""
    tail: deque[str] = deque(maxlen=25)
    with LOG.open("a") as log:
        log.write("$ " + " ".join(map(str, command)) + "\n")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=_environment()
        )
        try:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                tail.append(line.rstrip())
                if not line.startswith((" ", "WARNING", "DEPRECATION", "[notice]")):
                    status.at(line.strip()[:DETAIL_WIDTH])
        except BaseException:
            process.terminate()
            raise
        finally:
            process.wait()
    return process.returncode == 0, "\n".join(f"    {line}" for line in tail)


def pip_install(status: Status, *arguments: str, hint: str = MIRROR_HINT) -> None:
    done, output = run(status, [VENV_PYTHON, "-m", "pip", "install", "--progress-bar", "off", *arguments])
    if not done:
        raise SetupError(f"`pip install {' '.join(arguments)}` failed:\n{output}\n{hint}\nThe whole log: {LOG}")


def _environment() -> dict[str, str]:
    """The caller's environment without what would send packages past the new one."""
    dropped = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_CONSTRAINT", "PIP_REQUIREMENT")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0"}


def sees_gpu() -> bool:
    """Whether this machine has an NVIDIA driver. Its file answers at once; without it (WSL) the tool is asked."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def pinned(package: str, constraints: str) -> str:
    """The version that a constraints file pins a package to."""
    for line in constraints.splitlines():
        name, separator, version = line.partition("==")
        if separator and name.strip() == package:
            return version.split(";")[0].strip()
    raise SetupError(f"{CONSTRAINTS.name} does not pin {package}; add a line `{package}==<version>`")


def torch_attempts(version: str, gpu: bool, index: str | None) -> list[Attempt]:
    """Ways to get PyTorch, in order of trial.

    Without a GPU the CPU build is wanted: from pip's own find-links (the trial costs a second), then from the index the
    user names, and only then the default build, which brings gigabytes of CUDA packages. With a GPU, `===` keeps pip
    from taking a CPU build at hand, which it holds to be the newer version.
    """
    exact = "===" if gpu else "=="
    default = Attempt("the default build", ("-c", str(CONSTRAINTS), f"torch{exact}{version}"))
    named = [Attempt(f"from {index}", ("--index-url", index, "--no-deps", f"torch=={version}"))] if index else [default]
    if gpu:
        return named
    local = Attempt("the CPU build from pip's find-links", ("--no-index", "--no-deps", f"torch=={version}+cpu"), True)
    return [local, *named]


def digest(settings: Sequence[str], inputs: Sequence[Path] = INPUTS) -> str:
    """Of all that decides what is in the environment."""
    total = hashlib.sha256("\0".join(settings).encode())
    for path in inputs:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def read_stamp() -> dict[str, str]:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def make_environment(status: Status) -> None:
    if VENV.exists() and not _usable():
        if not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
            raise SetupError(f"{VENV} is in the way and is no virtual environment; move it and run this again")
        status.note(f"{VENV.name} does not fit this Python or this place: making it anew")
        shutil.rmtree(VENV)
    if not VENV.exists():
        VENV.mkdir()
        # --without-pip always works; where ensurepip is missing (Debian packs it apart) a plain venv fails half-made.
        done, output = run(status, [_base_python(), "-m", "venv", "--without-pip", VENV])
        if not done:
            raise SetupError(f"cannot make a virtual environment:\n{output}")
    if not run(status, [VENV_PYTHON, "-m", "pip", "--version"])[0]:
        _bootstrap_pip(status)
    status.result(f"{VENV.name} with Python {_venv_version()}")


def _usable() -> bool:
    """Whether the environment that stands is of this Python's version and was made for this place."""
    if read_stamp().get("root", str(ROOT)) != str(ROOT):
        return False  # its commands point to where it was copied from
    return _venv_version().rpartition(".")[0] == f"{sys.version_info.major}.{sys.version_info.minor}"


def _venv_version() -> str:
    """Of the Python in the environment, as `3.11.7`; empty where there is none that runs."""
    program = "import sys; print(*sys.version_info[:3], sep='.')"
    try:
        answer = subprocess.run([VENV_PYTHON, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return ""
    return answer.stdout.strip()


def _base_python() -> str:
    """The Python outside of any environment: what the environment is made from, and where to look for a pip."""
    return getattr(sys, "_base_executable", None) or sys.executable


def _bootstrap_pip(status: Status) -> None:
    if run(status, [VENV_PYTHON, "-m", "ensurepip", "--upgrade", "--default-pip"])[0]:
        return
    status.note("this Python has no ensurepip: using its pip to install one")
    done, output = run(status, [_base_python(), "-m", "pip", "--python", VENV_PYTHON, "install", "pip"])
    if not done:
        raise SetupError(
            f"{_base_python()} has neither ensurepip nor a pip that works:\n{output}\n"
            "Install one of them (on Debian and Ubuntu the package python3-venv or python3-pip) and run this again."
        )


def install_torch(status: Status, version: str, gpu: bool, index: str | None) -> None:
    for attempt in torch_attempts(version, gpu, index):
        status.at(attempt.label)
        if not attempt.fallible:
            pip_install(status, *attempt.arguments)
        elif not run(status, [VENV_PYTHON, "-m", "pip", "install", *attempt.arguments])[0]:
            status.note(f"not to be had: {attempt.label}")
            if not index:
                status.note("taking the default build, on Linux gigabytes with CUDA; TORCH_INDEX=<CPU index> avoids it")
            continue
        status.result(f"{version}, {attempt.label}")
        return


def check(status: Status, gpu: bool, index: str | None) -> None:
    """Imports what was installed, and holds it against what this machine asked for."""
    program = (
        "import phalanx, torch; from phalanx.native import find_native; "
        "print(torch.__version__, torch.version.cuda or '', find_native().told, sep='|')"
    )
    answer = subprocess.run(
        [VENV_PYTHON, "-c", program], capture_output=True, text=True, check=False, env=_environment()
    )
    command = VENV / "bin" / "phalanx"
    if answer.returncode or not command.exists():
        raise SetupError(f"the environment does not work:\n{answer.stderr}\nRemove {VENV} and run this again.")
    version, cuda, native = answer.stdout.strip().split("|")
    if gpu and not cuda and not index:
        raise SetupError(f"a GPU is seen, but PyTorch {version} is a CPU build; remove {VENV} and run this again")
    status.note(native)
    status.result(f"torch {version}, {'CUDA ' + cuda if cuda else 'CPU'}; command {command.relative_to(ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up .venv with the phalanx command in it.")
    parser.add_argument("--torch-index", default="", help="package index to take PyTorch from")
    index = parser.parse_args().torch_index.strip() or None
    gpu = sees_gpu()
    settings = [f"{sys.version_info[:2]}", f"gpu={gpu}", f"index={index}"]
    wanted = {"root": str(ROOT), "digest": digest(settings)}
    if read_stamp() == wanted and (VENV / "bin" / "phalanx").exists():
        print(f"{VENV.name} is up to date")
        return 0
    started = time.monotonic()
    extras = ["ray", "test", "lint"] + (["gpu"] if gpu else [])
    print(f"Setting up {VENV.name} ({'GPU' if gpu else 'no GPU'} seen), log in {LOG.relative_to(ROOT)}", flush=True)
    try:
        with Status(1, "Python environment") as status:
            make_environment(status)
            STAMP.unlink(missing_ok=True)
        with Status(2, "PyTorch") as status:
            install_torch(status, pinned("torch", CONSTRAINTS.read_text()), gpu, index)
        with Status(3, f"Phalanx, editable, with {', '.join(extras)}") as status:
            pip_install(status, "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{','.join(extras)}]")
        with Status(4, "Check") as status:
            check(status, gpu, index)
    except SetupError as error:
        print(f"\nsetup: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again and it goes on from here", file=sys.stderr)
        return 130
    STAMP.write_text(json.dumps(wanted) + "\n")
    print(f"Ready in {time.monotonic() - started:.0f} s. Next: make demo, or . .venv/bin/activate && phalanx --help")
    return 0


if __name__ == "__main__":
    # Two calls at once, such as `make test` beside `make demo`, take turns; the second finds the stamp of the first.
    with Path(__file__).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: another set-up of this checkout is running; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        sys.exit(main())
