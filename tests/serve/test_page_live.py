"""The page over a real server, its ranks and a real model: a prompt is sent, and text arrives."""

from __future__ import annotations

from pathlib import Path

from tests.serve.browser import PageView, complaints, eventually, open_browser
from tests.serve.live import live, sections


def test_a_prompt_is_answered_by_the_formation_that_is_drawn(tmp_path: Path) -> None:
    made = sections(tmp_path)
    made["parallel"] = {"stages": [{"layers": 1, "tensor": 2}, {"tensor": 1}]}
    with open_browser() as browser, live(made) as server:
        page = PageView(browser, f"{server.url}/")
        eventually(browser, lambda: page.texts("#state") == ["running"])
        assert len(page.all(".stage")) == 2
        for setting, value in (("#max-tokens", "40"), ("#temperature", "0")):
            page.one(setting).clear()
            page.one(setting).send_keys(value)
        page.send("hello")
        page.wait_until_idle()
        eventually(browser, lambda: server.engine.replica_stats()[0].finished == 1)
        assert "".join(page.texts(".answer .text"))
        assert page.texts(".error") == []
        assert complaints(browser) == []
