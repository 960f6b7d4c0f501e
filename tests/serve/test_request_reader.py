"""Reading bodies of requests, here and in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import psutil
import pytest
from tests.serve.live import CHAT_TEMPLATE, Live

from phalanx.errors import PhalanxError
from phalanx.models.resolve import resolve_model
from phalanx.serve.errors import ApiError, as_api_error
from phalanx.serve.reader_process import ReaderProcess
from phalanx.serve.request_reader import Read, RequestReader
from phalanx.serve.service import SHORT_BODY

TEXT = "the quick brown fox jumps over the lazy dog; "
CHAT = {"messages": [{"role": "user", "content": TEXT}] * 8}


@pytest.fixture(scope="module")
def reader() -> RequestReader:
    tokenizer = resolve_model("smollm2-135m").tokenizer()
    return RequestReader(
        tokenizer, chat_template=CHAT_TEMPLATE, model_name="tiny", max_length=4096, vocab_size=tokenizer.vocab_size
    )


@pytest.fixture(scope="module")
def process(reader: RequestReader) -> Iterator[ReaderProcess]:
    process = ReaderProcess(reader)
    yield process
    process.close()


@pytest.mark.parametrize(
    ("method", "body"),
    [
        (RequestReader.completion, {"prompt": TEXT * 4, "logit_bias": {"5": 1.5}, "seed": 7}),
        (RequestReader.completion, {"prompt": [TEXT, "a heron"], "echo": True, "max_tokens": 0}),
        (RequestReader.completion, {"prompt": [[1, 2, 3], [4]]}),
        (RequestReader.chat, {**CHAT, "tools": [{"type": "function", "function": {"name": "look"}}]}),
        (RequestReader.tokenize, {"prompt": TEXT, "return_token_strs": True}),
        (RequestReader.tokenize, CHAT),
        (RequestReader.detokenize, {"tokens": [100, 200, 300]}),
    ],
)
def test_the_process_reads_what_the_reader_reads(
    reader: RequestReader, process: ReaderProcess, method: Read[Any], body: dict[str, Any]
) -> None:
    encoded = json.dumps(body).encode()
    assert process.read(method, encoded) == method(reader, encoded)


def test_prompts_are_in_tokens_and_texts_are_left_behind(reader: RequestReader) -> None:
    encode = resolve_model("smollm2-135m").tokenizer().encode
    read = reader.completion(json.dumps({"prompt": [TEXT, "a heron"]}).encode())
    assert read.prompts == [encode(TEXT), encode("a heron")]
    assert read.wanted.prompt == ""
    chat = reader.chat(json.dumps({"messages": [{"role": "user", "content": TEXT}]}).encode())
    assert chat.prompt == encode(f"<user>{TEXT}<assistant>", add_special_tokens=False)
    assert chat.wanted.messages == []


@pytest.mark.parametrize(
    ("method", "body"),
    [
        (RequestReader.completion, b'{"prompt": '),
        (RequestReader.completion, b'{"prompt": "a", "n": 0}'),
        (RequestReader.completion, b'{"prompt": "a", "model": "another"}'),
        (RequestReader.completion, json.dumps({"prompt": [1] * 5000}).encode()),
        (RequestReader.completion, json.dumps({"prompt": TEXT * 50_000}).encode()),
        (RequestReader.chat, b'{"messages": [{"role": "user"}]}'),
        (RequestReader.chat, json.dumps({**CHAT, "chat_template_kwargs": {"messages": 1}}).encode()),
        (RequestReader.tokenize, b"{}"),
        (RequestReader.detokenize, b'{"tokens": [99999999]}'),
    ],
)
def test_the_process_refuses_in_the_same_words(
    reader: RequestReader, process: ReaderProcess, method: Read[Any], body: bytes
) -> None:
    with pytest.raises((ApiError, PhalanxError)) as here:
        method(reader, body)
    with pytest.raises(ApiError) as there:
        process.read(method, body)
    wanted = as_api_error(here.value, 1.0)
    assert (there.value.status, there.value.message) == (wanted.status, wanted.message)
    assert (there.value.param, there.value.code) == (wanted.param, wanted.code)
    assert there.value.status in (400, 404)


def test_a_process_that_was_ended_is_replaced(process: ReaderProcess) -> None:
    body = json.dumps({"tokens": [100]}).encode()
    before = process.read(RequestReader.detokenize, body)
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert process.read(RequestReader.detokenize, body) == before
    assert process.pid not in (None, pid)


def test_a_request_that_ends_the_process_again_and_again_is_refused(process: ReaderProcess) -> None:
    done = threading.Event()

    def kill_all() -> None:
        while not done.wait(0.001):
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(ApiError, match="ended while it read this one") as found:
            process.read(RequestReader.chat, json.dumps(CHAT).encode())
    finally:
        done.set()
        killer.join()
    assert found.value.status == 503
    assert process.read(RequestReader.detokenize, b'{"tokens": [100]}')


def test_closing_ends_the_process(reader: RequestReader) -> None:
    process = ReaderProcess(reader)
    process.start()
    assert process.pid is not None
    child = psutil.Process(process.pid)
    process.close()
    assert process.pid is None
    assert not child.is_running()


def test_the_server_reads_large_requests_like_small_ones(server: Live, http: httpx2.Client) -> None:
    padding = " " * SHORT_BODY
    for path, body in (
        ("/tokenize", {"messages": [{"role": "user", "content": "a heron"}]}),
        ("/v1/completions", {"prompt": [5, 6, 7], "seed": 1, "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a heron"}], "temperature": -1}),
    ):
        small, large = (http.post(path, content=json.dumps(body) + more).json() for more in ("", padding))
        for answer in (small, large):
            answer.pop("id", None), answer.pop("created", None)
        assert small == large
    assert "temperature" in large["error"]["message"]


def test_the_event_loop_goes_on_while_a_large_request_is_read(server: Live, http: httpx2.Client) -> None:
    body = {"messages": [{"role": "user", "content": TEXT * 20}] * 900}  # under the limits of a body
    found: list[int] = []
    ended = threading.Event()

    def send() -> None:
        with httpx2.Client(base_url=server.url, timeout=60) as client:
            found.append(client.post("/tokenize", json=body).status_code)
        ended.set()

    sender = threading.Thread(target=send)
    sender.start()
    num_answered = 0
    while not ended.is_set():
        num_answered += http.get("/version").status_code == 200
    sender.join()
    assert found in ([200], [400])
    assert num_answered >= 5
