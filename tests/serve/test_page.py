"""The page at `/`, in a real browser: the chat box, the picture of the formation, and what the page may not do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from selenium.webdriver import Chrome, Keys
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tests.serve.browser import PageView, complaints, eventually, open_browser, requested_urls
from tests.serve.page_server import Answer, PageServer, status_of

from phalanx.serve.page_files import page_routes

MARKUP = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with open_browser() as chrome:
        # Bars take their new width at once.
        reduced = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", reduced)
        yield chrome


@pytest.fixture(scope="module")
def standing_server() -> Iterator[PageServer]:
    with PageServer(status_of((3, 1))) as server:
        yield server


@pytest.fixture
def server(standing_server: PageServer) -> PageServer:
    standing_server.begin(status_of((3, 1)))
    return standing_server


@pytest.fixture
def keyed_server() -> Iterator[PageServer]:
    """One that wants a key. Its origin is its own, and so is what the browser stores for it."""
    with PageServer(status_of((3, 1))) as server:
        server.key = "sk-right"
        yield server


class Page(PageView):
    """The page of a server whose answers the test gives."""

    def __init__(self, chrome: Chrome, server: PageServer) -> None:
        super().__init__(chrome, server.url)
        self.server = server

    def ask(self, text: str) -> Answer:
        """Sends a prompt; the answer that the server is to give."""
        self.send(text)
        return self.server.answer()

    def answered(self, text: str, answer: str) -> Answer:
        given = self.ask(text)
        given.say(answer, "stop")
        given.end()
        self.wait_until_idle()
        return given

    def next_status(self, status: dict[str, Any]) -> None:
        """The server says this from now on, and the page has shown it."""
        self.server.status = status
        polls = self.server.polls

        def polled_twice() -> bool:  # a second request comes after the answer to the first has been shown
            self.ask_status()
            return self.server.polls >= polls + 2

        eventually(self.chrome, polled_twice)


@pytest.fixture
def page(browser: Chrome, server: PageServer) -> Iterator[Page]:
    opened = Page(browser, server)
    eventually(browser, lambda: opened.all(".stage"))
    yield opened
    assert complaints(browser) == []


# The files


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=page_routes()))


@pytest.mark.parametrize(
    ("path", "content_type"),
    [("/", "text/html"), ("/page/page.css", "text/css"), ("/page/page.js", "text/javascript")],
)
def test_each_file_comes_with_its_type_and_leave_for_nothing_but_its_own_server(
    client: TestClient, path: str, content_type: str
) -> None:
    answer = client.get(path)
    assert answer.headers["content-type"] == f"{content_type}; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "form-action 'none'"} <= set(policy)
    assert not [rule for rule in policy if "unsafe" in rule or "*" in rule or "http" in rule]


def test_a_browser_that_has_a_file_already_is_told_so_and_asks_every_time(client: TestClient) -> None:
    first = client.get("/page/page.js")
    again = client.get("/page/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == again.headers["cache-control"] == "no-cache"
    other = client.get("/page/page.css", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200


@pytest.mark.parametrize("path", ["/page/missing.js", "/page/", "/page/../page_files.py", "/page/%2e%2e/page_files.py"])
def test_nothing_is_served_beside_the_files_of_the_page(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


# The chat


def test_text_is_on_the_page_while_the_rest_is_still_to_come(page: Page) -> None:
    answer = page.ask("Hi")
    page.wait_for(".user .text", "Hi")
    for piece, whole in (("The sky", "The sky"), (" is", "The sky is"), (" blue.\n", "The sky is blue.\n")):
        answer.say(piece)
        page.wait_for(".answer .text", whole)
    assert not answer.closed.is_set()
    assert page.shown("#stop") and not page.shown("#send")
    answer.end()
    page.wait_until_idle()
    page.wait_for(".answer .text", "The sky is blue.\n")


def test_an_answer_tells_its_time_rate_and_tokens(page: Page) -> None:
    answer = page.ask("Hi")
    answer.say("one")
    page.wait_for(".answer .text", "one")
    answer.say(" two", "length")
    answer.end(prompt_tokens=1234, completion_tokens=56)
    page.wait_until_idle()
    (figures,) = page.texts(".answer .figures")
    expected = (
        r"first token after [\d.,]+ m?s · [\d.,]+ tokens/s · 1,234 prompt \+ 56 output tokens"
        r" · ended at the limit of tokens"
    )
    assert re.fullmatch(expected, figures), figures


def test_the_rate_is_that_of_the_tokens_after_the_first(page: Page) -> None:
    page.chrome.execute_script("performance.now = () => window.time_ms ?? 1000")
    answer = page.ask("Hi")
    page.chrome.execute_script("window.time_ms = 1250")
    answer.say("one")
    page.wait_for(".answer .text", "one")
    page.chrome.execute_script("window.time_ms = 3250")
    answer.say(" and ten others", "stop")
    answer.end(completion_tokens=11)
    page.wait_until_idle()
    page.wait_for(".answer .figures", "first token after 250 ms · 5.0 tokens/s · 7 prompt + 11 output tokens")


def test_a_request_has_the_served_model_the_settings_and_wants_usage(page: Page) -> None:
    for field, value in (("#temperature", "0.3"), ("#max-tokens", "17")):
        page.one(field).clear()
        page.one(field).send_keys(value)
    answer = page.answered("Hi", "Hello")
    assert answer.path == "/v1/chat/completions"
    assert answer.body == {
        "model": "served-name",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.3,
        "max_tokens": 17,
    }


def test_an_empty_setting_is_left_to_the_server(page: Page) -> None:
    page.one("#temperature").clear()
    page.one("#max-tokens").clear()
    assert page.answered("Hi", "Hello").body.keys() == {"model", "messages", "stream", "stream_options"}


def test_the_next_prompt_carries_the_conversation(page: Page) -> None:
    page.answered("one", "first")
    assert page.answered("two", "second").body["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
    ]


def test_a_new_chat_forgets_and_ends_what_runs(page: Page) -> None:
    page.answered("one", "first")
    running = page.ask("two")
    running.say("begun")
    page.one("#new").click()
    assert running.closed.wait(20)
    page.wait_for(".message")
    assert len(page.answered("three", "third").body["messages"]) == 1


def test_stop_ends_the_request_and_keeps_the_text(page: Page) -> None:
    answer = page.ask("Count")
    answer.say("one two")
    page.wait_for(".answer .text", "one two")
    page.one("#stop").click()
    assert answer.closed.wait(20), "the server still streams"
    page.wait_until_idle()
    assert page.texts(".answer .figures")[0].endswith("stopped")
    assert not page.all(".error")
    assert page.answered("go on", "three").body["messages"][1] == {"role": "assistant", "content": "one two"}


def test_enter_sends_and_shift_enter_makes_a_line(page: Page) -> None:
    page.write("one" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "two")
    assert page.one("#prompt").get_property("value") == "one\ntwo"
    assert not page.server.asked
    page.write(Keys.ENTER)
    assert page.server.answer().body["messages"][0]["content"] == "one\ntwo"
    assert page.one("#prompt").get_property("value") == ""


def test_nothing_is_sent_while_an_answer_runs(page: Page) -> None:
    answer = page.ask("one")
    page.write("two" + Keys.ENTER)
    answer.say("first")
    page.wait_for(".answer .text", "first")
    assert not page.server.asked
    assert page.one("#prompt").get_property("value") == "two"


def test_a_refusal_is_shown_in_the_servers_words_and_the_prompt_comes_back(page: Page) -> None:
    page.server.refusals = [(400, "max_tokens is 9; allowed: 1 to 8")]
    page.write("Hi" + Keys.ENTER)
    page.wait_for(".error", "max_tokens is 9; allowed: 1 to 8")
    assert page.one("#prompt").get_property("value") == "Hi"
    # What failed is no part of the conversation.
    assert len(page.answered("", "Hello").body["messages"]) == 1


def test_an_error_in_the_middle_of_an_answer_is_shown_below_its_text(page: Page) -> None:
    answer = page.ask("Hi")
    answer.say("Hel")
    answer.event({"error": {"message": "rank 3 has died"}})
    page.wait_for(".error", "rank 3 has died")
    page.wait_for(".answer .text", "Hel")


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(page: Page) -> None:
    answer = page.ask("Hi")
    answer.say("Hel")
    answer.raw(None)
    page.wait_for(".error", "The server does not answer: the answer broke off.")


def test_without_a_chat_template_the_page_says_so_and_lets_the_model_go_on_with_the_text(page: Page) -> None:
    page.server.refusals = [(400, "the model has no chat template; send a plain prompt")]
    answer = page.answered("Once upon", " a time")
    assert (answer.path, answer.body["prompt"]) == ("/v1/completions", "Once upon")
    page.wait_for(".answer .text", " a time")
    assert "no chat template" in page.texts(".note")[0]
    again = page.answered("there", " was")
    assert (again.path, again.body["prompt"]) == ("/v1/completions", "Once upon\n a time\nthere")
    assert len(page.all(".note")) == 1
    assert not page.all(".error")


def test_a_template_that_refuses_the_messages_is_an_error(page: Page) -> None:
    page.server.refusals = [(400, "the model's chat template refuses these messages: roles must alternate")]
    page.write("Hi" + Keys.ENTER)
    page.wait_for(".error", "the model's chat template refuses these messages: roles must alternate")
    assert not page.all(".note")


def test_markup_from_the_model_stays_text(page: Page) -> None:
    page.answered(MARKUP, MARKUP)
    page.wait_for(".text", MARKUP, MARKUP)
    assert not page.all("#log img, #log b")
    assert page.chrome.title == "Phalanx · tiny"


LINES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=5)
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
CHUNKED = """
const [chunks, done] = arguments;
const body = new ReadableStream({ start(control) {
  for (const chunk of chunks) control.enqueue(Uint8Array.from(chunk));
  control.close();
} });
import("/page/sse.js").then(async ({ eventData }) => {
  const found = [];
  for await (const data of eventData(body)) found.push(data);
  done(found);
}).catch((error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def any_page(browser: Chrome, standing_server: PageServer) -> Chrome:
    browser.get(standing_server.url)
    return browser


@given(
    events=st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=5), min_size=1, max_size=2)
    ),
    line_end=LINE_ENDS,
    data=st.data(),
)
def test_events_are_read_the_same_however_the_bytes_are_cut(
    any_page: Chrome, events: list[list[str]], line_end: str, data: st.DataObject
) -> None:
    lines = [line for event in events for line in (": beat", *(f"data: {part}" for part in event), "")]
    body = "".join(line + line_end for line in lines).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(body)), max_size=8)))
    chunks = [list(body[begin:end]) for begin, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert any_page.execute_async_script(CHUNKED, chunks) == ["\n".join(event) for event in events]


# The formation

LAYOUTS = {
    "1x1": [(1,)],
    "2x2": [(2, 2)],
    "3+1": [(3, 1)],
    "8 stages": [(1,) * 8],
    "4 replicas": [(2, 2)] * 4,
    "8 ranks a stage": [(8, 8)],
}


@pytest.fixture(params=[400, 1200])
def width(request: pytest.FixtureRequest, browser: Chrome) -> Iterator[int]:
    """Of the window, in pixels."""
    size = {"width": request.param, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield request.param
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_rank_is_drawn_in_its_stage_and_nothing_is_wider_than_the_window(
    browser: Chrome, server: PageServer, layout: list[tuple[int, ...]], width: int
) -> None:
    server.status = status_of(*layout, model="a-model-with-a-long-name/" * 3)
    for rank in server.status["ranks"]:
        rank["node"] = "node-with-a-rather-long-name.cluster.example"
    page = Page(browser, server)
    eventually(browser, lambda: page.all(".stage"))
    drawn = browser.execute_script(
        """const inside = (box, selector) => [...box.querySelectorAll(selector)];
        return inside(document, ".replica").map((replica) => inside(replica, ".stage").map(
            (stage) => inside(stage, ".rank .number").map((number) => Number(number.textContent))))"""
    )
    too_wide = browser.execute_script(
        """return [...document.querySelectorAll("main, main *")].filter((found) =>
            found.getBoundingClientRect().right > innerWidth + 1).map((found) => found.className)"""
    )
    numbers = iter(range(99))
    assert drawn == [[[next(numbers) for _ in range(size)] for size in stages] for stages in layout]
    assert browser.execute_script("return innerWidth") == width
    assert too_wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_stage_tells_its_layers_and_each_ranks_node_and_process(page: Page) -> None:
    assert page.texts(".stage > .quiet") == ["layers 0–9", "layers 10–19"]
    assert page.texts(".rank .node") == ["node-0", "node-0", "node-1", "node-1"]
    assert page.texts(".rank .quiet") == ["pid 4000", "pid 4001", "pid 4002", "pid 4003"]


def test_bars_and_figures_follow_what_the_server_says(page: Page) -> None:
    page.wait_for(".share", "50 % busy", "50 % busy")
    page.wait_for(".now dd", "5", "2", "123")
    assert page.widths(".stage .meter i") == [0.5, 0.5]
    assert page.widths(".pages .meter i") == [0.4, 0.1]
    status = status_of((3, 1))
    status["replicas"][0] |= {
        "stage_busy": [0.9, 0.25],
        "pages_used": 700,
        "pages_kept": 0,
        "running": 64,
        "waiting": 1200,
        "tokens_per_s": 7.25,
    }
    before = page.all(".stage")
    page.next_status(status)
    page.wait_for(".share", "90 % busy", "25 % busy")
    page.wait_for(".legend span", "700 pages used", "0 kept", "of 1,000")
    page.wait_for(".now dd", "64", "1,200", "7.3")
    assert page.widths(".stage .meter i") == [0.9, 0.25]
    assert page.widths(".pages .meter i") == [0.7, 0.0]
    assert [found.get_attribute("aria-valuenow") for found in page.all(".stage .meter")] == ["90", "25"]
    assert page.all(".stage") == before, "the boxes were drawn anew"


def test_the_curve_has_a_point_for_each_second_of_the_last_minute(page: Page) -> None:
    def points() -> list[list[float]]:
        pairs = (page.one(".sparkline polyline").get_attribute("points") or "").split()
        return [[float(number) for number in pair.split(",")] for pair in pairs]

    page.next_status(page.server.status)
    eventually(page.chrome, lambda: len(points()) >= 2)
    assert points()[-1][0] == 120 and points()[0][0] < 120
    page.chrome.execute_script("const now = performance.now.bind(performance); performance.now = () => now() + 61000")
    page.ask_status()
    eventually(page.chrome, lambda: len(points()) == 1)


def test_a_formation_that_was_started_again_is_drawn_anew(page: Page) -> None:
    page.next_status(status_of((1, 1), (1, 1)))
    page.wait_for(".replica h3", "Replica 0", "Replica 1")
    page.wait_for(".rank .number", "0", "1", "2", "3")


def test_a_replica_without_figures_still_shows_its_ranks(page: Page) -> None:
    page.next_status(status_of((1,), (2,)) | {"replicas": [status_of((1,))["replicas"][0], None]})
    page.wait_for(".replica.absent .rank .number", "1", "2")
    assert not page.shown(".replica.absent .now")
    assert page.texts("#state") == ["running"]


@pytest.mark.parametrize(("state", "says"), [("draining", "refuses what is new"), ("failed", "formation has failed")])
def test_the_state_is_told_in_words(page: Page, state: str, says: str) -> None:
    page.next_status(status_of((3, 1), state=state))
    page.wait_for("#state", state)
    assert page.shown("#notice") and says in page.texts("#notice")[0]
    page.next_status(status_of((3, 1)))
    page.wait_for("#state", "running")
    assert not page.shown("#notice")


def test_markup_in_the_status_stays_text(page: Page) -> None:
    status = status_of((1,), model=MARKUP, layout=MARKUP, state=MARKUP)
    status["ranks"][0] |= {"node": MARKUP, "pid": MARKUP}
    page.next_status(status)
    page.wait_for("#model, #layout, #state, .rank .node", MARKUP, MARKUP, MARKUP, MARKUP)
    assert not page.all("img, #formation img, main b b")
    assert page.chrome.title == f"Phalanx · {MARKUP}"


def test_a_server_that_is_gone_is_told_of_and_found_again(browser: Chrome) -> None:
    with PageServer(status_of((1,))) as server:
        page = Page(browser, server)
        page.wait_for("#state", "running")
    page.wait_for("#state", "no answer")
    assert "The server does not answer" in page.texts("#notice")[0]
    assert page.all(".stale .stage"), "the last picture stays, dimmed"
    with PageServer(status_of((2, 2)), port=server.port):
        page.wait_for("#state", "running")
        page.wait_for(".rank .number", "0", "1", "2", "3")
        assert not page.shown("#notice") and not page.all(".stale")


def test_a_status_that_cannot_be_read_is_told_of_and_not_the_end(page: Page) -> None:
    page.next_status({"ranks": 3})
    page.wait_for("#state", "no answer")
    assert "What /status says cannot be shown" in page.texts("#notice")[0]
    page.next_status(status_of((1,)))
    page.wait_for("#state", "running")


def test_a_page_that_nobody_sees_does_not_ask(page: Page) -> None:
    script = """Object.defineProperty(document, "hidden", { get: () => arguments[0], configurable: true });
        document.dispatchEvent(new Event("visibilitychange"))"""
    page.chrome.execute_script(script.replace("arguments[0]", "true"))
    page.chrome.execute_async_script("setTimeout(arguments[0], 200)")  # a request that was on its way is counted
    polls = page.server.polls
    page.chrome.execute_async_script("setTimeout(arguments[0], 1500)")
    assert page.server.polls == polls
    page.chrome.execute_script(script.replace("arguments[0]", "false"))
    eventually(page.chrome, lambda: page.server.polls > polls)


# The key


def test_a_server_that_wants_a_key_is_given_it_and_nothing_else_keeps_it(
    browser: Chrome, keyed_server: PageServer
) -> None:
    page = Page(browser, keyed_server)
    eventually(browser, lambda: page.shown("#key"))
    page.wait_for("#key-reason", "an API key is needed")
    page.one("#key-value").send_keys("sk-wrong" + Keys.ENTER)
    page.wait_for("#key-reason", "this key is not known")
    eventually(browser, lambda: page.shown("#key"))
    page.one("#key-value").send_keys("sk-right" + Keys.ENTER)
    page.wait_for("#state", "running")
    assert not page.shown("#key")
    page.answered("Hi", "Hello")
    kept = browser.execute_script("return [Object.values(sessionStorage), Object.keys(localStorage), document.cookie]")
    assert kept == [["sk-right"], [], ""]
    assert "sk-right" not in browser.current_url


def test_a_prompt_that_met_a_401_is_sent_once_the_key_is_there(browser: Chrome, keyed_server: PageServer) -> None:
    page = Page(browser, keyed_server)
    eventually(browser, lambda: page.shown("#key"))
    page.write("Hi" + Keys.ENTER)
    page.one("#key-value").send_keys("sk-right" + Keys.ENTER)
    assert keyed_server.answer().body["messages"] == [{"role": "user", "content": "Hi"}]


def test_stop_works_while_the_page_waits_for_a_key(browser: Chrome, keyed_server: PageServer) -> None:
    page = Page(browser, keyed_server)
    eventually(browser, lambda: page.shown("#key"))
    page.write("Hi" + Keys.ENTER)
    page.one("#stop").click()
    page.wait_for(".answer .figures", "stopped")


# The whole page


def test_nothing_leaves_the_server_and_nothing_complains(browser: Chrome, server: PageServer) -> None:
    browser.get("about:blank")
    requested_urls(browser), complaints(browser)  # those of tests before
    page = Page(browser, server)
    page.answered("Hi", "Hello")
    page.next_status(status_of((2, 2)))
    urls = requested_urls(browser)
    foreign = [url for url in urls if not url.startswith((page.server.url, "data:"))]
    assert foreign == []
    paths = {url.removeprefix(page.server.url) for url in urls}
    assert {"", "page/page.js", "page/page.css", "status", "v1/chat/completions"} <= paths
    icon = page.one("link[rel=icon]").get_attribute("href") or ""
    assert icon.startswith("data:"), "a browser would ask for /favicon.ico"
    assert complaints(browser) == []


def test_every_control_has_a_name_and_the_answer_is_read_out(page: Page) -> None:
    page.chrome.execute_script("document.querySelectorAll('[hidden]').forEach((found) => { found.hidden = false; })")
    controls = page.all("button, input, textarea, [role=meter]")
    assert len(controls) >= 10
    assert [found.get_attribute("outerHTML") for found in controls if not found.accessible_name] == []
    assert page.one("#prompt").accessible_name == "Message"
    log = page.one("#log")
    assert (log.aria_role, log.get_attribute("aria-live")) == ("log", "polite")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Chrome, server: PageServer, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page = Page(browser, server)
    eventually(browser, lambda: page.all(".stage"))
    colours: dict[str, str] = browser.execute_script(
        """const style = getComputedStyle(document.documentElement);
        return Object.fromEntries(arguments[0].map((name) => [name, style.getPropertyValue("--" + name).trim()]))""",
        ["ground", "surface", "ink", "quiet", "bronze", "on-bronze", "good", "warn", "bad"],
    )
    pairs = [(text, back) for text in ("ink", "quiet", "bronze") for back in ("ground", "surface")]
    pairs += [("on-bronze", "bronze"), *((state, "surface") for state in ("good", "warn", "bad"))]
    contrasts = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: ratio for pair, ratio in contrasts.items() if ratio < 4.5} == {}  # WCAG 2, level AA


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
