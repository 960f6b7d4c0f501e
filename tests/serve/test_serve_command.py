"""`phalanx serve` as an operator runs it: a process, its start, its signals, its ranks."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from tests.serve.live import sections

from phalanx.cli import main

BODY = {"prompt": [5, 6, 7], "max_tokens": 4}


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    log: Path

    def post(self, **body: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}/v1/completions", json={**BODY, **body}, timeout=60)


def until(what: Any, timeout_s: float = 60.0) -> Any:
    """The first true answer."""
    end = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
    return found


@contextmanager
def served(folder: Path, *options: str, **parallel: int) -> Iterator[Served]:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**sections(folder), "parallel": parallel}))
    log = folder / "log"
    command = [
        sys.executable,
        "-c",
        "from phalanx.cli import main; main()",
        "serve",
        str(config),
        "--port",
        "0",
        *options,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output, stdout=output, text=True)
    try:

        def url() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"serving tiny at (http://\S+)", log.read_text())
            return found and found.group(1)

        yield Served(process, until(url), log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("command")


def test_it_serves_finishes_what_runs_and_leaves_nothing(folder: Path) -> None:
    with served(folder, pipeline=2) as server:
        assert server.post().status_code == 200
        pids = [rank["pid"] for rank in httpx2.get(f"{server.url}/status").json()["ranks"]]
        assert len(pids) == 2
        with httpx2.stream(
            "POST", f"{server.url}/v1/completions", json={**BODY, "max_tokens": 200, "stream": True}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
        assert server.process.wait(30) == 0
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        log = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        assert [line["status"] for line in log if line["path"] == "/v1/completions"] == [200, 200]


def test_a_rank_that_dies_is_told_and_the_server_stays_to_say_so(folder: Path) -> None:
    with served(folder, pipeline=2) as server:
        ranks = httpx2.get(f"{server.url}/status").json()["ranks"]
        assert server.post().status_code == 200
        os.kill(ranks[1]["pid"], signal.SIGKILL)

        def health() -> httpx2.Response | None:
            answer = httpx2.get(f"{server.url}/health")
            return answer if answer.status_code == 503 else None

        assert "rank 1" in until(health).json()["reason"]
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        refused = server.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failed")
        assert httpx2.get(f"{server.url}/status").json()["state"] == "failed"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_it_with_what_there_is(folder: Path) -> None:
    with served(folder) as server:
        body = {**BODY, "max_tokens": 240, "n": 8, "stream": True, "ignore_eos": True}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            until(lambda: httpx2.get(f"{server.url}/ready").status_code == 503)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"finish_reason":"abort"' in line for line in rest) >= 1
        assert server.process.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "serve.max_body=eighty"], "serve.max_body"),
        (["--set", "serve.api_keys=/nowhere/keys"], "serve.api_keys"),
        (["--set", "serve.tool_format=xml"], "hermes"),
        (["--host", "999.1.1.1"], "--host"),
    ],
)
def test_what_is_wrong_is_told_at_the_start(
    folder: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = folder / "wrong.yaml"
    config.write_text(yaml.safe_dump(sections(folder)))
    monkeypatch.setattr(sys, "argv", ["phalanx", "serve", str(config), "--port", "0", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (2, 3)
    assert words in capfd.readouterr().err
    log = logging.getLogger("phalanx.access")
    assert (log.handlers, log.level, log.propagate) == ([], logging.NOTSET, True)  # nothing is left to a closed stream
