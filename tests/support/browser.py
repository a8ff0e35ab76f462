"""A headless browser for tests: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Route, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
# Chrome writes it for every answer of 400 or more, also for one that the page expects.
REFUSED_ANSWER = "Failed to load resource: the server responded with a status of"
# What a page must not do, seen from within.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@contextmanager
def browser() -> Iterator[Browser]:
    """Start the browser. Its absence is a failure in CI, and a shown skip elsewhere."""
    if not CHROMIUM.exists():
        reason = f"no browser: install Debian's package chromium ({CHROMIUM})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as driver:
        # Tests run as root in containers, where Chromium's own sandbox cannot start.
        started = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@dataclass
class Tab:
    """A page with a record of what went wrong in it.

    Attributes:
        page: The page.
        url: The server's address.
        problems: Errors of the console and of scripts, and requests to other hosts.
        refusals: Answers of 400 or more, which a test may expect.
    """

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def open(self, view: str = "", key: str | None = None) -> Page:
        """Go to a view, such as "adapters", with a key or as the tab is."""
        if key is not None:
            self.page.add_init_script(f"sessionStorage.setItem('sera-serve.key', '{key}')")
        self.page.goto(f"{self.url}/console#/{view}")
        self.page.locator("h1").first.wait_for()
        return self.page

    def check(self, refusals: bool = False) -> None:
        """Check that nothing went wrong. `refusals` says that the test asked for answers of 400 or more."""
        assert self.problems == []
        assert self.page.evaluate("window.violations") == []
        assert refusals or self.refusals == []


@contextmanager
def tab(browser: Browser, url: str, **options: Any) -> Iterator[Tab]:
    """Open a tab with a session of its own. `options` are Playwright's of a context."""
    context: BrowserContext = browser.new_context(**options)
    context.add_init_script(WATCH)
    context.set_default_timeout(8000)
    watched = Tab(context.new_page(), url)

    def said(message: ConsoleMessage) -> None:
        if message.text.startswith(REFUSED_ANSWER):
            watched.refusals.append(message.text)
        elif message.type in ("error", "warning"):
            watched.problems.append(message.text)

    def asked(request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(url).netloc and not request.url.startswith("data:"):
            watched.problems.append(f"another host: {request.url}")

    watched.page.on("console", said)
    watched.page.on("pageerror", lambda error: watched.problems.append(str(error)))
    watched.page.on("request", asked)
    yield watched
    context.close()


def answer(page: Page, pattern: str, body: Any, status: int = 200) -> None:
    """Answer requests in place of the server: for states that take the server minutes, or another base."""

    def fulfil(route: Route) -> None:
        route.fulfill(status=status, content_type="application/json", body=json.dumps(body))

    page.route(re.compile(pattern), fulfil)


def hold(page: Page, pattern: str, method: str = "POST") -> list[Route]:
    """Leave requests without an answer, and collect them."""
    waiting: list[Route] = []
    page.route(
        re.compile(pattern),
        lambda route: waiting.append(route) if route.request.method == method else route.fallback(),
    )
    return waiting
