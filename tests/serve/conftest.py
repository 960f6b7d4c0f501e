"""One server for the tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import openai
import pytest
from tests.serve.live import Live, live, sections


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(sections(tmp_path_factory.mktemp("served"))) as server:
        yield server


@pytest.fixture(scope="session")
def http(server: Live) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
