"""The page in a browser: a chat streams, the tree grows, a schema is kept to, on a desk and on a phone, by mouse and by key.

Needs the system's Chromium (apt install chromium) and playwright for Python; skipped where they are not, and says so.

    python -m pytest tests/test_page.py
    FOLIO_SCREENSHOTS=docs python -m pytest tests/test_page.py      # also writes the pictures in docs/
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from server_process import running
from waiting import HANG

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium here (apt install chromium): the page is not tested", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright here: the page is not tested")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]  # a root's sandbox does not start
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESK, PHONE = {"width": 1440, "height": 1240}, {"width": 390, "height": 844}
PICTURES = os.environ.get("FOLIO_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running("--max-running-requests", "6", "--max-total-tokens", "16384") as server:
        yield server.url


@contextmanager
def opened(browser, url: str, size=DESK, live=True, **options) -> Iterator:
    """The page, connected. In the end: no error has come to the console, and nobody but the server was asked."""
    errors, asked = [], []
    context = browser.new_context(viewport=size, **options)
    page = context.new_page()
    page.set_default_timeout(1000 * HANG)
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    if live:
        page.wait_for_selector("#status.live")
    yield page
    context.close()
    assert not errors
    assert all(address.startswith((url, "data:")) for address in asked)


@pytest.fixture(autouse=True)
def empty(url: str) -> None:
    httpx.post(url + "/flush_cache", timeout=HANG)


def say(page, question: str, answers: int, **fields: str) -> str:
    """Ask; -> the answer, once it is whole."""
    for name, value in fields.items():
        page.evaluate("([id, value]) => document.getElementById(id).value = value", [name, value])
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_function("n => document.querySelectorAll('.usage').length >= n", arg=answers)
    return page.locator(".message.assistant").last.inner_text()


def picture(page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / name)


def overflow(page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_a_chat_streams(browser, url):
    with opened(browser, url) as page:
        page.evaluate(
            """() => { window.lengths = []; new MutationObserver(() => {
                const text = document.querySelector('.message.assistant')?.textContent ?? '';
                if (text.length !== window.lengths.at(-1)) window.lengths.push(text.length);
            }).observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true}) }"""
        )
        text = say(page, "Tell me a story about a fox.", 1, temperature="0", max_tokens="60")
        lengths = page.evaluate("window.lengths")
        assert len(text) > 40 and len(lengths) > 5 and lengths == sorted(lengths)  # it has grown, piece by piece
        assert "tokens asked" in page.inner_text(".usage")
        page.wait_for_selector("#requests li")
        page.wait_for_function("() => document.querySelectorAll('#steps rect').length > 5")
        page.wait_for_selector("#overlap:has-text('%')")


def test_the_tree_grows_a_shared_prefix_on_the_second_question(browser, url):
    with opened(browser, url) as page:
        say(page, "Tell me a story about a fox.", 1, max_tokens="60")
        page.wait_for_selector(".node")
        assert page.locator('.node:not([data-hits="0"])').count() == 0
        say(page, "What did it do then?", 2)
        page.wait_for_selector('.node:not([data-hits="0"])')
        cached = int(page.locator(".usage").last.inner_text().split(", ")[1].split()[0])
        assert cached > 60  # of the second prompt: what the first question and its answer have left
        page.click("#fresh")
        say(page, "Tell me about a boat.", 1)
        page.wait_for_function(
            "() => document.querySelectorAll('.edge').length >= 3"
        )  # a beginning, and two that go on
        page.focus(".node")
        assert "tokens in" in page.inner_text("#detail")


def test_a_schema_is_kept_to(browser, url):
    with opened(browser, url) as page:
        page.click("summary:text('What the answer must be')")
        page.click("[data-fill=schema]")
        said = json.loads(say(page, "Who is in the story?", 1, max_tokens="100"))
        assert set(said) == {"name", "animal", "age"} and said["animal"] in ("fox", "cat", "owl")
        page.fill("#schema", "{")
        page.fill("#question", "And now?")
        page.press("#question", "Enter")
        page.wait_for_selector("[role=alert]")
        assert page.inner_text("[role=alert]").startswith("schema: ")


def test_a_tool_is_called_and_answered(browser, url):
    with opened(browser, url) as page:
        page.click("summary:text('What the answer must be')")
        page.click("[data-fill=tools]")
        page.fill("#question", "What is the weather in Oslo?")
        page.evaluate("document.getElementById('temperature').value = 0; document.getElementById('system').value = ''")
        page.press("#question", "Enter")
        page.wait_for_selector(".call input")
        name, _, arguments = page.inner_text(".call code").partition("(")
        assert name == "get_weather" and set(json.loads(arguments.removesuffix(")"))) == {"city"}
        page.fill(".call input", '{"sky": "sunny"}')
        page.press(".call input", "Enter")
        page.wait_for_function("() => document.querySelectorAll('.usage').length >= 2")


def test_it_stops_when_told_and_says_what_is_refused(browser, url):
    with opened(browser, url) as page:
        page.evaluate("document.getElementById('max_tokens').value = 1500")
        page.fill("#question", "Tell me a very long story.")
        page.press("#question", "Enter")
        page.wait_for_selector(".message.assistant")
        page.keyboard.press("Escape")
        page.wait_for_selector("#stop", state="hidden")
        page.wait_for_function("() => document.getElementById('request-count').textContent.startsWith('0 run, 0 wait')")
    with opened(browser, url) as page:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(json={"error": {"message": "no"}}, status=200))
        page.fill("#question", "Hello")
        page.press("#question", "Enter")
        page.wait_for_function("() => !document.getElementById('send').disabled")


def test_eight_at_once_run_together_and_share_their_beginning(browser, url):
    with opened(browser, url, color_scheme="light") as page:
        say(page, "Tell me a story about a fox.", 1, seed="3")
        say(page, "What did it learn?", 2)
        page.click("#eight")
        page.wait_for_function("() => document.querySelectorAll('#requests li:not(.hint):not(.ended)').length >= 4")
        page.wait_for_function("() => document.querySelectorAll('.node.locked').length >= 5")
        page.wait_for_timeout(900)
        picture(page, "page.png")
        page.wait_for_selector(".usage:has-text('Eight prompts')")
        cached = int(page.locator(".usage").last.inner_text().split(", ")[1].split()[0])
        assert cached >= 7 * 16


def test_a_phone_gets_one_column_and_the_keyboard_gets_everywhere(browser, url):
    with opened(browser, url, PHONE, color_scheme="dark", device_scale_factor=1) as page:
        say(page, "Tell me a story about a cat.", 1, max_tokens="40", seed="1")
        assert overflow(page) <= 0
        chat, engine = page.locator("#chat").bounding_box(), page.locator("#engine").bounding_box()
        assert engine["y"] >= chat["y"] + chat["height"]
        page.locator("#tree-title").scroll_into_view_if_needed()
        reached = set()
        page.evaluate("document.activeElement.blur()")
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.className.baseVal"))
        assert {"log", "question", "send", "eight", "fresh", "node"} <= reached
        page.locator("#tree-title").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('engine').scrollIntoView()")
        page.wait_for_timeout(400)
        picture(page, "page-phone.png")
    with opened(browser, url) as page:
        assert overflow(page) <= 0
        chat, engine = page.locator("#chat").bounding_box(), page.locator("#engine").bounding_box()
        assert engine["x"] >= chat["x"] + chat["width"]


def test_every_control_has_a_name(browser, url):
    with opened(browser, url) as page:
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, button, [role=img], [role=region], svg, section')]
            .filter(e => !(e.ariaLabel || e.labels?.length || e.hasAttribute('aria-labelledby')))
            .filter(e => e.localName !== 'button' || !e.textContent)
            .map(e => e.outerHTML)"""
        )
        assert not nameless


def test_it_asks_for_the_key_and_then_goes_on(browser):
    with (
        running("--api-key", "secret") as server,
        pytest.raises(
            AssertionError, match="401"
        ),  # the browser itself notes in its console that a request was refused
        opened(browser, server.url, live=False) as page,
    ):
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#status.live")
        assert say(page, "Tell me a story.", 1, max_tokens="20")
