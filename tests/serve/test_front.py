"""What every request passes: keys, limits, the log; and what operators look at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.serve.live import Live, live, sections
from tests.serve.streams import Asked, bytes_of

import phalanx
from phalanx.errors import PhalanxError
from phalanx.serve.keys import ApiKeys
from phalanx.serve.server import bind

BODY = {"prompt": [5, 6, 7], "max_tokens": 4}


def soon(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.01)


def idle(server: Live) -> bool:
    """Whether nothing is left of any request: no sequence, no page that is in use, no call, no task of a request."""
    [stats] = server.engine.replica_stats()
    return not (stats.running or stats.waiting or stats.pages_used or server.front.service.num_open)


def raw(server: Live, data: bytes, timeout_s: float = 10.0) -> bytes:
    """What comes back for bytes, until the server closes or has answered."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        connection.sendall(data)
        return connection.recv(65536)


# ---- what operators look at ----


def test_a_server_that_can_draw_is_healthy_and_ready(http: httpx2.Client) -> None:
    for path in ("/health", "/ready"):
        response = http.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok", "reason": None})


def test_version_and_models_are_told(http: httpx2.Client, server: Live) -> None:
    assert http.get("/version").json() == {"version": phalanx.__version__}
    [model] = http.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", server.engine.limits.max_length)


def test_the_formation_is_told(http: httpx2.Client, server: Live) -> None:
    status = http.get("/status").json()
    assert status["state"] == "running"
    assert status["layout"] == str(server.engine.plan.layout)
    assert status["ranks"] == [
        {
            "rank": 0,
            "replica": 0,
            "stage": 0,
            "shard": 0,
            "node": socket.gethostname(),
            "pid": server.engine.startup.ranks[0].pid,
            "layers": [0, 4],
        }
    ]
    assert status["replicas"][0]["pages"] == server.engine.limits.num_pages


def test_metrics_count_what_was_served(http: httpx2.Client) -> None:
    def metric(name: str) -> float:
        [line] = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
        return float(line.split()[-1])

    before = metric("phalanx_time_to_first_token_seconds_count")
    http.post("/v1/completions", json=BODY)
    assert metric("phalanx_time_to_first_token_seconds_count") == before + 1


def test_a_request_id_is_passed_through(http: httpx2.Client) -> None:
    response = http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-42"})
    assert response.headers["x-request-id"] == "mine-42"
    assert response.json()["id"] == "cmpl-mine-42"
    assert http.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_the_log_has_figures_and_no_texts(http: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "phalanx.access")
    http.post("/v1/completions", json={"prompt": "a secret", "max_tokens": 4, "stop": ["secret too"]})
    soon(lambda: len(caplog.records) > 0)
    line = json.loads(caplog.records[-1].getMessage())
    assert (line["path"], line["status"], line["prompt_tokens"], line["output_tokens"]) == (
        "/v1/completions",
        200,
        8,
        4,
    )
    assert "secret" not in caplog.text


# ---- refusals ----


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b"[]", 400, "object"),
        ("/v1/completions", b"", 400, "JSON"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "JSON"),
        ("/v1/completions", b'{"prompt": "a", "max_token": 5}', 400, "max_token: unknown"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}', 400, "max_tokens"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 100000}', 400, "fit"),
        ("/v1/completions", b'{"prompt": [97, 99999]}', 400, "99999"),
        ("/v1/completions", b'{"prompt": [97, -1]}', 400, "prompt.1"),
        ("/v1/completions", b'{"prompt": "a", "stop_token_ids": [99999]}', 400, "99999"),
        ("/v1/completions", b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "logit_bias"),
        ("/v1/completions", b'{"prompt": "a", "best_of": 4}', 400, "best_of"),
        ("/v1/completions", b'{"prompt": "a", "model": "other"}', 404, "'tiny'"),
        ("/v1/completions", b'{"prompt": "a", "guided_json": false}', 400, "JSON schema"),
        ("/v1/completions", b'{"prompt": "a", "guided_json": {"enum": []}}', 400, "JSON schema"),
        ("/v1/completions", b'{"prompt": "a", "guided_regex": "(a"}', 400, "regular expression"),
        ("/v1/completions", b'{"prompt": "a", "guided_regex": "' + b"a?" * 20_000 + b'"}', 400, "regular expression"),
        ("/tokenize", b"{}", 400, "either"),
        ("/detokenize", b'{"tokens": [99999]}', 400, "99999"),
        ("/nowhere", b"{}", 404, "/nowhere"),
        ("/health", b"{}", 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_why(http: httpx2.Client, path: str, body: bytes, status: int, words: str) -> None:
    response = http.post(path, content=body, timeout=10)
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert words in error["message"]
    assert http.post("/v1/completions", json=BODY).status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_comes(server: Live) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10485760\r\n\r\n"
    assert raw(server, head).startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_is_counted(http: httpx2.Client) -> None:
    def parts() -> Any:
        for _ in range(10):
            yield b"x" * 2**20

    with contextlib.suppress(httpx2.TransportError):  # the server may close while the client is still writing
        assert http.post("/v1/completions", content=parts()).status_code == 413
    assert http.get("/version").status_code == 200


def test_ten_megabytes_of_prompt_are_refused_at_once(http: httpx2.Client) -> None:
    assert http.post("/v1/completions", json={"prompt": "a" * 10_000_000}).status_code == 413
    assert http.post("/v1/completions", json={"prompt": "a" * 900_000}).status_code == 400


def test_a_client_that_sends_all_before_it_reads_learns_why_that_is_too_much(server: Live) -> None:
    body = json.dumps({"prompt": "a" * 10_000_000}).encode()
    asking = urllib.request.Request(f"{server.url}/v1/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asking, timeout=20)
    assert refused.value.code == 413
    assert json.load(refused.value)["error"]["code"] == "too_large"


def test_texts_and_tokens_are_each_others(http: httpx2.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == 3
    assert answer["token_strs"] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hé"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json() == {"prompt": "<user>x<assistant>"}


# ---- clients that go, or do not read ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_pages(server: Live, stream: bool) -> None:
    body = json.dumps({"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "n": 4, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    host, port = server.url.removeprefix("http://").split(":")
    aborted = server.engine.replica_stats()[0].aborted
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        soon(lambda: server.engine.replica_stats()[0].running == 4)
    soon(lambda: server.engine.replica_stats()[0].aborted == aborted + 1)
    soon(lambda: idle(server))


def test_nothing_is_left_of_requests(server: Live, http: httpx2.Client) -> None:
    http.post("/v1/completions", json=BODY)

    async def tasks() -> list[str]:
        return [str(task) for task in asyncio.all_tasks() if "_while_connected" in str(task) or "_beat" in str(task)]

    soon(lambda: idle(server))
    soon(lambda: server.run(tasks) == [])


# ---- servers of their own ----


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("keyed")
    keys = folder / "keys"
    keys.write_text("# for tests\nfirst-key\n\nsecond-key\n")
    settings = sections(folder, api_keys=str(keys), body_timeout_s=0.3)
    settings["engine"] |= {"max_sequences": 2, "max_waiting": 2}
    with live(settings) as server:
        yield server


def ask(server: Live, key: str = "first-key", **body: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.post(f"{server.url}/v1/completions", json={**BODY, **body}, headers=headers, timeout=60)


def test_a_key_opens_the_door(keyed: Live) -> None:
    assert [ask(keyed, key).status_code for key in ("first-key", "second-key")] == [200, 200]
    for key in ("", "third-key", "first-key2", "first"):
        refused = ask(keyed, key)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
    assert httpx2.get(f"{keyed.url}/status").status_code == 401
    assert {httpx2.get(keyed.url + path).status_code for path in ("/health", "/ready", "/metrics", "/")} == {200}


def test_too_much_work_is_refused_for_now(keyed: Live) -> None:
    answers: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(keyed, max_tokens=150, ignore_eos=True))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 1 <= len(refused) <= 4
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert {answer.status_code for answer in answers} <= {200, 429}


def test_more_than_ever_fits_is_no_matter_of_time(keyed: Live) -> None:
    refused = ask(keyed, n=5)
    assert refused.status_code == 400
    assert "max_waiting" in refused.json()["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for(keyed: Live) -> None:
    key = b"authorization: Bearer first-key\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + key + b"content-length: 100\r\n\r\n{"
    assert raw(keyed, head).startswith(b"HTTP/1.1 408")


def test_a_request_that_takes_too_long_ends_with_what_there_is(keyed: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = keyed.front.service.settings.model_copy(update={"request_timeout_s": 0.15})
    monkeypatch.setattr(keyed.front.service, "settings", settings)
    answers = [ask(keyed, max_tokens=200, n=2, ignore_eos=True) for _ in range(3)]
    for answer in answers:
        if answer.status_code == 200:
            reasons = {choice["finish_reason"] for choice in answer.json()["choices"]}
            assert reasons <= {"abort", "length"}
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert any(answer.status_code == 504 or "abort" in answer.text for answer in answers)
    soon(lambda: idle(keyed))


def test_a_drain_finishes_what_runs_and_refuses_the_rest(keyed: Live) -> None:
    # The last test of this server.
    answers: list[httpx2.Response] = []
    running = threading.Thread(target=lambda: answers.append(ask(keyed, max_tokens=150, ignore_eos=True, stream=True)))
    with httpx2.Client(base_url=keyed.url, headers={"authorization": "Bearer first-key"}) as client:
        client.get("/version")  # opens the connection
        running.start()
        soon(lambda: keyed.engine.replica_stats()[0].running == 1)
        keyed.loop.call_soon_threadsafe(keyed.server.drain)
        soon(lambda: keyed.front.service.draining)
        late = client.post("/v1/completions", json=BODY)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    running.join()
    assert answers[0].text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in answers[0].text
    keyed.thread.join(20)
    assert not keyed.thread.is_alive()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{keyed.url}/health")


def test_keys_are_read_again_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.serve.keys.LOOK_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = ApiKeys(file)
    name = keys.name_of("old")
    assert name is not None
    assert "old" not in name
    file.write_text("fresh\n")
    assert keys.name_of("old") is None
    assert keys.name_of("fresh") is not None
    file.unlink()
    assert keys.name_of("fresh") is not None  # a file that is being replaced locks nobody out


@pytest.mark.parametrize("text", [None, "", "# nothing\n"])
def test_a_file_without_keys_is_told_at_the_start(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(PhalanxError, match=r"serve\.api_keys"):
        ApiKeys(tmp_path / "keys")


def test_a_port_that_is_taken_is_told_at_the_start() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(PhalanxError, match="--port"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_a_client_that_reads_nothing_is_cut_off(tmp_path: Path) -> None:
    asked = Asked("/v1/completions", {"prompt": [5], "max_tokens": 240, "n": 16, "logprobs": 20, "ignore_eos": True})
    with live(sections(tmp_path, stalled_client_s=0.2)) as server, httpx2.Client(base_url=server.url) as http:
        url = httpx2.URL(server.url)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((url.host, url.port))
            client.settimeout(60)
            client.sendall(bytes_of(Asked(asked.path, {**asked.body, "stream": True})))
            soon(lambda: 'phalanx_requests_refused_total{reason="stalled"} 1.0' in http.get("/metrics").text)
            received = b"".join(iter(lambda: client.recv(1 << 20), b""))
        assert b"data: " in received
        assert b"[DONE]" not in received
        assert http.get("/health").status_code == 200
