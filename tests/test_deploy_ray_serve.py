"""`configs/deploy/ray_serve.py`: what Ray Serve is given. Ray Serve itself is no dependency of the tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.types import Receive, Scope, Send
from tests.serve.live import sections

from phalanx.configs.deploy.ray_serve import Replica
from phalanx.errors import PhalanxError
from phalanx.launcher.async_engine import AsyncEngine
from phalanx.launcher.config import load_config


def plain(sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration as `build` hands it to the replicas."""
    return load_config(sections).model_dump(mode="json")


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    replica = Replica(plain(sections(tmp_path_factory.mktemp("replica"))))
    yield replica
    replica.__del__()


def ask(replica: Replica, path: str, **body: Any) -> httpx2.Response:
    """Sends a request to the replica's application, as Ray Serve does: without a server in between."""
    app = replica.__serve_build_asgi_app__()

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {}}, receive, send)  # as servers and Ray Serve do, and this client does not

    async def answer() -> httpx2.Response:
        transport = httpx2.ASGITransport(with_state)
        async with httpx2.AsyncClient(transport=transport, base_url="http://replica", timeout=60) as client:
            return await client.post(path, json=body)

    return asyncio.run(answer())


def test_a_replica_completes(replica: Replica) -> None:
    answer = ask(replica, "/v1/completions", prompt=[5, 6, 7], max_tokens=4, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_a_replica_refuses_as_the_server_does(replica: Replica) -> None:
    answer = ask(replica, "/v1/completions", prompt=[5], model="another")
    assert answer.status_code == 404
    assert "allowed: 'tiny'" in answer.json()["error"]["message"]


def test_a_replica_is_healthy_until_its_engine_fails(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    replica.check_health()
    monkeypatch.setattr(type(replica._engine), "failure", PhalanxError("rank 0 died"))
    with pytest.raises(PhalanxError, match="rank 0 died"):
        replica.check_health()


def test_keys_that_cannot_be_read_end_a_replica_and_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[AsyncEngine] = []
    close = AsyncEngine.close

    def noted(engine: AsyncEngine) -> None:
        closed.append(engine)
        close(engine)

    monkeypatch.setattr(AsyncEngine, "close", noted)
    with pytest.raises(PhalanxError, match="no keys"):
        Replica(plain(sections(tmp_path, api_keys=str(tmp_path / "no keys"))))
    assert len(closed) == 1
