"""The console when things go wrong: a server that is killed and started again, a key, a quota, late answers."""

from __future__ import annotations

import io
import multiprocessing
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.access import AccessDatabase, CreatedKey, Keys
from sera_serve.commands.serve import bound_socket
from sera_serve.config import ServeSettings
from sera_serve.jobs import JobPaths
from sera_serve.jobs.files import TrainingFiles
from sera_serve.jobs.records import Jobs, new_job_id
from sera_serve.jobs.spec import JobSpec
from sera_serve.server import build_app
from support import browser as browsers
from support.browser import Tab, answer, hold
from support.console_api import JOB
from support.factories import random_decoder
from support.live_server import wait_until
from support.stub_engine import FAILS_LATER, StubEngine

pytestmark = pytest.mark.slow

LOST = "No connection to the server."
# The page asks again after 1, 2, 3 and then every 5 seconds.
BACK_MS = 15_000
ROWS = b'{"text": "late again", "label": "delivery"}\n'
SCOPES = ["infer", "publish", "train"]


def serve(listener: socket.socket, root: Path) -> None:
    """Run the server process: the real app and the real store, with the stub engine."""
    app = build_app(StubEngine(random_decoder()), AdapterStore(root), ServeSettings(store=root))
    uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none")).run(sockets=[listener])


class Process:
    """A server of keys in a process of its own, which can be killed and started again on its port."""

    def __init__(self, root: Path) -> None:
        self.store = AdapterStore(root)
        self.database = AccessDatabase(root)
        made = Keys(self.database)
        self.keys: dict[str, CreatedKey] = {"acme": made.create("acme", SCOPES), "root": made.create("root", ["admin"])}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "support.factories", "sera_serve.server"])
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        with bound_socket("127.0.0.1", self._port) as listener:
            listener.listen()
            self._port = listener.getsockname()[1]
            self._process = self._context.Process(target=serve, args=(listener, self.store.root))
            self._process.start()
            httpx.get(f"{self.url}/healthz", timeout=120).raise_for_status()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def set_quota(self, **limits: int | None) -> None:
        headers = {"Authorization": f"Bearer {self.keys['root'].secret}"}
        httpx.put(f"{self.url}/v1/quotas/acme", headers=headers, json=limits).raise_for_status()


@pytest.fixture
def server(tmp_path: Path, writer: AdapterBundle) -> Iterator[Process]:
    store = AdapterStore(tmp_path / "store")
    store.publish(writer, "acme/writer")
    process = Process(store.root)
    yield process
    process.kill()
    process.database.close()


def choose(page: Page, name: str, content: bytes = b"a") -> None:
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "", "buffer": content})


def test_a_sign_in_goes_on_when_the_server_is_started_again(browser: Browser, server: Process) -> None:
    with browsers.tab(browser, server.url) as tab:
        page = tab.open("quotas")
        server.kill()
        page.get_by_label("Key", exact=True).fill(server.keys["acme"].secret)
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("goes on when the server is back")
        server.start()
        expect(page.get_by_role("heading", level=1)).to_have_text("Quotas", timeout=BACK_MS)
        expect(page.get_by_role("region", name="Quota of acme")).to_be_visible()


def add_later(server: Process, bundle: AdapterBundle) -> None:
    """Change what each list has, while the server is away."""
    server.store.publish(bundle, "acme/later")
    server.store.publish(bundle, "acme/writer")
    Keys(server.database).create("acme", ["infer"], name="later-key")
    places = JobPaths(server.store.root)
    places.make()
    file = TrainingFiles(server.database, places, 1 << 20).add("acme", "later.jsonl", io.BytesIO(ROWS))
    # Of another base: this server shows the job, and leaves it alone.
    spec = JobSpec("other", "acme/later-job", "text", "classify", 1, 1, 1.0, 0, 1)
    Jobs(server.database, "f" * 32).create(new_job_id(), "acme", spec, {}, file.id, None, None)


def test_each_list_is_read_again_when_the_server_is_started_again(
    browser: Browser, server: Process, sorter: AdapterBundle
) -> None:
    # By view: whose key, and what is new after the restart.
    views = {
        "adapters": ("acme", "later"),
        "adapters/acme/writer": ("acme", "Version 2"),
        "training": ("acme", "acme/later-job"),
        "training/files": ("acme", "later.jsonl"),
        "training/new": ("acme", "later.jsonl"),
        "quotas": ("acme", "Adapters2 (no limit)"),
        "keys": ("root", "later-key"),
        "live": ("root", "Memory"),
    }
    with ExitStack() as stack:
        pages = {}
        for view, (key, _) in views.items():
            tab = stack.enter_context(browsers.tab(browser, server.url))
            pages[view] = tab.open(view, server.keys[key].secret)
            expect(pages[view].locator(".loading")).to_have_count(0)
            # It asks for nothing, and the code of the view is there.
            tab.open("classify")
            expect(pages[view].get_by_label("Text")).to_be_visible()
        server.kill()
        for view, page in pages.items():
            page.goto(f"{server.url}/console#/{view}")
            expect(page.get_by_text(LOST)).to_be_visible()
            expect(page.get_by_role("alert").first).to_contain_text("goes on when the server is back")
        add_later(server, sorter)
        server.start()
        for view, page in pages.items():
            expect(page.get_by_text(LOST)).to_have_count(0, timeout=BACK_MS)
            expect(page.get_by_role("main")).to_contain_text(views[view][1])
            expect(page.get_by_role("alert")).to_have_count(0)


def test_a_view_whose_code_did_not_come_is_there_when_the_server_is(browser: Browser, server: Process) -> None:
    with browsers.tab(browser, server.url) as tab:
        page = tab.open("adapters", server.keys["acme"].secret)
        expect(page.locator("tbody tr")).to_have_count(1)
        server.kill()
        page.get_by_role("link", name="Playground").click()
        expect(page.get_by_text(LOST)).to_be_visible()
        expect(page.get_by_role("alert")).to_contain_text("goes on when the server is back")
        server.start()
        expect(page.get_by_role("heading", level=1)).to_have_text("Playground", timeout=BACK_MS)


def test_a_file_of_the_page_that_is_missing_is_no_lost_connection(tab: Tab) -> None:
    tab.page.route("**/views/quotas.js", lambda route: route.fulfill(status=404))
    page = tab.open("adapters")
    page.get_by_role("link", name="Quotas").click()
    expect(page.get_by_role("alert")).to_contain_text("This page failed")
    expect(page.get_by_text(LOST)).to_have_count(0)
    tab.page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Quotas")


def test_rows_of_other_filters_do_not_stay_beside_a_filter_that_cannot_be_looked_for(tab: Tab) -> None:
    page = tab.open("adapters")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(2)
    page.context.set_offline(True)
    page.get_by_label("Task").select_option("classify")
    expect(page.get_by_role("alert").first).to_contain_text("goes on when the server is back")
    expect(rows).to_have_count(0)
    expect(page.get_by_text("0 adapters")).to_have_count(0)
    page.context.set_offline(False)
    expect(rows).to_have_count(1, timeout=BACK_MS)


def test_a_lost_connection_hides_neither_the_heading_nor_the_menu(tab: Tab) -> None:
    page = tab.page
    page.set_viewport_size({"width": 390, "height": 844})
    tab.open("adapters")
    page.context.set_offline(True)
    page.get_by_label("Name").fill("writer")
    box = page.get_by_text(LOST).bounding_box()
    heading = page.get_by_role("heading", level=1).bounding_box()
    assert box and heading and heading["y"] >= box["y"] + box["height"]
    page.get_by_role("button", name="Menu").click()
    expect(page.get_by_role("link", name="Playground")).to_be_visible()
    # It stays in sight, however far a person has scrolled.
    page.mouse.wheel(0, 400)
    expect(page.get_by_text(LOST)).to_be_in_viewport()


def test_what_changes_nothing_may_be_run_again_after_a_lost_connection(tab: Tab) -> None:
    for view, verb in (("playground", "Run"), ("classify?adapter=demo/sorter", "Classify")):
        page = tab.open(view)
        button = page.get_by_role("button", name=verb, exact=True)
        expect(button).to_be_enabled()
        page.context.set_offline(True)
        button.click()
        expect(page.get_by_role("alert")).to_contain_text("run it again when the server is back")
        page.context.set_offline(False)
        expect(page.get_by_text(LOST)).to_have_count(0)
        button.click()
        expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize(("limits", "words"), [({"adapters": 1}, "may have 1"), ({"bytes": 1}, "all may have 1")])
def test_an_upload_over_the_quota_keeps_the_form(
    browser: Browser, server: Process, writer: AdapterBundle, limits: dict[str, int], words: str
) -> None:
    with browsers.tab(browser, server.url) as tab:
        server.set_quota(**limits)
        page = tab.open("upload", server.keys["acme"].secret)
        choose(page, "new.safetensors", writer.to_bytes())
        publish = page.get_by_role("button", name="Publish")
        publish.click()
        expect(page.get_by_role("alert")).to_contain_text("The quota allows no more")
        expect(page.get_by_role("alert")).to_contain_text(words)
        expect(page.get_by_label("Name")).to_have_value("acme/new")
        server.set_quota(**dict.fromkeys(limits))
        publish.click()
        expect(page.get_by_text("acme/new version 1 is published")).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)
        tab.check(refusals=True)


def test_a_job_over_the_quota_keeps_the_form(browser: Browser, server: Process) -> None:
    with browsers.tab(browser, server.url) as tab:
        server.set_quota(training_jobs=0)
        page = tab.open("training/files", server.keys["acme"].secret)
        choose(page, "rows.jsonl", ROWS)
        page.get_by_role("button", name="Upload", exact=True).click()
        page.get_by_role("link", name="Train on it").click()
        page.get_by_label("Suffix").fill("support")
        page.get_by_role("button", name="Start").click()
        note = page.get_by_role("alert")
        expect(note).to_contain_text("The quota allows no more")
        expect(note).to_contain_text("ask the operator for more")
        expect(page.get_by_label("Suffix")).to_have_value("support")
        expect(page.get_by_role("button", name="Start")).to_be_enabled()
        tab.check(refusals=True)


def test_nobody_is_asked_about_a_job_that_was_cancelled_elsewhere(tab: Tab) -> None:
    page = tab.page
    answer(page, r"/v1/fine_tuning/jobs/[^/]+/events", {"object": "list", "data": [], "has_more": False})
    answer(page, r"/v1/fine_tuning/jobs/[^/]+$", JOB)
    tab.open(f"training/{JOB['id']}")
    page.get_by_role("button", name="Cancel the job").click()
    # Two buttons that cancel would be one too many.
    expect(page.get_by_role("dialog").get_by_role("button")).to_have_text(["", "Let it run", "Cancel the job"])
    answer(page, r"/v1/fine_tuning/jobs/[^/]+$", JOB | {"status": "cancelled"})
    expect(page.get_by_role("region", name="Facts")).to_contain_text("cancelled")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Cancel the job")).to_have_count(0)
    tab.check()


def test_a_failure_has_the_title_of_what_failed(tab: Tab) -> None:
    page = tab.page
    failed = {"code": "process_killed", "message": "the training process was ended by the system", "param": None}
    answer(page, r"/v1/fine_tuning/jobs/[^/]+$", JOB | {"status": "failed", "error": failed})
    answer(page, r"/v1/fine_tuning/jobs/[^/]+/events", {"object": "list", "data": [], "has_more": False})
    tab.open(f"training/{JOB['id']}")
    expect(page.get_by_role("alert")).to_contain_text(re.compile("The job failed.*by the system.*process_killed", re.S))
    tab.open("playground")
    page.get_by_label("Prompt").fill(FAILS_LATER)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("The answer broke off")
    body = {"error": {"message": "the server is stopping", "code": "engine_unavailable"}}
    answer(page, "/v1/generate$", body, 503)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot do it now")
    tab.check(refusals=True)


@pytest.mark.parametrize(
    ("view", "verb", "file"),
    [("upload", "Publish", "new.safetensors"), ("training/files", "Upload", "rows.jsonl")],
)
def test_what_was_chosen_is_there_again_with_another_key(
    browser: Browser, server: Process, writer: AdapterBundle, view: str, verb: str, file: str
) -> None:
    doomed = Keys(server.database).create("acme", SCOPES)
    headers = {"Authorization": f"Bearer {doomed.secret}"}
    # The server looks for new keys now and then.
    wait_until(lambda: httpx.get(f"{server.url}/v1/me", headers=headers).is_success)
    with browsers.tab(browser, server.url) as tab:
        page = tab.open(view, doomed.secret)
        choose(page, file, ROWS if file == "rows.jsonl" else writer.to_bytes())
        if view == "upload":
            page.get_by_label("Name").fill("acme/typed")
        root = {"Authorization": f"Bearer {server.keys['root'].secret}"}
        httpx.delete(f"{server.url}/v1/keys/{doomed.key.id}", headers=root).raise_for_status()
        send = page.get_by_role("button", name=verb, exact=True)
        send.click()
        expect(page.get_by_role("alert")).to_contain_text("is revoked")
        page.get_by_label("Key", exact=True).fill(server.keys["acme"].secret)
        page.keyboard.press("Enter")
        expect(page.locator(".chosen")).to_contain_text(file)
        page.wait_for_function(
            "(name) => document.querySelector('input[type=file]')?.files[0]?.name === name", arg=file
        )
        expect(page.get_by_role("alert")).to_have_count(0)
        send.click()
        if view == "upload":
            expect(page.get_by_text("acme/typed version 1 is published")).to_be_visible()
        else:
            expect(page.locator("tbody tr")).to_contain_text([file])
        tab.check(refusals=True)


def test_an_upload_is_seen_again_by_whoever_comes_back(tab: Tab, writer: AdapterBundle) -> None:
    page = tab.page
    waiting = hold(page, "/v1/adapters$")
    tab.open("upload")
    choose(page, "new.safetensors", writer.to_bytes())
    page.get_by_label("Name").fill("demo/seen")
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("link", name="Quotas").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Quotas")
    page.go_back()
    expect(page.get_by_role("button", name="Publish")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_label("Name")).to_have_value("demo/seen")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("link", name="Quotas").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Quotas")
    waiting[0].fulfill(status=201, json={"adapter": "demo/seen", "version": 1, "warnings": ["it is old"]})
    expect(page.get_by_text("demo/seen version 1 is published.")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("status").filter(has_text="it is old")).to_be_visible()
    # Once: the next visit begins with an empty form.
    page.get_by_role("link", name="Quotas").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Quotas")
    page.go_back()
    expect(page.get_by_label("Name")).to_have_value("")
    expect(page.get_by_text("it is old")).to_have_count(0)
    expect(page.locator(".chosen")).to_have_count(0)
    tab.check()


def test_a_late_answer_leads_nobody_away(tab: Tab, store: AdapterStore, writer: AdapterBundle) -> None:
    store.publish(writer, "demo/old")
    page = tab.page
    answer(page, r"/v1/files\?", {"object": "list", "data": [{"id": "file-1", "filename": "a"}], "has_more": False})
    jobs, deletions = hold(page, "/v1/fine_tuning/jobs$"), hold(page, "/v1/adapters/demo/old$", "DELETE")
    tab.open("training/new?file=file-1")
    page.get_by_role("button", name="Start").click()
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
    jobs[0].fulfill(json=JOB)
    expect(page.get_by_text(f"The job of {JOB['adapter']['name']} is made.")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
    tab.open("adapters/demo/old")
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
    deletions[0].continue_()
    expect(page.get_by_text("demo/old is deleted.")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
    tab.check()


def test_a_link_that_is_followed_while_a_view_comes_is_not_undone(tab: Tab) -> None:
    page = tab.open("quotas")
    # The click falls between the making of the list and its first change of the address.
    page.evaluate(
        """() => {
            const insert = Node.prototype.insertBefore;
            Node.prototype.insertBefore = function (node, before) {
                if (node.matches?.("form.filters")) {
                    Node.prototype.insertBefore = insert;
                    document.querySelector("nav a[href='#/playground']").click();
                }
                return insert.call(this, node, before);
            };
        }"""
    )
    page.get_by_role("link", name="Adapters", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
    expect(page).to_have_url(re.compile("#/playground"))
    tab.check()
