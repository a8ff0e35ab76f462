"""The console in a browser: each view, errors, a long stream, tabs with keys, a keyboard, the dark, a phone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from support import browser as browsers
from support.browser import Tab, answer
from support.console_api import JOB, KEY, events, stats
from support.factories import random_adapter
from support.stub_engine import FAILS_LATER, LONG, LONG_TEXTS, OVERLOADED, SLOW, TEXTS, StubEngine

pytestmark = pytest.mark.slow

VIEWS = ["adapters", "adapters/demo/writer", "playground", "classify", "upload", "training", "training/files"]
VIEWS += ["training/new", f"training/{JOB['id']}", "live", "keys", "quotas"]
ANSWER = "".join(TEXTS)
# As long as a name may be, without a place to break it.
LONG_NAME = "t" * 64 + "/" + "n" * 64
BUSY = {"requests": 10**7, "tokens": 10**9, "classified_inputs": 0}


@pytest.fixture
def tab(browser: Browser, url: str) -> Iterator[Tab]:
    with browsers.tab(browser, url) as opened:
        stub_routes(opened.page)
        yield opened


def stub_routes(page: Page) -> None:
    answer(page, r"/v1/fine_tuning/jobs\?", {"object": "list", "data": [JOB], "has_more": False})
    answer(page, r"/v1/fine_tuning/jobs/[^/]+$", JOB)
    answer(page, r"/v1/fine_tuning/jobs/[^/]+/events", events())


@pytest.fixture(scope="module", autouse=True)
def story(store: AdapterStore, base: FrozenBase) -> None:
    """An adapter with two versions, whose training recorded a loss."""
    for version, loss in ((1, 1.25), (2, 0.625)):
        config = SeraConfig(8, 4, 16, ("q_proj",))
        training = {"metrics": {"eval_loss": loss}, "description": "Tells a story.", "rows": {"train": 40}}
        store.publish(random_adapter(base, config, seed=version, training=training), "demo/story")


def lane(page: Page, title: str) -> Any:
    return page.get_by_role("region", name=title, exact=True)


def pick(page: Page, label: str, name: str) -> None:
    page.get_by_role("combobox", name=label).fill(name.split("/")[1])
    page.get_by_role("option", name=name).wait_for()
    page.keyboard.press("Enter")


def test_adapters_are_listed_found_and_opened(tab: Tab) -> None:
    page = tab.open("adapters")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("demo/sorter")
    page.get_by_label("Name").fill("WRIT")
    expect(rows).to_have_count(1)
    expect(page.get_by_role("status").filter(has_text="1 adapter of all 3")).to_be_visible()
    assert "text=WRIT" in page.url
    page.get_by_label("Split").fill("3")
    expect(page.get_by_role("heading", name="No adapter matches")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Task").select_option("classify")
    expect(rows).to_have_count(1)
    page.get_by_role("link", name="demo/sorter").click()
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page.get_by_role("region", name="Facts")).to_contain_text("spam, ham")
    # Two tabs are told apart.
    expect(page).to_have_title("demo/sorter - Adapters - sera-serve")
    page.go_back()
    expect(page.get_by_label("Task")).to_have_value("classify")
    tab.check()


def test_versions_are_rolled_back_after_a_question(tab: Tab, store: AdapterStore) -> None:
    page = tab.open("adapters/demo/story")
    cards = page.get_by_role("listitem").filter(has=page.get_by_role("heading", level=3))
    expect(cards).to_have_count(2)
    expect(cards.nth(1)).to_contain_text("eval loss1.250")
    told = cards.nth(1).get_by_text("rows40 train")
    expect(told).to_be_hidden()
    cards.nth(1).get_by_text("How it was trained").click()
    expect(told).to_be_visible()
    back = cards.nth(1).get_by_role("button", name="Roll back to this")
    back.click()
    dialog = page.get_by_role("dialog", name="Serve version 1?")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(back).to_be_focused()
    assert store.resolve("demo/story").version == 2
    back.click()
    page.get_by_role("button", name="Serve it").click()
    expect(page.get_by_text("latest now points to version 1.")).to_be_visible()
    assert store.resolve("demo/story").version == 1
    expect(cards.nth(1)).to_contain_text("latest")
    # An alias of one's own, moved and removed.
    cards.nth(0).get_by_role("button", name="Set alias").click()
    page.get_by_role("dialog").get_by_label("Alias").fill("stable")
    page.keyboard.press("Enter")
    expect(cards.nth(0)).to_contain_text("stable")
    assert store.resolve("demo/story@stable").version == 2
    page.get_by_role("button", name="Remove alias stable").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(page.get_by_text("stable is removed.")).to_be_visible()
    tab.check()


def test_an_adapter_is_pinned_and_shared(tab: Tab, stub: StubEngine, writer: AdapterBundle) -> None:
    page = tab.open("adapters/demo/writer")
    expect(page.get_by_role("region", name="Facts")).to_contain_text("Wherestore")
    page.get_by_role("button", name="Pin").click()
    expect(page.get_by_role("region", name="Facts")).to_contain_text("Wherepinned")
    assert stub.pinned == [writer.digest]
    page.get_by_role("button", name="Unpin").click()
    expect(page.get_by_role("region", name="Facts")).to_contain_text("Wherestore")
    shares = page.get_by_role("region", name="Shared with")
    shares.get_by_label("Tenant").fill("Not a tenant")
    shares.get_by_role("button", name="Share").click()
    expect(shares.get_by_role("alert")).to_contain_text("Not a tenant")
    shares.get_by_label("Tenant").fill("globex")
    shares.get_by_role("button", name="Share").click()
    expect(shares.get_by_role("listitem")).to_contain_text("globex")
    shares.get_by_role("button", name="Stop sharing with globex").click()
    expect(shares.get_by_role("listitem")).to_have_count(0)
    tab.check(refusals=True)


def test_an_adapter_is_deleted_after_a_question(tab: Tab, store: AdapterStore, writer: AdapterBundle) -> None:
    store.publish(writer, "demo/old")
    page = tab.open("adapters/demo/old")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("demo/old is deleted.")).to_be_visible()
    expect(page.locator("tbody tr")).to_have_count(3)
    tab.check()


def test_one_prompt_streams_through_several_models(tab: Tab) -> None:
    page = tab.open("playground")
    pick(page, "Adapters", "demo/writer")
    page.keyboard.press("Control+Enter")
    for title in ("Base model", "demo/writer"):
        expect(lane(page, title).get_by_role("log")).to_have_text(f"Once upon a time{ANSWER}", use_inner_text=False)
        expect(lane(page, title)).to_contain_text("done")
        expect(lane(page, title)).to_contain_text(re.compile(r"First token\d+ ms.*Tokens3Endstop"))
    expect(lane(page, "demo/writer")).to_contain_text("v3")
    page = tab.open("adapters/demo/writer")
    expect(page.get_by_role("region", name="Facts")).to_contain_text(
        re.compile(r"Since the start\d+ requests?, \d+ tokens")
    )
    tab.check()


def test_a_stream_is_stopped_alone_and_with_all_others(tab: Tab) -> None:
    page = tab.open("playground")
    pick(page, "Adapters", "demo/writer")
    page.get_by_label("Prompt").fill(SLOW)
    page.get_by_role("button", name="Run").click()
    expect(lane(page, "demo/writer").get_by_role("log")).to_contain_text("xxx")
    page.get_by_role("button", name="Stop demo/writer").click()
    expect(lane(page, "demo/writer")).to_contain_text("stopped")
    expect(lane(page, "Base model")).to_contain_text("writing")
    page.keyboard.press("Escape")
    expect(lane(page, "Base model")).to_contain_text("stopped")
    # A model that is added later does not begin by itself.
    pick(page, "Adapters", "demo/story")
    expect(lane(page, "demo/story")).to_contain_text("First token-")
    expect(page.get_by_role("button", name="Run")).to_be_visible()
    tab.check()


def test_a_long_stream_is_whole_and_the_page_stays_smooth(tab: Tab) -> None:
    page = tab.open("playground")
    page.evaluate("""() => {
        window.frames_ = 0; window.changes = 0; window.worst = 0;
        const count = () => { window.frames_ += 1; requestAnimationFrame(count); };
        requestAnimationFrame(count);
        new PerformanceObserver((list) => {
            for (const task of list.getEntries()) window.worst = Math.max(window.worst, task.duration);
        }).observe({ type: "longtask" });
        const text = document.querySelector(".lane-text");
        new MutationObserver(() => { window.changes += 1; }).observe(text, {
            childList: true, characterData: true, subtree: true,
        });
    }""")
    page.get_by_label("Prompt").fill(LONG)
    page.get_by_role("button", name="Run").click()
    box = lane(page, "Base model").get_by_role("log")
    expect(lane(page, "Base model")).to_contain_text("done", timeout=30_000)
    assert box.evaluate("(box) => [...box.children].map((block) => block.textContent).join('\\n')") == (
        LONG + "".join(LONG_TEXTS) + ANSWER
    )
    frames, changes, worst = page.evaluate("[window.frames_, window.changes, window.worst]")
    # Text is added once a frame, however many events came. A task of 0.4 s would be felt.
    assert 1 < changes <= frames + 2 and changes < len(LONG_TEXTS) / 10
    assert worst < 400
    assert box.evaluate("(box) => box.scrollHeight - box.scrollTop - box.clientHeight") < 30
    tab.check()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (OVERLOADED, ["The server is busy", "Too many requests; send it again later", "Try again in 7 seconds"]),
        (FAILS_LATER, ["Generation failed; the request may be sent again", "engine_unavailable"]),
    ],
)
def test_a_failure_is_shown_in_the_lane_with_its_remedy_and_id(tab: Tab, prompt: str, words: list[str]) -> None:
    page = tab.open("playground")
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Run").click()
    note = lane(page, "Base model").get_by_role("alert")
    for word in words:
        expect(note).to_contain_text(word)
    expect(note).to_contain_text(re.compile("req-[0-9a-f]{16}"))
    expect(lane(page, "Base model")).to_contain_text("failed")
    tab.check(refusals=True)


def test_a_text_goes_through_several_classifiers(tab: Tab) -> None:
    page = tab.open("classify?adapter=demo/sorter&adapter=demo/writer")
    page.get_by_label("Text").fill("spam")
    page.get_by_role("button", name="Classify").click()
    card = lane(page, "demo/sorter")
    expect(card.get_by_role("listitem")).to_have_text(["spam75%", "other25%"])
    assert card.locator(".meter > span").first.evaluate("(bar) => bar.style.width") == "75%"
    # Where one classifier is refused, the others still answer.
    expect(lane(page, "demo/writer").get_by_role("alert")).to_contain_text("is for generate")
    page.get_by_label("While I type").check()
    page.get_by_label("Text").fill("ham")
    expect(card.get_by_role("listitem").first).to_have_text("ham75%")
    tab.check(refusals=True)


def test_each_kind_of_result_is_shown(tab: Tab) -> None:
    page = tab.open("classify?adapter=demo/number&adapter=demo/labels&adapter=demo/spans")
    page.get_by_label("Text").fill("🙂a")
    page.get_by_role("button", name="Classify").click()
    expect(lane(page, "demo/number")).to_contain_text("1")
    expect(lane(page, "demo/labels").get_by_role("listitem")).to_have_text(["🙂a75%", "other12.5%"])
    expect(lane(page, "demo/spans")).to_contain_text("No spans found.")
    page.get_by_label("Text").fill("xylophones")
    page.get_by_role("button", name="Classify").click()
    expect(lane(page, "demo/spans").locator("mark")).to_have_text("xfirst")
    expect(lane(page, "demo/spans").locator(".marked")).to_have_text("xfirstylophones")
    tab.check()


def test_an_upload_is_published_or_refused_in_words(tab: Tab, tmp_path: Path, writer: AdapterBundle) -> None:
    page = tab.open("upload")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(writer.to_bytes()[:2000])
    page.get_by_label("Drop an adapter here").set_input_files(torn)
    page.get_by_label("Name").fill("demo/new")
    page.get_by_role("button", name="Publish").click()
    note = page.get_by_role("alert")
    expect(note).to_contain_text("truncated")
    expect(note).to_contain_text(re.compile("field.*code.*request"))
    whole = tmp_path / "whole.safetensors"
    whole.write_bytes(writer.to_bytes())
    page.get_by_label("Drop an adapter here").set_input_files(whole)
    expect(note).to_be_hidden()
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_text("demo/new version 1 is published")).to_be_visible()
    page.get_by_role("link", name="See its versions").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("demo/new")
    tab.check(refusals=True)


def test_a_lost_connection_is_said_and_mended(tab: Tab) -> None:
    page = tab.open("adapters")
    page.context.set_offline(True)
    page.get_by_label("Name").fill("writer")
    expect(page.get_by_text("No connection to the server.")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("does not answer")
    page.context.set_offline(False)
    expect(page.get_by_text("No connection to the server.")).to_be_hidden()
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert all("ERR_INTERNET_DISCONNECTED" in problem for problem in tab.problems)


def test_a_job_shows_its_loss_and_is_cancelled(tab: Tab) -> None:
    page = tab.open(f"training/{JOB['id']}")
    expect(page.get_by_role("region", name="Loss")).to_contain_text("training rows 1.200")
    expect(page.get_by_role("region", name="Facts").get_by_text("Step 40 of 100")).to_be_visible()
    # A screen reader is told the state, and not each step.
    told = page.get_by_role("status").filter(has_text=re.compile("state|Step"))
    expect(told).to_have_text("The job's state: running.")
    assert page.locator(".plot canvas").evaluate("(canvas) => canvas.width") > 200
    cancelled = JOB | {"status": "cancelled"}
    answer(page, r"/v1/fine_tuning/jobs/[^/]+/cancel$", cancelled)
    page.get_by_role("button", name="Cancel the job").click()
    answer(page, r"/v1/fine_tuning/jobs/[^/]+$", cancelled)
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(page.get_by_role("region", name="Facts")).to_contain_text("cancelled")
    tab.check()


def test_a_job_that_has_succeeded_names_the_file_of_its_metrics(tab: Tab) -> None:
    done = JOB | {"status": "succeeded", "fine_tuned_model": "acme/support", "result_files": ["file-results"]}
    answer(tab.page, r"/v1/fine_tuning/jobs/[^/]+$", done)
    page = tab.open(f"training/{JOB['id']}")
    expect(page.get_by_role("region", name="Facts")).to_contain_text("file-results")
    tab.check()


def test_rows_are_uploaded_and_wrong_ones_are_named(tab: Tab) -> None:
    page = tab.open("training/files")
    rows = [{"text": "late again", "label": "delivery"}, {"text": "two charges"}, {"text": "", "label": "billing"}]
    content = "\n".join(map(json.dumps, rows)).encode()
    drop, send = page.get_by_label("Drop a JSONL file here"), page.get_by_role("button", name="Upload", exact=True)
    drop.set_input_files({"name": "rows.jsonl", "mimeType": "application/jsonl", "buffer": content})
    send.click()
    expect(page.get_by_role("alert")).to_contain_text("label is missing")
    expect(page.get_by_role("alert")).to_contain_text(re.compile("row 2.*row 3", re.S))
    good = content.splitlines()[0]
    drop.set_input_files({"name": "good.jsonl", "mimeType": "application/jsonl", "buffer": good})
    send.click()
    row = page.locator("tbody tr")
    expect(row).to_contain_text("good.jsonl")
    row.get_by_role("link", name="Train on it").click()
    expect(page.get_by_label("Rows to train on")).to_have_value(re.compile("file-.*"))
    page.get_by_text("How it learns").click()
    page.get_by_label("Epochs").fill("many")
    page.get_by_role("button", name="Start").click()
    # The field's name is the API's own.
    expect(page.get_by_role("alert").locator(".message")).to_contain_text(
        "method.supervised.hyperparameters.n_epochs is"
    )
    page.go_back()
    page.get_by_role("button", name="Delete good.jsonl").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="No file yet")).to_be_visible()
    tab.check(refusals=True)


def test_a_key_is_shown_once_and_copied(tab: Tab) -> None:
    # The server itself would ask for a key from then on.
    answer(tab.page, r"/v1/keys$", {"keys": [KEY]})
    page = tab.open("keys")
    expect(page.locator("tbody tr")).to_contain_text([KEY["id"]])
    page.get_by_role("button", name="New key").click()
    page.get_by_role("dialog").get_by_label("Tenant", exact=True).fill("acme")
    answer(page, r"/v1/keys$", KEY | {"secret": "sk-sera-once"}, 201)
    page.get_by_role("button", name="Make the key").click()
    shown = page.get_by_role("dialog", name="Copy the key now")
    expect(shown).to_contain_text("sk-sera-once")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown.get_by_role("button", name="Copy the secret").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "sk-sera-once"
    page.keyboard.press("Escape")
    expect(page.get_by_text("sk-sera-once")).to_be_hidden()
    tab.check()


def test_a_quota_is_set_and_taken_back(tab: Tab) -> None:
    page = tab.open("quotas")
    expect(page.get_by_role("heading", name="No tenant has a quota")).to_be_visible()
    page.get_by_role("button", name="Set a quota").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Tenant", exact=True).fill("demo")
    # It would set nothing.
    expect(dialog.get_by_role("button", name="Save")).to_be_disabled()
    expect(dialog).to_contain_text("What is left empty stays as it is.")
    dialog.get_by_label("Adapters", exact=True).fill("ten")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("adapters")
    dialog.get_by_label("Adapters", exact=True).fill("10")
    dialog.get_by_label("Highest priority").select_option("normal")
    dialog.get_by_role("button", name="Save").click()
    card = page.get_by_role("region", name="Quota of demo")
    expect(card).to_contain_text(re.compile(r"Adapters[0-9]+ of 10.*Tokens a minute[0-9]+ \(no limit\).*normal"))
    page.get_by_role("button", name="Change the quota of demo").click()
    expect(dialog.get_by_label("Adapters", exact=True)).to_have_value("10")
    dialog.get_by_role("button", name="Take back").click()
    expect(card).to_have_count(0)
    tab.check(refusals=True)


def test_the_page_is_used_with_a_keyboard_alone(tab: Tab) -> None:
    page = tab.open("adapters")
    page.locator("tbody tr").first.wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    # From the filters to an adapter, and to its dialog.
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "demo/writer":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("demo/writer")
    delete = page.get_by_role("button", name="Delete", exact=True)
    delete.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    for _ in range(6):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    expect(delete).to_be_focused()
    tab.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_accessible_and_fits_a_phone(browser: Browser, url: str, scheme: str) -> None:
    options = {"color_scheme": scheme, "viewport": {"width": 360, "height": 740}, "reduced_motion": "reduce"}
    with browsers.tab(browser, url, **options) as opened:
        stub_routes(opened.page)
        busy = {"by_adapter": {LONG_NAME: BUSY}, "by_tenant": {LONG_NAME[:64]: BUSY}}
        answer(opened.page, r"/v1/stats$", stats() | busy)
        answer(opened.page, r"/v1/keys$", {"keys": [KEY | {"tenant": LONG_NAME[:64], "name": "shop " * 12}]})
        httpx.put(f"{url}/v1/quotas/demo", json={"adapters": 4, "bytes": 10**6}).raise_for_status()
        axe = Axe()
        for view in VIEWS:
            page = opened.open(view)
            page.wait_for_load_state("networkidle")
            # A change of the address behind "#" alone loads no page: the view's own data may still be on its way.
            expect(page.locator(".loading")).to_have_count(0)
            if view == "live":
                expect(page.get_by_role("region", name="Adapters", exact=True)).to_contain_text(LONG_NAME)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
            found = axe.run(page, options={"resultTypes": ["violations"]})
            assert found.violations_count == 0, f"{view} {scheme}: {found.generate_report()}"
        opened.page.set_viewport_size({"width": 1280, "height": 800})
        assert Axe().run(opened.open("adapters")).violations_count == 0
        opened.page.set_viewport_size({"width": 360, "height": 740})
        ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
        opened.page.get_by_role("button", name="Menu").click()
        opened.page.get_by_role("link", name="Playground").click()
        expect(opened.page.get_by_role("heading", level=1)).to_have_text("Playground")
        expect(opened.page.get_by_role("link", name="Playground")).to_be_hidden()
        opened.check()
    httpx.delete(f"{url}/v1/quotas/demo").raise_for_status()


def test_what_is_asked_is_what_the_form_says(tab: Tab) -> None:
    # A name twice in the address is one lane.
    page = tab.open("playground?adapter=demo/writer&adapter=demo/writer")
    page.get_by_text("Sampling:").click()
    for label in ("Most tokens", "Temperature"):
        page.get_by_label(label).fill("")
    expect(page.get_by_text("Sampling: temperature 0, all tokens")).to_be_visible()
    page.get_by_label("With the base model").uncheck()

    def asked(path: str) -> dict[str, Any]:
        with page.expect_request(f"**{path}") as found:
            page.get_by_role("button", name="Run").click()
        expect(page.get_by_role("button", name="Run")).to_be_visible()
        body: dict[str, Any] = json.loads(found.value.post_data or "")
        return body

    text = asked("/v1/generate")
    assert (text["max_new_tokens"], text["temperature"]) == (None, 0)
    expect(page.locator("section.lane")).to_have_count(1)
    page.get_by_label("Temperature").fill("Infinity")
    assert asked("/v1/generate")["temperature"] == "Infinity"
    expect(page.get_by_role("alert")).to_contain_text("Temperature is 'Infinity'")
    page.get_by_label("Temperature").fill("")
    page.get_by_role("radio", name="Chat").check()
    chat = asked("/v1/chat/completions")
    assert (chat["max_tokens"], chat["temperature"]) == (None, 0)
    tab.check(refusals=True)


def test_a_tenant_that_is_called_by_a_number_is_a_text(tab: Tab) -> None:
    page = tab.page
    answer(
        page,
        r"/v1/files\?",
        {"object": "list", "data": [{"id": "file-1", "filename": "rows.jsonl"}], "has_more": False},
    )
    sent: list[Any] = []

    def keep(route: Route) -> None:
        sent.append(json.loads(route.request.post_data or ""))
        route.fulfill(status=200, content_type="application/json", body=json.dumps(JOB))

    page.route(re.compile(r"/v1/fine_tuning/jobs$"), keep)
    tab.open("training/new?file=file-1")
    page.get_by_label("Tenant").fill("42")
    page.get_by_text("The adapter's shape").click()
    page.get_by_label("Rank").fill("8")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(JOB["adapter"]["name"])
    assert sent[0]["adapter"] == {"tenant": "42", "rank": 8}


def test_older_versions_and_files_are_not_left_out_in_silence(tab: Tab, store: AdapterStore) -> None:
    page = tab.page
    found = httpx.get(f"{tab.url}/v1/adapters/demo/writer/versions").json()
    (version,) = found["versions"]

    def listed(route: Route) -> None:
        before = int(re.findall(r"before=(\d+)", route.request.url + "&before=251")[0])
        numbers = range(before - 1, max(0, before - 101), -1)
        content = found | {"versions": [version | {"version": number} for number in numbers]}
        content |= {"next": numbers[-1] if numbers[-1] > 1 else None, "aliases": {"latest": 250, "first": 1}}
        route.fulfill(status=200, content_type="application/json", body=json.dumps(content))

    page.route(re.compile(r"/v1/adapters/demo/writer/versions"), listed)
    tab.open("adapters/demo/writer")
    cards = page.locator("ol.versions > li")
    expect(cards).to_have_count(100)
    page.get_by_role("button", name="Show older versions").click()
    expect(cards).to_have_count(200)
    page.get_by_role("button", name="Show older versions").click()
    expect(cards).to_have_count(250)
    expect(cards.last).to_contain_text("first")
    expect(page.get_by_role("button", name="Show older versions")).to_have_count(0)
    file = {"id": "file-1", "filename": "rows.jsonl", "bytes": 10, "created_at": JOB["created_at"]}
    answer(page, r"/v1/files\?", {"object": "list", "data": [file], "has_more": True})
    page.goto(f"{tab.url}/console#/training/files")
    expect(page.get_by_role("main")).to_contain_text("Only the newest 50 are shown.")
    tab.check()


def test_a_stream_that_was_cut_is_no_answer(tab: Tab) -> None:
    event = {"id": "gen-1", "adapter": None, "version": None, "text": "Ahoy", "token_ids": [1], "finish_reason": None}
    tab.page.route(
        re.compile(r"/v1/generate$"),
        lambda route: route.fulfill(
            status=200, content_type="text/event-stream", body=f"data: {json.dumps(event)}\n\n"
        ),
    )
    page = tab.open("playground")
    page.get_by_role("button", name="Run").click()
    expect(lane(page, "Base model")).to_contain_text("failed")
    expect(lane(page, "Base model")).to_contain_text("Ahoy")


@pytest.mark.parametrize("view", ["adapters/../keys", "adapters/%2e%2e/me", "adapters/demo/..", "adapters/./."])
def test_dots_in_the_address_lead_to_no_other_path(tab: Tab, view: str) -> None:
    page = tab.open(view)
    expect(page.get_by_role("heading", level=1)).to_have_text("Adapters")
    expect(page.locator("tbody tr").first).to_be_visible()
    tab.check()


def test_dots_are_no_alias(tab: Tab) -> None:
    page = tab.open("adapters/demo/story")
    page.get_by_role("button", name="Set alias").first.click()
    page.get_by_role("dialog").get_by_label("Alias").fill("..")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text('".." is no name')
    tab.check()


def test_a_page_that_comes_before_its_server_goes_on_with_it(tab: Tab) -> None:
    away = [True]
    tab.page.route("**/v1/me", lambda route: route.abort() if away else route.continue_())
    page = tab.open("playground")
    expect(page.get_by_role("alert")).to_contain_text("This page tries again by itself")
    away.clear()
    expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
