"""The console in states that are rare: long words, a damaged adapter, too many files, and the keyboard alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.access import AccessDatabase, CreatedKey, Keys
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support import browser as browsers
from support.browser import Tab, answer, hold
from support.console_api import JOB
from support.factories import random_adapter
from support.live_server import live_server
from support.stub_engine import OVERLOADED, StubEngine

pytestmark = pytest.mark.slow

LONG_TENANT = "t" * 64
LONG_NAME = f"{LONG_TENANT}/{'n' * 64}"
LONG_WORD = "Donaudampfschifffahrtsgesellschaft" * 5
# A phone, and a window of 1280 at a zoom of 200%.
NARROW: list[dict[str, Any]] = [
    {"viewport": {"width": 390, "height": 844}},
    {"viewport": {"width": 640, "height": 450}, "device_scale_factor": 2},
    {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
]
# Elements whose right edge is out of sight, with nothing around them that scrolls.
OUT_OF_SIGHT = """() => {
    const scrolls = (element) => element !== null && element !== document.body
        && (["auto", "scroll"].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
    const edge = (element) => element.closest(".side, dialog")?.getBoundingClientRect().right ?? innerWidth;
    const isOut = (element) => element.getBoundingClientRect().right > edge(element) + 1;
    return [...document.querySelectorAll("main *, .account *, dialog *, .notices *")]
        .filter((element) => isOut(element) && !scrolls(element.parentElement))
        .map((element) => `${element.tagName} ${element.className} ${element.textContent.slice(0, 20)}`);
}"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, base: FrozenBase, sorter: AdapterBundle) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("states") / "store")
    training = {"description": LONG_WORD, "metrics": {"eval_loss": 1.25}}
    store.publish(random_adapter(base, SeraConfig(8, 4, 16, ("q_proj",)), seed=1, training=training), LONG_NAME)
    store.publish(sorter, f"{LONG_TENANT}/sorter-{'s' * 57}")
    return store


@pytest.fixture(scope="module")
def keys(held: AdapterStore) -> Iterator[dict[str, CreatedKey]]:
    database = AccessDatabase(held.root)
    made = Keys(database)
    yield {
        "long": made.create(LONG_TENANT, ["infer", "publish", "train"]),
        "reader": made.create(LONG_TENANT, ["infer"]),
        "root": made.create("root", ["admin"]),
    }
    database.close()


@pytest.fixture(scope="module")
def keyed_url(base: FrozenBase, held: AdapterStore, keys: dict[str, CreatedKey]) -> Iterator[str]:
    with live_server(build_app(StubEngine(base), held, ServeSettings(store=held.root))) as address:
        yield address


def drop(page: Page, names: list[str], onto: str = ".drop") -> bool:
    """Drop files on an element, as a person's mouse does. Returns whether the browser then opens them itself."""
    return bool(
        page.evaluate(
            """([names, onto]) => {
                const dataTransfer = new DataTransfer();
                for (const name of names) dataTransfer.items.add(new File(["a"], name));
                const events = ["dragenter", "dragover", "drop"].map(
                    (type) => new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer }));
                return events.map((event) => document.querySelector(onto).dispatchEvent(event)).at(-1);
            }""",
            [names, onto],
        )
    )


def press(button: Locator) -> None:
    button.focus()
    button.press("Enter")


@pytest.mark.parametrize("screen", NARROW, ids=["phone", "zoom", "dark"])
def test_long_names_and_words_stay_in_sight(
    browser: Browser, keyed_url: str, keys: dict[str, CreatedKey], screen: dict[str, Any]
) -> None:
    sorter = f"{LONG_TENANT}/sorter-{'s' * 57}"
    with browsers.tab(browser, keyed_url, **screen) as tab:
        page = tab.open(f"adapters/{LONG_NAME}", keys["long"].secret)
        expect(page.get_by_text(LONG_WORD)).to_be_visible()
        assert page.evaluate(OUT_OF_SIGHT) == []
        page.get_by_role("button", name="Delete", exact=True).click()
        assert page.evaluate(OUT_OF_SIGHT) == []
        page = tab.open(f"classify?adapter={sorter}")
        page.get_by_role("button", name="Classify").click()
        expect(page.get_by_role("region", name=sorter).get_by_role("listitem").first).to_be_visible()
        assert page.evaluate(OUT_OF_SIGHT) == []
        page = tab.open(f"playground?adapter={LONG_NAME}")
        page.get_by_role("button", name="Run").click()
        version = page.get_by_role("region", name=LONG_NAME).get_by_text("v3", exact=True)
        assert version.evaluate("(element) => element.getBoundingClientRect().height") < 30, "it is broken in two"
        assert page.evaluate(OUT_OF_SIGHT) == []
        page = tab.open("quotas")
        expect(page.get_by_role("heading", name=LONG_TENANT)).to_be_visible()
        assert page.evaluate(OUT_OF_SIGHT) == []
        tab.check()


def test_a_damaged_adapter_says_so_once_and_can_be_deleted(
    browser: Browser, keyed_url: str, keys: dict[str, CreatedKey], held: AdapterStore, writer: AdapterBundle
) -> None:
    name = f"{LONG_TENANT}/broken"
    held.publish(writer, name)
    (held.root / "adapters" / LONG_TENANT / "broken" / "versions" / "v1.json").write_text("{broken")
    with browsers.tab(browser, keyed_url) as reader_tab, browsers.tab(browser, keyed_url) as tab:
        page = reader_tab.open(f"adapters/{name}", keys["reader"].secret)
        expect(page.get_by_role("alert")).to_contain_text("Damaged in the store")
        expect(page.get_by_role("button", name="Delete")).to_have_count(0)
        expect(page.get_by_role("main")).not_to_contain_text("can be deleted")
        page = tab.open(f"adapters/{name}", keys["long"].secret)
        page.wait_for_load_state("networkidle")
        expect(page.get_by_role("alert")).to_have_count(1)
        expect(page.get_by_role("main")).to_contain_text("It can be deleted.")
        expect(page.get_by_role("heading", name="Versions")).to_have_count(0)
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.get_by_text(f"{name} is deleted.")).to_be_visible()
        assert page.evaluate(OUT_OF_SIGHT) == []
        assert not (held.root / "adapters" / LONG_TENANT / "broken").exists()
        # One that is not there at all is told once, too.
        page = tab.open(f"adapters/{LONG_TENANT}/nothing")
        page.wait_for_load_state("networkidle")
        expect(page.get_by_role("alert")).to_have_count(1)
        expect(page.get_by_role("button", name="Delete")).to_have_count(0)
        tab.check(refusals=True)


def test_an_admin_sees_quotas_a_part_at_a_time(tab: Tab) -> None:
    nothing = dict.fromkeys(
        ["adapters", "bytes", "requests_per_minute", "tokens_per_minute", "requests_in_flight", "training_jobs"]
    )
    used = dict.fromkeys(
        ["adapters", "bytes", "requests_this_minute", "tokens_this_minute", "requests_in_flight", "training_jobs"], 1
    )
    quotas = [
        {"tenant": f"tenant-{number:04d}", "limits": nothing | {"max_priority": None}, "usage": used}
        for number in range(3000)
    ]
    answer(tab.page, r"/v1/quotas$", {"quotas": quotas})
    page = tab.open("quotas")
    cards = page.locator(".quota")
    expect(page.get_by_text("The first 60 of 3,000 quotas")).to_be_visible()
    expect(cards).to_have_count(60)
    page.get_by_role("button", name="Show more").click()
    expect(cards).to_have_count(120)
    page.get_by_role("searchbox", name="Tenant").fill("TENANT-299")
    expect(cards).to_have_count(10)
    expect(page.get_by_role("button", name="Show more")).to_have_count(0)
    tab.check()


def test_older_versions_and_jobs_are_read_on_from_where_the_list_is(tab: Tab) -> None:
    page = tab.page
    asked: list[str] = []
    version = {"version": 1, "digest": "0" * 64, "created_at": 1, "method": "sera", "ranks": [8], "splits": [4]}
    version |= {"parameters": 1, "bytes": 1, "metrics": None, "card": None, "description": None}

    def versions(route: Route) -> None:
        before = int(re.findall(r"before=(\d+)", route.request.url + "&before=331")[0])
        asked.append(f"before {before}")
        numbers = range(before - 1, max(0, before - 101), -1)
        content = {"versions": [version | {"version": number} for number in numbers], "aliases": {"latest": 330}}
        route.fulfill(json=content | {"next": numbers[-1] if numbers[-1] > 1 else None})

    def jobs(route: Route) -> None:
        after = int(re.findall(r"after=ftjob-(\d+)", route.request.url + "&after=ftjob-120")[0])
        asked.append(f"after {after}")
        data = [JOB | {"id": f"ftjob-{number}"} for number in range(after - 1, after - 51, -1) if number > 0]
        route.fulfill(json={"object": "list", "data": data, "has_more": data[-1]["id"] != "ftjob-1"})

    page.route(re.compile("/v1/adapters/demo/writer/versions"), versions)
    page.route(re.compile(r"/v1/fine_tuning/jobs\?"), jobs)
    tab.open("adapters/demo/writer")
    cards = page.locator("ol.versions > li")
    for shown in (100, 200, 300):
        expect(cards).to_have_count(shown)
        # The focus stays where it was: the next press goes on.
        press(page.get_by_role("button", name="Show older versions"))
    expect(cards).to_have_count(330)
    expect(page.get_by_role("button", name="Show older versions")).to_have_count(0)
    assert asked == ["before 331", "before 231", "before 131", "before 31"]
    asked.clear()
    tab.open("training")
    for shown in (50, 100):
        expect(page.locator("tbody tr")).to_have_count(shown)
        press(page.get_by_role("button", name="Show more"))
    expect(page.locator("tbody tr")).to_have_count(119)
    assert asked == ["after 120", "after 70", "after 20"]
    # Whoever reloads the list sees as much as before.
    page.get_by_role("button", name="Refresh").click()
    expect(page.locator("tbody tr")).to_have_count(119)
    tab.check()


def test_a_button_keeps_the_focus_while_it_works_and_sends_once(tab: Tab) -> None:
    page = tab.page
    answer(page, r"/v1/files\?", {"object": "list", "data": [{"id": "file-1", "filename": "a"}], "has_more": False})
    tab.open("training/new?file=file-1")
    waiting = hold(page, "/v1/fine_tuning/jobs$")
    start = page.get_by_role("button", name="Start")
    press(start)
    expect(start).to_have_attribute("aria-busy", "true")
    expect(start).to_be_focused()
    start.press("Enter")
    page.get_by_label("Suffix").press("Enter")
    start.focus()
    body = {"error": {"message": "too many unfinished jobs", "code": "quota_exceeded"}}
    waiting[0].fulfill(status=429, headers={"Retry-After": "1"}, json=body)
    expect(page.get_by_role("alert")).to_contain_text("Try again in 1 second.")
    expect(start).to_be_focused()
    assert len(waiting) == 1
    tab.check(refusals=True)


def test_a_longer_list_leaves_the_focus_on_its_button(tab: Tab) -> None:
    page = tab.page
    waiting = hold(page, r"/v1/adapters\?.*after", "GET")
    row = {"adapter": "demo/a", "task": "generate", "method": "sera", "ranks": [8], "splits": [4], "bytes": 1}
    row |= {"version": 1, "created_at": 1, "tier": "store", "pinned": False}
    first = [row | {"adapter": f"demo/a{number}"} for number in range(50)]
    answer(page, r"/v1/adapters\?limit=50$", {"adapters": first, "next": "demo/a49"})
    tab.open("adapters")
    more = page.get_by_role("button", name="Show more")
    press(more)
    expect(more).to_have_attribute("aria-busy", "true")
    expect(more).to_be_focused()
    waiting[0].fulfill(json={"adapters": [row | {"adapter": "demo/b"}], "next": None})
    expect(page.locator("tbody tr")).to_have_count(51)
    expect(more).to_have_count(0)
    tab.check()


def test_an_upload_that_is_stopped_says_so_and_keeps_the_focus(tab: Tab) -> None:
    page = tab.page
    for view, path, verb in (("upload", "/v1/adapters$", "Publish"), ("training/files", "/v1/files$", "Upload")):
        hold(page, path)
        tab.open(view)
        page.locator("input[type=file]").set_input_files({"name": "a.tar", "mimeType": "", "buffer": b"a" * 100})
        if view == "upload":
            page.get_by_label("Name").fill("demo/a")
        page.get_by_role("button", name=verb, exact=True).click()
        press(page.get_by_role("button", name="Stop"))
        expect(page.get_by_role("status").filter(has_text="Stopped")).to_be_visible()
        expect(page.get_by_role("button", name=verb, exact=True)).to_be_focused()
        expect(page.get_by_role("button", name="Stop")).to_have_count(0)


def test_the_bytes_of_an_upload_are_not_spoken_one_after_another(tab: Tab, tmp_path: Path) -> None:
    page = tab.open("upload")
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 1_000_000}
    session.send("Network.emulateNetworkConditions", slow)
    large = tmp_path / "large.tar"
    large.write_bytes(bytes(20 << 20))
    page.locator("input[type=file]").set_input_files(large)
    page.get_by_label("Name").fill("demo/a")
    page.get_by_role("button", name="Publish").click()
    sent = page.get_by_text(re.compile(r"^[1-9]\S* (KiB|MiB) of 20"))
    expect(sent).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="of 20")).to_have_count(0)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("the server keeps nothing of it")).to_be_visible()
    tab.check()


def test_files_that_are_too_many_are_refused_and_not_left_out(tab: Tab) -> None:
    page = tab.open("upload")
    publish = page.get_by_role("button", name="Publish")
    page.get_by_label("Name").fill("demo/a")
    for names in (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.json", "c.json"]):
        drop(page, names)
        expect(page.locator(".chosen li")).to_have_count(len(names))
        expect(page.get_by_text("One adapter at a time")).to_be_visible()
        expect(publish).to_be_disabled()
    drop(page, ["adapter_model.safetensors", "adapter_config.json"])
    expect(page.get_by_text("One adapter at a time")).to_be_hidden()
    expect(publish).to_be_enabled()
    # The browser's own field tells the same files, and a file that falls beside the place does not end the page.
    assert page.locator("input[type=file]").evaluate("(input) => input.files.length") == 2
    assert not drop(page, ["a.tar"], "h1")
    page = tab.open("training/files")
    drop(page, ["a.jsonl", "b.jsonl"])
    expect(page.get_by_text("One file at a time.")).to_be_visible()
    expect(page.get_by_role("button", name="Upload", exact=True)).to_be_disabled()
    tab.check()


@pytest.mark.parametrize(
    ("file", "name"),
    [("Support Bot (2).safetensors", "demo/support-bot-2"), ("..Été.TAR", "demo/t"), ("v1..2.zip", "demo/v1.2")],
)
def test_the_name_of_a_file_becomes_one_that_the_server_takes(tab: Tab, file: str, name: str) -> None:
    page = tab.open("upload")
    page.get_by_label("Name").fill("demo/")
    page.locator("input[type=file]").set_input_files({"name": file, "mimeType": "", "buffer": b"a"})
    expect(page.get_by_label("Name")).to_have_value(name)
    tab.check()


def test_a_refused_run_is_not_told_as_an_answer(tab: Tab) -> None:
    page = tab.open("playground")
    page.get_by_label("Prompt").fill(OVERLOADED)
    press(page.get_by_role("button", name="Run"))
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="The models have ended.")).to_have_count(1)
    expect(page.get_by_role("button", name="Run")).to_be_focused()
    tab.check(refusals=True)


@pytest.mark.parametrize(("view", "verb"), [("upload", "Publish"), ("training/files", "Upload")])
def test_a_file_that_changed_after_it_was_chosen_is_named(tab: Tab, tmp_path: Path, view: str, verb: str) -> None:
    page = tab.open(view)
    chosen = tmp_path / "chosen.tar"
    chosen.write_bytes(b"a")
    page.locator("input[type=file]").set_input_files(chosen)
    if view == "upload":
        page.get_by_label("Name").fill("demo/a")
    chosen.unlink()
    page.get_by_role("button", name=verb, exact=True).click()
    note = page.get_by_role("alert")
    expect(note).to_contain_text("The file cannot be read")
    expect(note).to_contain_text("The file chosen.tar has changed since it was chosen, or is gone: choose it again.")
    expect(page.get_by_text("No connection to the server.")).to_have_count(0)
    # The browser's own field names it no longer.
    assert page.locator("input[type=file]").evaluate("(input) => input.files.length") == 0
    expect(page.locator(".chosen")).to_have_count(0)
    tab.check()


def test_a_stream_that_broke_off_says_what_to_do(tab: Tab) -> None:
    page = tab.page
    event = {"id": "gen-1", "adapter": None, "version": None, "text": "Ahoy", "token_ids": [1], "finish_reason": None}
    page.route(
        re.compile(r"/v1/generate$"),
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(event)}\n\n"),
    )
    tab.open("playground")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("The answer broke off.")
    expect(page.get_by_role("alert")).to_contain_text("run it again when the server is back")


@pytest.mark.parametrize(
    ("task", "view"),
    [
        ("generate", "playground"),
        ("classify", "classify"),
        ("multi-label", "classify"),
        ("regress", "classify"),
        ("token-classify", "classify"),
    ],
)
def test_what_a_job_has_made_is_tried_in_the_view_of_its_task(tab: Tab, task: str, view: str) -> None:
    page = tab.page
    done = JOB | {"status": "succeeded", "fine_tuned_model": "acme/support"}
    answer(page, r"/v1/fine_tuning/jobs/[^/]+$", done | {"adapter": JOB["adapter"] | {"task": task}})
    answer(page, r"/v1/fine_tuning/jobs/[^/]+/events", {"object": "list", "data": [], "has_more": False})
    tab.open(f"training/{JOB['id']}")
    name = "Try it" if view == "playground" else "Classify with it"
    expect(page.get_by_role("link", name=name)).to_have_attribute("href", f"#/{view}?adapter=acme%2Fsupport")
    tab.check()


@pytest.mark.parametrize(
    ("status", "words"),
    [("validating_files", "checks the files"), ("queued", "waits for its turn"), ("running", "makes ready")],
)
def test_a_job_says_what_it_does_before_its_first_step(tab: Tab, status: str, words: str) -> None:
    answer(tab.page, r"/v1/fine_tuning/jobs/[^/]+$", JOB | {"status": status})
    answer(tab.page, r"/v1/fine_tuning/jobs/[^/]+/events", {"object": "list", "data": [], "has_more": False})
    page = tab.open(f"training/{JOB['id']}")
    expect(page.get_by_role("region", name="Facts")).to_contain_text(words)
    tab.check()


def test_the_option_that_enter_takes_is_in_sight(tab: Tab) -> None:
    page = tab.page
    page.set_viewport_size({"width": 390, "height": 844})
    row = {"task": "generate", "method": "sera", "ranks": [8], "splits": [4], "bytes": 1}
    rows = [row | {"adapter": f"{LONG_TENANT}/{number}{'n' * 63}"} for number in range(8)]
    answer(page, r"/v1/adapters\?", {"adapters": rows, "next": None})
    tab.open("playground")
    page.get_by_role("combobox").click()
    expect(page.get_by_role("option")).to_have_count(8)
    taken = page.get_by_role("option", selected=True)
    # Seven down, and then back to the first.
    for number in (1, 2, 3, 4, 5, 6, 7, 0):
        page.keyboard.press("ArrowDown")
        expect(taken).to_contain_text(f"/{number}n")
        box = taken.bounding_box()
        frame = page.get_by_role("listbox").bounding_box()
        assert box and frame
        assert frame["y"] <= box["y"]
        assert box["y"] + box["height"] <= frame["y"] + frame["height"]
    # A press on the list's own bar or margin leaves it open.
    page.mouse.click(frame["x"] + frame["width"] - 3, frame["y"] + frame["height"] / 2)
    expect(page.get_by_role("listbox")).to_be_visible()
    tab.check()


def test_who_selects_a_text_in_a_row_stays_in_the_list(tab: Tab) -> None:
    page = tab.open("adapters")
    cell = page.get_by_role("cell", name="generate").first
    box = cell.bounding_box()
    assert box
    page.mouse.move(box["x"] + 20, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 80, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert page.evaluate("String(getSelection())") != ""
    expect(page.get_by_role("heading", level=1)).to_have_text("Adapters")
    page.get_by_role("cell", name="sera").first.click()
    expect(page.get_by_role("heading", level=1)).not_to_have_text("Adapters")
    tab.check()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0804, "80 ms"),
        (0.9996, "1.0 s"),
        (9.96, "10 s"),
        (59.7, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (185, "3 min 5 s"),
    ],
)
def test_seconds_are_written_with_the_unit_that_they_round_to(tab: Tab, seconds: float, text: str) -> None:
    page = tab.open("quotas")
    read = "async (value) => (await import(`${location.origin}/console/js/format.js`)).seconds(value)"
    assert page.evaluate(read, seconds) == text


def test_a_share_is_told_once(tab: Tab) -> None:
    page = tab.open("classify?adapter=demo/sorter")
    page.get_by_role("button", name="Classify", exact=True).click()
    region = page.get_by_role("region", name="demo/sorter")
    expect(region.get_by_role("listitem")).to_have_count(2)
    # Its bar is for the eye.
    expect(region.get_by_role("img")).to_have_count(0)
    tab.check()


def test_names_are_not_checked_as_words(tab: Tab) -> None:
    page = tab.open("playground")
    assert page.get_by_label("Prompt").evaluate("(field) => field.spellcheck")
    assert not page.get_by_role("combobox", name="Adapters").evaluate("(field) => field.spellcheck")
    page = tab.open("upload")
    assert not page.get_by_label("Name").evaluate("(field) => field.spellcheck")
    tab.check()
