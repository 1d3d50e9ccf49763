"""One Chromium and one server for all tests of the page. Without a Chromium they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from driving import Server, Watched, start

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("fastapi", reason="serving is not installed: pip install 'blip2[serve]'")
    started = start(tmp_path_factory.mktemp("page"))
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, then the page is tested")
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with driver.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield launched
        launched.close()


@pytest.fixture
def watched(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """The page, opened; at the end nothing may have gone wrong that the test did not expect.

    A parameter {"color_scheme": ..., "viewport": ...} shapes the browser's window.
    """
    server.slow(0)
    shape = {"viewport": {"width": 1280, "height": 860}} | getattr(request, "param", {})
    context = browser.new_context(**shape, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(60_000)
    watched_page = Watched(page)
    page.on(
        "console", lambda m: watched_page.wrong.append(m.text) if m.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: watched_page.wrong.append(str(error)))

    def check(request: Any) -> None:
        if not request.url.startswith((server.address, "blob:", "data:")):
            watched_page.wrong.append(f"request to another host: {request.url}")

    page.on("request", check)
    page.goto(server.address)
    yield watched_page
    context.close()
    assert not watched_page.wrong
