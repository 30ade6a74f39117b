"""The page in a real browser: type, stream, stop, reload, compare, and a narrow screen."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

import playwright.sync_api as playwright  # pyright: ignore[reportMissingImports]

from tests.server.conftest import Live, live

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
PROMPT = "def read_config(filename):"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live("--compare") as server:
        server.read_until("ready")
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        except playwright.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server) -> Iterator[Any]:
    """The page, whose scripts may not fail and may ask nobody but the server."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: said.type == "error" and faults.append(said.text))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    playwright.expect(page.locator("#model")).to_contain_text("easyspec-demo")
    yield page
    context.close()
    assert not faults
    assert all(url.startswith((server.url, "data:")) for url in asked)


def ask(page: Any, text: str = PROMPT, tokens: int = 60) -> None:
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def finished(page: Any, seconds: float = 60) -> Any:
    """Wait for the end of an answer and return its text."""
    playwright.expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=1000 * seconds)
    return page.locator(".message.assistant .text").last


def test_an_answer_streams_and_shows_what_was_drafted(page):
    ask(page)
    playwright.expect(page.get_by_role("button", name="Stop")).to_be_visible()
    text = finished(page)
    assert len(text.inner_text()) > 60
    drafted = text.locator(".drafted")
    assert drafted.count() > 3
    assert re.search(r"60 tokens · \d\.\d\d a round", page.locator("footer").inner_text())
    assert float(page.locator("#figure-round").inner_text()) > 1
    plot = page.locator("#plot-positions svg")
    assert re.search(r"1: \d+%, 2: \d+%", plot.get_attribute("aria-label"))
    playwright.expect(page.get_by_role("status")).to_contain_text("The answer is complete.")


def test_it_can_be_stopped_and_goes_on(page):
    ask(page, tokens=230)
    page.locator(".message.assistant .drafted").first.wait_for()
    page.keyboard.press("Escape")
    text = finished(page)
    kept = text.inner_text()
    assert kept
    playwright.expect(page.locator("footer").last).to_contain_text("stopped")
    ask(page, "\nclass Reader:", tokens=8)
    finished(page)
    assert page.locator(".message").count() == 4


def test_a_reload_keeps_the_conversation_and_new_forgets_it(page):
    ask(page, tokens=20)
    before = finished(page).inner_text()
    page.reload()
    playwright.expect(page.locator("#model")).to_contain_text("easyspec-demo")
    assert page.locator(".message.assistant .text").inner_text() == before
    assert page.locator(".message.assistant .drafted").count() > 0
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".message").count() == 0
    playwright.expect(page.get_by_label("Message")).to_be_focused()


def test_plain_decoding_is_measured_on_request(page):
    ask(page, tokens=30)
    finished(page)
    page.get_by_role("button", name="Compare with plain decoding").click()
    pattern = re.compile(r"[\d.]+ tokens/s with the draft, [\d.]+ without: [\d.]+ times")
    playwright.expect(page.locator("#comparison")).to_have_text(pattern, timeout=60000)


def test_errors_are_shown_and_the_question_is_not_lost(page):
    page.get_by_label("Temperature").fill("-1")
    page.get_by_label("Temperature").blur()
    page.get_by_label("Message").fill(PROMPT)
    # A 400 is logged by the browser itself, which is no fault of the page.
    page.route(
        "**/chat/completions",
        lambda route: route.fulfill(
            status=200, body='data: {"error": {"message": "temperature is wrong"}}\n\n'
        ),
    )
    page.get_by_label("Message").press("Enter")
    playwright.expect(page.locator(".error")).to_have_text("temperature is wrong")
    playwright.expect(page.get_by_label("Message")).to_have_value(PROMPT)


SOURCE = """\
# Title

Some **bold**, *soft* and `<code>`.

- one
- <img src=x onerror=alert(1)>

1. first
2. second

> quoted

```html
<script>alert(1)</script>
```
[bad](javascript:alert(1)) [good](https://example.com)
"""

RENDER = """async (text) => {
    const { renderMarkdown } = await import("./markdown.js");
    const place = document.createElement("div");
    place.id = "rendered";
    document.body.append(place);
    renderMarkdown(place, { text, drafted: new Array(text.length).fill(false) });
}"""


def test_markdown_never_becomes_markup(page):
    page.evaluate(RENDER, SOURCE)
    place = page.locator("#rendered")
    assert place.locator("img, script").count() == 0
    assert place.locator("h3").inner_text() == "Title"
    assert place.locator("strong").inner_text() == "bold"
    assert place.locator("p > code").inner_text() == "<code>"
    assert place.locator("ul > li").all_inner_texts() == ["one", "<img src=x onerror=alert(1)>"]
    assert place.locator("ol > li").all_inner_texts() == ["first", "second"]
    assert place.locator("blockquote").inner_text() == "quoted"
    assert place.locator("pre > code").inner_text() == "<script>alert(1)</script>"
    (address,) = [link.get_attribute("href") for link in place.locator("a").all()]
    assert address == "https://example.com"


def test_on_a_narrow_screen_the_panel_is_a_page_of_its_own(page):
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    panel = page.get_by_role("complementary", name="Speculation and settings")
    playwright.expect(panel).to_be_hidden()
    toggle = page.locator("#toggle")
    toggle.click()
    playwright.expect(panel).to_be_visible()
    assert toggle.get_attribute("aria-expanded") == "true"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    toggle.click()
    playwright.expect(panel).to_be_hidden()


def test_every_control_has_a_name(page):
    """As a screen reader would say it."""
    controls = page.locator("button, input, textarea, select")
    names = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")].map(
            (control) => control.textContent.trim() || control.labels[0]?.textContent.trim()
        )"""
    )
    assert len(names) == controls.count()
    assert all(names)
