"""The console on bases that do not generate: each view says why it is not for them, and what to do."""

from __future__ import annotations

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Route, expect

from support.browser import Tab, answer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["encoder", "vision", "dual"])
def test_a_view_says_why_the_base_is_not_for_it(tab: Tab, kind: str) -> None:
    me = httpx.get(f"{tab.url}/v1/me").json()
    answer(tab.page, r"/v1/me$", me | {"base": {"name": "other", "kind": kind}})
    page = tab.open("playground")
    expect(page.get_by_role("heading", level=2, name="The base other does not generate")).to_be_visible()
    expect(page.get_by_role("button", name="Run")).to_have_count(0)
    page = tab.open("classify")
    if kind == "encoder":
        expect(page.get_by_label("Text")).to_be_visible()
        expect(tab.open("training/new").get_by_label("Rows to train on")).to_be_visible()
        return
    page.get_by_role("heading", level=2, name="The base other classifies images").wait_for()
    expect(page.locator("main")).to_contain_text(f"-F image=@photo.jpg {tab.url}/v1/classify")
    page.get_by_role("link", name="adapters of task image-classify").click()
    expect(page.get_by_label("Task")).to_have_value("image-classify")
    for view in ("training", "training/new", "training/files"):
        page = tab.open(view)
        expect(page.locator("main")).to_contain_text("with the command train_adapter, then upload it")
        expect(page.get_by_role("link", name="New job")).to_have_count(0)
        assert not Axe().run(page).response["violations"]
    tab.check()


def test_the_command_has_the_address_of_a_server_behind_a_proxy(tab: Tab) -> None:
    page = tab.page

    def forward(route: Route) -> None:
        route.fulfill(response=route.fetch(url=route.request.url.replace("/models/", "/", 1)))

    me = httpx.get(f"{tab.url}/v1/me").json()
    page.route("**/models/**", forward)
    answer(page, r"/v1/me$", me | {"base": {"name": "other", "kind": "vision"}})
    page.goto(f"{tab.url}/models/console#/classify")
    expect(page.locator("main")).to_contain_text(f"-F image=@photo.jpg {tab.url}/models/v1/classify")
    tab.check()
