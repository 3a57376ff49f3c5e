"""A real Chromium, which asks nobody but the dashboard for anything and has nothing to complain about."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ARTIFACTS = Path(__file__).parent / "artifacts"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SIZES = {"wide": {"width": 1280, "height": 900}, "narrow": {"width": 390, "height": 844}}
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)

Open = Callable[..., Page]

INKED = """() => [...document.querySelectorAll("main canvas")].some((canvas) => {
    if (!canvas.width || !canvas.height) return false;
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let i = 3; i < data.length; i += 4) count += data[i] > 0;
    return count > 500;
})"""


def drawn(page: Page) -> None:
    """Wait until something stands on one of the page's canvases."""
    page.wait_for_function(INKED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here drives a browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests; without one they skip, which continuous integration counts as a failure."""
    chromium = shutil.which("chromium")
    if chromium is None:
        why = "chromium is not installed (Debian package chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """`open_page(url, size="narrow", theme="dark")`: a fresh browser profile's page at an address.

    After the test: nothing was requested from anywhere else, and nothing went wrong in the page.
    """
    contexts, problems, hosts = [], list[str](), set[str]()

    def open_page(url: str, *, size: str = "wide", theme: Any = "light") -> Page:
        hosts.add(urlsplit(url).netloc)
        context = browser.new_context(viewport=SIZES[size], color_scheme=theme, reduced_motion="reduce")  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        return page

    asked: list[str] = []
    yield open_page
    for context in contexts:
        context.close()
    elsewhere = [url for url in asked if urlsplit(url).scheme != "data" and urlsplit(url).netloc not in hosts]
    assert len(asked) > 10
    assert elsewhere == []
    assert problems == []


@pytest.fixture
def photograph(request: pytest.FixtureRequest) -> Callable[[Page, str], None]:
    """Keeps a picture of a page for people to look at."""

    def photograph(page: Page, name: str) -> None:
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=str(ARTIFACTS / f"{name}.png"), full_page=True)

    return photograph
