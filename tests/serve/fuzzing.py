"""What the tests that send anything at all share: a server that keeps its answers short, and what every answer must be.

Each property tries few examples, the same ones each time. For more, drawn anew: `PHALANX_FUZZ=100 pytest --timeout 0
tests/serve/test_fuzz.py tests/serve/test_wire.py` tries a hundred times as many; what fails is told with the data.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from hypothesis import HealthCheck, settings
from tests.serve.live import Live, live, sections

from phalanx import SamplingParams

LIMIT_S = 30.0  # what is not answered by then hangs
TIMES = int(os.environ.get("PHALANX_FUZZ", "1"))
KEY = {"authorization": "Bearer fuzz"}
CANARY = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
EVERY = 25  # answers, between which the server is asked for tokens that are known


def tries(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Fuzzed:
    """A server that is sent anything. What goes wrong with it is an AssertionError."""

    def __init__(self, server: Live, http: httpx2.Client) -> None:
        self.server = server
        self.http = http
        self._answers = 0
        params = SamplingParams(max_tokens=6)
        [output] = server.run(lambda: server.engine.generate([[5, 6, 7]], params))
        self._known = list(output.completions[0].token_ids)

    def post(self, path: str, body: bytes) -> httpx2.Response:
        response = self.http.post(path, content=body)
        self.check(response.status_code, response.headers.get("content-type", ""), response.text)
        return response

    def check(self, status: int, content_type: str, text: str, *, cut_short: bool = False) -> None:
        """An answer is what was asked for, or a refusal in OpenAI's shape; after it the server goes on.

        cut_short: whether a stream was left before its end.
        """
        assert status == 200 or 400 <= status < 500, text
        if status != 200:
            assert_refusal(json.loads(text))
        elif content_type.startswith("text/event-stream"):
            *chunks, end = text.split("\n\n")
            assert end == ""
            if not cut_short:
                assert chunks.pop() == "data: [DONE]"
            for chunk in chunks:
                assert "choices" in json.loads(chunk.removeprefix("data: ")), chunk
        self._answers += 1
        if self._answers % EVERY == 0:
            self.goes_on()

    def goes_on(self) -> None:
        """The server still draws the tokens that it drew at first."""
        answer = self.http.post("/v1/completions", json=CANARY)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == self._known

    def raw(self, data: bytes) -> bytes:
        """All that comes back for bytes."""
        host, port = self.server.url.removeprefix("http://").split(":")
        found = b""
        with socket.create_connection((host, int(port)), timeout=LIMIT_S) as connection:
            try:
                connection.sendall(data)
                while part := connection.recv(1 << 16):
                    found += part
            except ConnectionError:
                pass  # the server closed while it was still being sent things
        return found


def assert_refusal(body: Any) -> None:
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in ("invalid_request_error", "not_found_error", "authentication_error")
    assert error["message"]
    assert error["param"] is None or isinstance(error["param"], str)


@contextmanager
def fuzzed_server(folder: Path) -> Iterator[Fuzzed]:
    keys = folder / "keys"
    keys.write_text("fuzz\n")
    wanted = sections(folder, api_keys=str(keys), tool_format="hermes", body_timeout_s=4.0, max_body="1MiB")
    wanted["model"]["max_length"] = 64
    wanted["engine"] |= {"max_sequences": 8, "max_waiting": 8}
    with live(wanted) as server, httpx2.Client(base_url=server.url, headers=KEY, timeout=LIMIT_S) as http:
        fuzzed = Fuzzed(server, http)
        yield fuzzed
        fuzzed.goes_on()
