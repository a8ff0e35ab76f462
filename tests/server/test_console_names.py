"""The console with names that JavaScript has for itself, and with requests that fail beside a list that is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Route, expect

from adapters_store import AdapterBundle, AdapterStore
from support.browser import Tab, answer
from support.console_api import stats

pytestmark = pytest.mark.slow

# An object has it, whatever was put into the object; and it is a name of the right form.
NAME = "constructor"
BUSY: dict[str, Any] = {"error": {"message": "the disk is busy; try again", "type": "", "param": None, "code": "busy"}}


def test_a_tenant_may_have_the_name_of_a_part_of_every_object(tab: Tab) -> None:
    rounds = iter(range(1000))

    def fulfil(route: Route) -> None:
        step = next(rounds)
        # From the second answer on.
        new = {NAME: {"requests": 4 * step, "tokens": 0}} if step else {}
        route.fulfill(json=stats(step) | {"by_tenant": stats(step)["by_tenant"] | new})

    tab.page.route(re.compile(r"/v1/stats$"), fulfil)
    tab.page.clock.install()
    page = tab.open("live")
    tenants = page.get_by_role("region", name="Tenants")
    expect(tenants).to_contain_text("acme")
    with page.expect_response(re.compile("/v1/stats$")):
        page.clock.run_for(2100)
    expect(tenants.locator("tbody tr")).to_have_text([re.compile(rf"^{NAME}2\.00$"), re.compile("^acme0\\.5")])
    tab.check()


@pytest.mark.parametrize("view", [NAME, f"classify?adapter={NAME}"])
def test_an_address_with_such_a_name_is_no_view_and_no_answer(tab: Tab, view: str) -> None:
    page = tab.open(view)
    expect(page.get_by_role("heading", level=1)).to_have_text("Adapters" if view == NAME else "Classify")
    expect(page.locator(".answer")).to_have_count(0)
    tab.check()


def test_such_an_alias_stood_for_no_version(tab: Tab, store: AdapterStore, writer: AdapterBundle) -> None:
    store.publish(writer, "demo/named")
    page = tab.open("adapters/demo/named")
    page.get_by_role("button", name="Set alias").first.click()
    page.get_by_role("dialog").get_by_label("Alias", exact=True).fill(NAME)
    expect(page.get_by_text(f"demo/named@{NAME}")).to_be_visible()
    expect(page.get_by_text("It moves from")).to_have_count(0)
    tab.check()


@pytest.fixture
def versions(store: AdapterStore, writer: AdapterBundle) -> Iterator[str]:
    store.publish(writer, "demo/old")
    yield "demo/old"
    store.delete("demo/old")


def test_a_page_of_versions_that_fails_is_told_beside_those_that_are_there(tab: Tab, versions: str) -> None:
    def fulfil(route: Route) -> None:
        if "before=" in route.request.url:
            route.fulfill(status=503, json=BUSY)
            return
        found = route.fetch().json()
        # As many as the page asks for, and older ones.
        rows = [found["versions"][0] | {"version": number} for number in range(300, 200, -1)]
        route.fulfill(json=found | {"versions": rows, "next": 201})

    tab.page.route(re.compile(r"/versions\?"), fulfil)
    page = tab.open(f"adapters/{versions}")
    page.get_by_role("button", name="Show older versions").click()
    expect(page.get_by_role("alert")).to_contain_text("The disk is busy")
    expect(page.get_by_role("heading", name="Version 300")).to_be_visible()
    tab.page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", name="Version 1")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    tab.check(refusals=True)


def test_each_request_that_fails_on_an_adapter_s_page_is_told(tab: Tab, versions: str) -> None:
    answer(tab.page, r"/v1/stats$", BUSY, 503)
    page = tab.open(f"adapters/{versions}")
    expect(page.get_by_role("alert")).to_contain_text("The disk is busy")
    # Its number depends on the tests before: the numbers of an adapter that was deleted are not used again.
    expect(page.get_by_role("heading", name=re.compile(r"^Version \d+$"))).to_be_visible()
    tab.page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    tab.check(refusals=True)


def test_a_share_that_fails_is_told_beside_a_list_that_failed(tab: Tab, versions: str) -> None:
    answer(tab.page, r"/shares$", BUSY, 503)
    page = tab.open(f"adapters/{versions}")
    shares = page.get_by_role("region", name="Shared with")
    expect(shares.get_by_role("alert")).to_contain_text("The disk is busy")
    shares.get_by_label("Tenant").fill("No Tenant")
    shares.get_by_role("button", name="Share", exact=True).click()
    expect(shares.get_by_role("alert")).to_have_count(2)
    tab.page.unroute_all()
    shares.get_by_role("button", name="Try again").click()
    expect(shares.get_by_role("alert")).to_have_count(1)
    tab.check(refusals=True)


def test_a_quota_that_is_neither_set_nor_taken_back_has_both_reasons(tab: Tab, client: httpx.Client) -> None:
    client.put("/v1/quotas/demo", json={"adapters": 4}).raise_for_status()
    page = tab.open("quotas")
    page.get_by_role("button", name="Change the quota of demo").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Adapters", exact=True).fill("ten")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("adapters")
    answer(tab.page, r"/v1/quotas/demo$", BUSY, 503)
    dialog.get_by_role("button", name="Take back").click()
    expect(dialog.get_by_role("alert").last).to_contain_text("The disk is busy")
    client.delete("/v1/quotas/demo").raise_for_status()
    tab.check(refusals=True)
