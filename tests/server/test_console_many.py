"""The console with more adapters, keys, files and jobs than one page of a list, and what a person left there."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, Route, expect

from adapters_store import AdapterBundle, AdapterStore
from support.browser import Tab, answer
from support.console_api import JOB, KEY, stats

pytestmark = pytest.mark.slow

ADAPTERS = 160
LONG_TENANT = "t" * 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, writer: AdapterBundle) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("many") / "store")
    for number in range(ADAPTERS):
        store.publish(writer, f"demo/writer-{number:03d}")
    return store


def answer_pages(page: Page, pattern: str, items: list[dict[str, Any]]) -> None:
    """Answer a list of OpenAI's form, as the server does: `limit` items after the one that `after` names."""

    def fulfil(route: Route) -> None:
        query = parse_qs(urlsplit(route.request.url).query)
        ids = [item["id"] for item in items]
        start = ids.index(query["after"][0]) + 1 if "after" in query else 0
        data = items[start : start + int(query["limit"][0])]
        body = {"object": "list", "data": data, "has_more": start + len(data) < len(items)}
        route.fulfill(content_type="application/json", body=json.dumps(body))

    page.route(re.compile(pattern), fulfil)


def files(number: int) -> list[dict[str, Any]]:
    return [
        {"id": f"file-{index}", "object": "file", "filename": f"rows-{index}.jsonl", "bytes": 10, "created_at": 1}
        for index in reversed(range(number))
    ]


def test_enter_takes_no_adapter_of_what_was_typed_before(tab: Tab) -> None:
    page = tab.open("playground")
    box = page.get_by_role("combobox", name="Adapters")
    box.click()
    page.get_by_role("option", name="demo/writer-000").wait_for()
    page.route(re.compile(r"/v1/adapters\?"), lambda route: None)
    box.fill("no-such-name")
    page.keyboard.press("Enter")
    expect(page.get_by_role("option")).to_have_text(["Looking..."])
    expect(page.locator(".chip")).to_have_count(0)
    # What the search before has found is taken at once, where it is what was typed.
    box.fill("writer-15")
    page.keyboard.press("Enter")
    expect(page.locator(".chip")).to_have_text(["demo/writer-150"])
    tab.check()


def test_a_view_follows_its_address(tab: Tab) -> None:
    page = tab.open("adapters")
    page.get_by_label("Name").fill("writer-15")
    expect(page.locator("tbody tr")).to_have_count(10)
    page.get_by_role("link", name="Adapters", exact=True).click()
    expect(page.get_by_label("Name")).to_have_value("")
    expect(page.locator("tbody tr")).to_have_count(50)
    page.go_back()
    expect(page.get_by_label("Name")).to_have_value("writer-15")
    expect(page.locator("tbody tr")).to_have_count(10)
    for view in ("playground", "classify"):
        page = tab.open(f"{view}?adapter=demo/writer-001")
        expect(page.locator(".chip")).to_have_text(["demo/writer-001"])
        page.goto(f"{tab.url}/console#/{view}?adapter=demo/writer-002")
        expect(page.locator(".chip")).to_have_text(["demo/writer-002"])
        # The menu's link names none. What is chosen stays, and the address names it.
        page.get_by_role("link", name=view.title(), exact=True).click()
        expect(page).to_have_url(re.compile("writer-002"))
        expect(page.locator(".chip")).to_have_text(["demo/writer-002"])
    tab.check()


def test_the_way_back_leads_to_where_the_list_was_left(tab: Tab) -> None:
    page = tab.open("adapters")
    rows = page.locator("tbody tr")
    for shown in (100, 150):
        page.get_by_role("button", name="Show more").click()
        expect(rows).to_have_count(shown)
    page.get_by_role("link", name="demo/writer-140").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("demo/writer-140")
    page.go_back()
    expect(rows).to_have_count(150)
    expect(page.get_by_role("link", name="demo/writer-140")).to_be_in_viewport()
    # Whoever comes by the menu begins at the top.
    page.get_by_role("link", name="Quotas").click()
    page.get_by_role("link", name="Adapters", exact=True).click()
    expect(rows).to_have_count(50)
    tab.check()


def test_more_jobs_and_files_are_shown_when_asked_for(tab: Tab) -> None:
    jobs = [JOB | {"id": f"ftjob-{number}"} for number in range(120)]
    answer_pages(tab.page, r"/v1/fine_tuning/jobs\?", jobs)
    answer_pages(tab.page, r"/v1/files\?", files(120))
    for view in ("training", "training/files"):
        page = tab.open(view)
        for shown in (50, 100):
            expect(page.locator("tbody tr")).to_have_count(shown)
            expect(page.locator(".more")).to_contain_text(f"Only the newest {shown} are shown.")
            page.get_by_role("button", name="Show more").click()
        expect(page.locator("tbody tr")).to_have_count(120)
        expect(page.get_by_role("button", name="Show more")).to_have_count(0)
    expect(page.get_by_text("completion, or text with label, labels, score or spans")).to_be_visible()
    tab.check()


def test_a_new_job_takes_a_file_that_is_older_than_its_list(tab: Tab) -> None:
    answer_pages(tab.page, r"/v1/files\?", files(120))
    page = tab.open("training/new?file=file-3")
    expect(page.get_by_text("The newest 100.")).to_be_visible()
    field = page.get_by_label("Rows to train on")
    expect(field).to_have_value("file-3")
    page.get_by_label("Suffix").fill("support")
    page.get_by_role("link", name="files", exact=True).click()
    expect(page.locator("tbody tr")).to_have_count(50)
    # What was typed is there again, and the file that is chosen now.
    page.get_by_role("link", name="Train on it").first.click()
    expect(page.get_by_label("Suffix")).to_have_value("support")
    expect(field).to_have_value("file-119")
    page.route(re.compile("/v1/fine_tuning/jobs$"), lambda route: route.fulfill(json=JOB))
    answer(page, r"/v1/fine_tuning/jobs/", JOB | {"data": [], "has_more": False})
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(JOB["adapter"]["name"])
    expect(tab.open("training/new").get_by_label("Suffix")).to_have_value("")
    tab.check()


@pytest.mark.parametrize("width", [390, 1280])
def test_many_keys_are_counted_and_shown_a_part_at_a_time(tab: Tab, width: int) -> None:
    made = [KEY | {"id": f"{number:012d}", "tenant": LONG_TENANT if number % 3 else "acme"} for number in range(3000)]
    answer(tab.page, r"/v1/keys$", {"keys": made})
    tab.page.set_viewport_size({"width": width, "height": 900})
    page = tab.open("keys")
    expect(page.get_by_text("The newest 100 of 3,000 keys")).to_be_visible()
    expect(page.locator("tbody th").first).to_contain_text("000000002999")
    assert page.evaluate("document.querySelectorAll('*').length") < 3000
    box = page.locator(".table-box")
    assert box.evaluate("(box) => box.scrollWidth <= box.clientWidth"), "a part of the table is out of sight"
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("tbody tr")).to_have_count(200)
    page.get_by_label("Tenant").fill("ACME")
    expect(page.get_by_text("The newest 200 of 1,000 keys")).to_be_visible()
    tab.check()


def test_only_what_is_read_again_is_tried_again_after_a_lost_connection(tab: Tab) -> None:
    page = tab.open("upload")
    page.route("**/v1/adapters", lambda route: route.abort())
    page.locator("input[type=file]").set_input_files({"name": "a.tar", "mimeType": "", "buffer": b"a"})
    page.get_by_label("Name").fill("demo/a")
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_role("alert")).to_contain_text("does not send it again by itself")
    expect(page.get_by_label("Name")).to_have_value("demo/a")


def test_live_keeps_no_more_of_each_adapter_than_it_shows(tab: Tab) -> None:
    page = tab.page
    polls = [0]

    def fulfil(route: Route) -> None:
        polls[0] += 1
        used = {f"demo/{number:05d}": {"requests": polls[0], "tokens": number} for number in range(3000)}
        route.fulfill(json=stats(polls[0]) | {"by_adapter": used})

    page.clock.install()
    page.route(re.compile("/v1/stats$"), fulfil)
    tab.open("live")
    expect(page.get_by_text("The busiest 8 of 3000.")).to_be_visible()
    session = page.context.new_cdp_session(page)

    def heap_after(number: int) -> float:
        while polls[0] < number:
            with page.expect_response(re.compile("/v1/stats$")):
                page.clock.run_for(2000)
        session.send("HeapProfiler.collectGarbage")
        return float(session.send("Runtime.getHeapUsage")["usedSize"])

    # Another twenty samples with all adapters would be three megabytes or more.
    before = heap_after(20)
    assert heap_after(40) - before < 1.5e6
    tab.check()


def test_an_address_that_comes_as_soon_as_the_view_is_there_is_followed(tab: Tab) -> None:
    page = tab.open("quotas")
    page.evaluate(
        """() => new MutationObserver((_changes, observer) => {
            if (!document.querySelector(".chip")) return;
            observer.disconnect();
            location.hash = "#/playground?adapter=demo/writer-002";
        }).observe(document.body, { subtree: true, childList: true })"""
    )
    page.goto(f"{tab.url}/console#/playground?adapter=demo/writer-001")
    expect(page.locator(".chip")).to_have_text(["demo/writer-002"])
    expect(page).to_have_url(re.compile("writer-002"))
    tab.check()


def test_five_lanes_are_the_most(tab: Tab) -> None:
    names = [f"demo/writer-{number:03d}" for number in range(6)]
    page = tab.open("playground?" + "&".join(f"adapter={name}" for name in names))
    base, lanes = page.get_by_label("With the base model"), page.locator("section.lane")
    expect(page.locator(".chip")).to_have_text(names[:4])
    base.uncheck()
    box = page.get_by_role("combobox", name="Adapters")
    box.fill("writer-004")
    page.get_by_role("option", name=names[4]).click()
    expect(lanes).to_have_count(5)
    # A sixth stream would take the last of the browser's connections.
    expect(base).to_be_disabled()
    expect(box).to_be_disabled()
    # All five are in the address, which somebody may come back to.
    page.get_by_role("link", name="Quotas").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Quotas")
    page.go_back()
    expect(page.locator(".chip")).to_have_text(names[:5])
    page.get_by_role("button", name=f"Remove {names[0]}").click()
    base.check()
    expect(lanes).to_have_count(5)
    tab.check()
