"""A real browser for tests of the page: Debian's chromium, without a window."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

T = TypeVar("T")

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # which a container seldom allows; the tests open no page but their own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1200,900",
)
PATIENCE_S = 20.0


@contextmanager
def open_browser() -> Iterator[Chrome]:
    """A browser with a profile of its own. Skips the test where chromium or its driver is missing."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver (on Debian the packages chromium and chromium-driver)")
    options = ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="phalanx-browser-", ignore_cleanup_errors=True) as profile:
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        chrome = Chrome(options=options, service=Service(driver))  # a given path: selenium looks for no driver itself
        try:
            yield chrome
        finally:
            chrome.quit()


def eventually(chrome: Chrome, condition: Callable[[], T], what: str = "") -> T:
    """The first true value that the condition gives. TimeoutException, which says `what`, after `PATIENCE_S`."""
    return WebDriverWait(chrome, PATIENCE_S, poll_frequency=0.03).until(lambda _: condition(), what)


class PageView:
    """Phalanx's page at a URL, as its user sees it."""

    def __init__(self, chrome: Chrome, url: str) -> None:
        self.chrome = chrome
        chrome.get(url)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements("css selector", selector)

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element("css selector", selector)

    def shown(self, selector: str) -> bool:
        return any(found.is_displayed() for found in self.all(selector))

    def texts(self, selector: str) -> list[str]:
        """Of all elements that the selector finds; taken in one step, since the page may change while it is read."""
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.textContent)"
        return list(self.chrome.execute_script(script, selector))

    def wait_for(self, selector: str, *texts: str) -> None:
        """Until these are the texts of all the elements."""
        eventually(self.chrome, lambda: self.texts(selector) == list(texts), f"{selector} never was {texts}")

    def widths(self, selector: str) -> list[float]:
        """Of each bar, as a share of what it lies in, in hundredths."""
        script = """return [...document.querySelectorAll(arguments[0])].map((bar) =>
            bar.getBoundingClientRect().width / bar.parentElement.getBoundingClientRect().width)"""
        return [round(width, 2) for width in self.chrome.execute_script(script, selector)]

    def write(self, text: str) -> None:
        self.one("#prompt").send_keys(text)

    def send(self, text: str) -> None:
        """A prompt, once no other is being answered."""
        self.wait_until_idle()
        self.write(text + Keys.ENTER)

    def wait_until_idle(self) -> None:
        eventually(self.chrome, lambda: self.shown("#send"), "the answer never ended")

    def ask_status(self) -> None:
        """Has the page ask now, where it would have waited: as if it had just come to be seen."""
        self.chrome.execute_script("document.dispatchEvent(new Event('visibilitychange'))")


def requested_urls(chrome: Chrome) -> list[str]:
    """What the browser's pages asked for since the last call, the pages themselves among it."""
    events = [json.loads(entry["message"])["message"] for entry in _log(chrome, "performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def complaints(chrome: Chrome) -> list[str]:
    """Warnings and errors on the console since the last call; not those of requests that the server refused."""
    return [
        entry["message"]
        for entry in _log(chrome, "browser")
        if entry["level"] in {"SEVERE", "WARNING"} and entry["source"] != "network"
    ]


def _log(chrome: Chrome, kind: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = chrome.get_log(kind)  # type: ignore[no-untyped-call]
    return entries
