"""What `phalanx status` prints of deployments."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from phalanx.launcher.status_view import deployments_view


def shown(found: dict[str, dict[str, Any]]) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(deployments_view(found))
    return capture.get()


RUNNING = {
    "state": "running",
    "uptime_s": 61.2,
    "failure": None,
    "model": "smollm2-135m",
    "layout": "1+1 ranks, 19+11 layers",
    "ranks": [{"rank": 0, "node": "a", "pid": 1}, {"rank": 1, "node": "b", "pid": 2}],
    "replicas": [
        {
            "running": 5,
            "waiting": 2,
            "pages": 100,
            "pages_used": 40,
            "pages_kept": 30,
            "tokens_per_s": 123.45,
            "stage_busy": (0.914, 0.987),
            "requests": 9,
            "finished": 2,
            "aborted": 0,
            "prompt_tokens": 200,
            "prompt_tokens_cached": 50,
            "output_tokens": 77,
            "preemptions": 3,
            "steps": 10,
        }
    ],
}


def test_a_running_deployment_shows_its_layout_and_what_it_does() -> None:
    text = shown({"demo": RUNNING})
    for part in (
        "1+1 ranks, 19+11 layers",
        "a (1), b (1)",
        "91% 99%",
        "40 of 100, 30 kept",
        "25% of 200 tokens",
        "123.5",
    ):
        assert part in text


def test_a_failed_deployment_says_why() -> None:
    text = shown({"demo": {"state": "failed", "uptime_s": 1.0, "failure": "rank 1 died [of something]"}})
    assert "demo: rank 1 died [of something]" in text


def test_none_is_said_to_be_none() -> None:
    assert shown({}).strip() == "no deployments"
