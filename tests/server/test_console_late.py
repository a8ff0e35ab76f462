"""The console when an answer is slower than the person: newer clicks, a tab that is hidden, a server that is new."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from adapters_store import AdapterBundle, AdapterStore
from support.browser import Tab, answer, hold
from support.console_api import JOB, KEY, events, stats
from support.stub_engine import SLOW

pytestmark = pytest.mark.slow

ENCODER = {"base": {"name": "reader", "kind": "encoder"}}
SHOW_AND_HIDE = """(hidden) => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_run_that_is_stopped_before_it_begins_asks_nothing(tab: Tab) -> None:
    page = tab.open("playground")
    page.get_by_label("Prompt").fill(SLOW)
    # Between two frames: the lanes begin in the next one.
    page.evaluate(
        """async () => {
            const button = () => document.querySelector(".form-foot .primary");
            button().click();
            while (button().textContent.trim() !== "Stop") await Promise.resolve();
            button().click();
        }"""
    )
    expect(page.get_by_role("region", name="Base model")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_visible()
    tab.check()


@pytest.mark.parametrize(("view", "pattern"), [("live", "/v1/stats$"), (f"training/{JOB['id']}", "/jobs/[^/]+$")])
def test_a_tab_that_is_seen_again_asks_one_question_at_a_time(tab: Tab, view: str, pattern: str) -> None:
    page = tab.page
    waiting = hold(page, pattern, "GET")
    answer(page, r"/v1/fine_tuning/jobs/[^/]+/events", events())
    page.clock.install()
    tab.open(view)
    page.clock.run_for(100)
    for hidden in (True, False, True, False, True):
        page.evaluate(SHOW_AND_HIDE, hidden)
        page.clock.run_for(5000)
    assert len(waiting) == 1
    waiting[0].fulfill(json=stats() if view == "live" else JOB)
    expect(page.get_by_role("region", name="Memory" if view == "live" else "Loss")).to_be_visible()
    # Nobody sees it.
    page.clock.run_for(5000)
    assert len(waiting) == 1
    page.evaluate(SHOW_AND_HIDE, False)
    page.clock.run_for(5000)
    assert len(waiting) == 2
    tab.check()


def test_a_refused_question_is_not_asked_again_and_again(tab: Tab) -> None:
    page = tab.page
    asked: list[Route] = []

    def refuse(route: Route) -> None:
        asked.append(route)
        route.fulfill(status=403, json={"error": {"message": "the key has not the scope train"}})

    page.route(re.compile("/jobs/[^/]+$"), refuse)
    page.clock.install()
    tab.open(f"training/{JOB['id']}")
    page.clock.run_for(100)
    expect(page.get_by_role("alert")).to_contain_text("Not allowed")
    page.clock.run_for(10_000)
    assert len(asked) == 1
    page.get_by_role("button", name="Try again").click()
    page.clock.run_for(100)
    expect(page.get_by_role("alert")).to_contain_text("Not allowed")
    assert len(asked) == 2
    tab.check(refusals=True)


def test_a_slow_action_leaves_the_dialog_that_was_opened_meanwhile(
    tab: Tab, store: AdapterStore, writer: AdapterBundle, sorter: AdapterBundle
) -> None:
    for bundle in (writer, sorter):
        store.publish(bundle, "demo/slow")
    page = tab.page
    waiting = hold(page, "/v1/adapters/demo/slow@v1$", "DELETE")
    tab.open("adapters/demo/slow")
    page.get_by_role("button", name="Delete version 1").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Set alias").first.click()
    dialog.get_by_label("Alias").fill("stable")
    waiting[0].continue_()
    expect(page.get_by_text("Version 1 is deleted.")).to_be_visible()
    expect(page.get_by_role("heading", name="Version 1")).to_have_count(0)
    expect(dialog.get_by_label("Alias")).to_have_value("stable")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    store.delete("demo/slow")
    tab.check()


def test_an_answer_of_an_earlier_text_says_so(tab: Tab) -> None:
    page = tab.open("classify?adapter=demo/sorter")
    text, run = page.get_by_label("Text"), page.get_by_role("button", name="Classify", exact=True)
    region = page.get_by_role("region", name="demo/sorter")
    run.click()
    expect(region).to_contain_text("%")
    earlier = region.get_by_text("for an earlier text")
    expect(earlier).to_have_count(0)
    text.fill("Another text.")
    expect(earlier).to_be_visible()
    waiting = hold(page, "/v1/classify$")
    run.click()
    expect(run).to_have_attribute("aria-busy", "true")
    expect(earlier).to_be_visible()
    waiting[0].continue_()
    expect(earlier).to_have_count(0)
    tab.check()


def curve(page: Page) -> str:
    # A chart is drawn in a frame after its figures have come.
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    drawn: str = page.locator(".plot canvas").evaluate("(canvas) => canvas.toDataURL()")
    return drawn


def test_a_chart_in_other_colours_keeps_what_came_after_its_first_drawing(tab: Tab) -> None:
    page = tab.page
    all_events = events()
    answer(page, r"/v1/fine_tuning/jobs/[^/]+$", JOB)
    answer(page, r"/v1/fine_tuning/jobs/[^/]+/events", all_events | {"data": all_events["data"][-1:]})
    page.emulate_media(color_scheme="light")
    tab.open(f"training/{JOB['id']}")
    expect(page.get_by_role("region", name="Loss")).to_contain_text("training rows 1.980")
    answer(page, r"/v1/fine_tuning/jobs/[^/]+/events", all_events)
    answer(page, r"/v1/fine_tuning/jobs/[^/]+$", JOB | {"status": "cancelled"})
    expect(page.get_by_role("region", name="Facts")).to_contain_text("cancelled")
    before = curve(page)
    page.emulate_media(color_scheme="dark")
    assert curve(page) != before
    page.emulate_media(color_scheme="light")
    assert curve(page) == before
    tab.check()


def test_live_drops_what_was_before_a_server_that_only_classifies_began_again(tab: Tab) -> None:
    page = tab.page
    served: dict[str, Any] = {"tokens": {"prompt": 0, "completion": 0}, "first_token": {"count": 0, "sum": 0}}
    answers = [stats(step) | served | {"classified_inputs": 80 * step} for step in (5, 6, 7)]
    # It began again, and has served fewer.
    answers += [stats(step) | served | {"at": stats(step + 7)["at"], "classified_inputs": 80 * step} for step in (1, 2)]
    page.route(re.compile("/v1/stats$"), lambda route: route.fulfill(json=answers.pop(0)))
    answer(page, "/v1/me$", {"tenant": None, "key_id": None, "scopes": [], "needs_keys": False} | ENCODER)
    page.clock.install()
    tab.open("live")
    page.clock.run_for(100)
    figure = page.locator(".stats").get_by_text("Classified inputs").locator("..")
    for shown in ("-", "40", "40", "-", "40"):
        expect(figure).to_have_text(f"Classified inputs{shown} a second")
        page.clock.run_for(2100 if answers else 0)
    # What it never has is not there.
    expect(page.get_by_text("token", exact=False).filter(visible=True)).to_have_text(["Tokens/s", "Tokens/s"])
    tab.check()


def test_the_secret_of_a_new_key_is_not_closed_by_a_second_enter(tab: Tab) -> None:
    page = tab.page
    answer(page, r"/v1/keys$", {"keys": [KEY]})
    tab.open("keys")
    page.get_by_role("button", name="New key").click()
    page.get_by_role("dialog").get_by_label("Tenant", exact=True).fill("acme")
    answer(page, r"/v1/keys$", KEY | {"secret": "sk-sera-once"}, 201)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Copy the secret")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Copy the key now")).to_be_visible()
    tab.check()


def test_a_failure_is_told_when_its_dialog_is_gone(tab: Tab) -> None:
    page = tab.page
    waiting = hold(page, "/v1/adapters/demo/writer$", "DELETE")
    tab.open("adapters/demo/writer")
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    waiting[0].fulfill(status=409, json={"error": {"message": "it is pinned on another server"}})
    expect(page.get_by_text("It failed: it is pinned on another server")).to_be_visible()
    tab.check(refusals=True)


def test_a_page_without_a_key_says_that_the_server_needs_one_now(tab: Tab) -> None:
    page = tab.open("adapters")
    # Somebody has made the first key.
    answer(page, "/v1/quotas$", {"error": {"message": "this server needs a key", "code": "invalid_api_key"}}, 401)
    page.get_by_role("link", name="Quotas").click()
    expect(page.get_by_role("alert")).to_contain_text("The server needs a key now")
    page.get_by_label("Key", exact=True).fill("sk-sera-none")
    answer(page, "/v1/me$", {"error": {"message": "the key is unknown", "code": "invalid_api_key"}}, 401)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The key was not accepted")
    tab.check(refusals=True)
