"""The page of `tinyllama serve` in a real Chromium."""

import shutil

import pytest
from chat_helpers import answer_text, prompt_text, served
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: type tools/system.sh chromium"
)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def server():
    with served("--temperature", 0, "--max-new-tokens", 4000) as (address, _):
        yield address


@pytest.fixture
def page(browser, server):
    """The page, at the width of a telephone, whose console must stay silent."""
    context = browser.new_context(viewport={"width": 400, "height": 700})
    opened = context.new_page()
    problems = []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    requests = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(server)
    yield opened
    context.close()
    assert problems == []
    assert all(url.startswith((server, "data:")) for url in requests)


def send(page, text):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_a_message_is_answered_as_the_model_does(page):
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens").fill("12")
    page.get_by_text("Settings").click()
    send(page, "Hello")
    first = answer_text(prompt_text("Hello"), 12)
    expect(page.locator(".assistant")).to_have_text(first, timeout=60_000)
    expect(page.locator(".user")).to_have_text("Hello")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    send(page, "<b>And?</b>")
    second = answer_text(prompt_text("Hello", first, "<b>And?</b>"), 12)
    expect(page.locator(".assistant").nth(1)).to_have_text(second, timeout=60_000)
    expect(page.locator(".user").nth(1)).to_have_text("<b>And?</b>")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)


def test_an_answer_is_shown_while_it_is_made_and_can_be_stopped(page, server):
    send(page, "Hello")
    page.get_by_role("button", name="Stop").wait_for()
    expect(page.locator(".assistant")).not_to_be_empty(timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    text = page.locator(".assistant").inner_text()
    whole = answer_text(prompt_text("Hello"), 4000)
    assert 0 < len(text) < len(whole)
    page.wait_for_timeout(200)
    assert page.locator(".assistant").inner_text() == text


def test_a_refused_request_is_shown(page):
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("1")
    page.get_by_label("System prompt").fill("fox " * 1500)
    # Not a status of 400, for which the browser itself writes a line.
    body = 'data: {"error": {"message": "the request took too long"}}\n\ndata: [DONE]\n\n'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )
    send(page, "Hello")
    expect(page.locator(".problem")).to_have_text("the request took too long")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_telephone(browser, server, scheme, tmp_path):
    context = browser.new_context(viewport={"width": 400, "height": 700}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server)
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens").fill("30")
    send(page, "word" * 200)
    expect(page.locator(".assistant")).not_to_be_empty(timeout=60_000)
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[scheme]
    page.screenshot(path=f"/tmp/page-{scheme}.png")
    context.close()
