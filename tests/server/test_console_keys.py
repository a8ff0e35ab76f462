"""The console with keys: two tabs with two tenants' keys, scopes, a key that is revoked, parts that come late."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.access import AccessDatabase, CreatedKey, Keys
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support import browser as browsers
from support.live_server import live_server
from support.stub_engine import StubEngine


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory, writer: AdapterBundle, sorter: AdapterBundle) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("console") / "store")
    store.publish(writer, "acme/story")
    store.publish(sorter, "globex/sorter")
    return store


@pytest.fixture(scope="module")
def keys(tenants: AdapterStore) -> Iterator[dict[str, CreatedKey]]:
    database = AccessDatabase(tenants.root)
    made = Keys(database)
    yield {
        "acme": made.create("acme", ["infer", "publish"]),
        "spare": made.create("acme", ["infer", "publish"]),
        "globex": made.create("globex", ["infer"]),
        "root": made.create("root", ["admin"]),
        "doomed": made.create("acme", ["infer"]),
    }
    database.close()


@pytest.fixture(scope="module")
def keyed_url(base: FrozenBase, tenants: AdapterStore, keys: dict[str, CreatedKey]) -> Iterator[str]:
    app = build_app(StubEngine(base), tenants, ServeSettings(store=tenants.root))
    with live_server(app) as address:
        yield address


def test_a_key_is_typed_in_and_forgotten(browser: Browser, keyed_url: str, keys: dict[str, CreatedKey]) -> None:
    with browsers.tab(browser, keyed_url) as tab:
        page = tab.open("playground")
        expect(page.get_by_role("heading", name="sera-serve console")).to_be_visible()
        field = page.get_by_label("Key", exact=True)
        expect(field).to_be_focused()
        assert field.get_attribute("type") == "password"
        field.fill("sk-sera-000000000000-wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("The key was not accepted")
        expect(page.get_by_role("alert")).to_contain_text("The key is unknown")
        field.fill("ключ")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("letters without accents")
        field.fill(f" {keys['acme'].secret} ")
        page.keyboard.press("Enter")
        # To the view that the address names, and in no other place is the key.
        expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
        assert page.evaluate("[localStorage.length, document.cookie, Object.keys(sessionStorage)]") == [
            0,
            "",
            ["sera-serve.key"],
        ]
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("Playground")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Key", exact=True)).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        tab.check(refusals=True)


def test_two_tabs_have_two_keys(browser: Browser, keyed_url: str, keys: dict[str, CreatedKey]) -> None:
    # One context, as in one window of a person: the tabs share cookies and storage, but for the session's.
    with browsers.tab(browser, keyed_url) as tab:
        first = tab.open("adapters", keys["acme"].secret)
        second = first.context.new_page()
        second.goto(f"{keyed_url}/console#/adapters")
        second.get_by_label("Key", exact=True).fill(keys["globex"].secret)
        second.keyboard.press("Enter")
        expect(second.locator("tbody th")).to_have_text(["globex/sorter"])
        first.reload()
        expect(first.locator("tbody th")).to_have_text(["acme/story"])
        expect(first.get_by_role("region", name="Account")).to_contain_text("acmeinferpublish")
        # What is shared with a tenant is used, and not changed.
        first.goto(f"{keyed_url}/console#/adapters/acme/story")
        first.get_by_label("Tenant").fill("globex")
        first.get_by_role("button", name="Share").click()
        expect(first.get_by_text("Shared with globex.")).to_be_visible()
        second.reload()
        expect(second.locator("tbody th")).to_have_text(["acme/story", "globex/sorter"])
        second.get_by_role("link", name="acme/story").click()
        expect(second.get_by_role("link", name="Try it")).to_be_visible()
        expect(second.get_by_role("button", name="Delete")).to_have_count(0)
        expect(second.get_by_role("region", name="Shared with")).to_have_count(0)
        tab.check(refusals=True)


def test_a_view_says_which_scope_it_needs(browser: Browser, keyed_url: str, keys: dict[str, CreatedKey]) -> None:
    with browsers.tab(browser, keyed_url) as tab:
        page = tab.open("adapters", keys["globex"].secret)
        menu = page.get_by_role("navigation", name="Views")
        expect(menu.get_by_role("link")).to_have_text(["Playground", "Classify", "Adapters", "Quotas"])
        page.goto(f"{keyed_url}/console#/keys")
        expect(page.get_by_role("main")).to_contain_text("This needs the scope admin")
        expect(page.get_by_role("main")).to_contain_text("Your key has infer.")
        expect(page.get_by_role("heading", level=1)).to_have_text("Keys")
        # Who comes there by a link is told so by a screen reader, as in any view.
        expect(page.get_by_role("heading", level=1)).to_be_focused()
        expect(page).to_have_title("Keys - sera-serve")
        tab.check()


def test_a_revoked_key_closes_the_page_with_the_reason(
    browser: Browser, keyed_url: str, keys: dict[str, CreatedKey]
) -> None:
    with browsers.tab(browser, keyed_url) as admin_tab, browsers.tab(browser, keyed_url) as tab:
        page = tab.open("adapters", keys["doomed"].secret)
        expect(page.locator("tbody tr").first).to_be_visible()
        admin = admin_tab.open("keys", keys["root"].secret)
        row = admin.get_by_role("row").filter(has_text=keys["doomed"].key.id)
        row.get_by_role("button", name="Revoke").click()
        admin.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        expect(row).to_contain_text("revoked")
        page.get_by_label("Name").fill("story")
        expect(page.get_by_role("alert")).to_contain_text(f"The key {keys['doomed'].key.id} is revoked")
        admin_tab.check()
        tab.check(refusals=True)


def test_another_tenant_sees_nothing_of_what_was_typed(
    browser: Browser, keyed_url: str, keys: dict[str, CreatedKey]
) -> None:
    with browsers.tab(browser, keyed_url) as tab:
        page = tab.open("playground?adapter=acme/story")

        def sign_in(name: str) -> None:
            page.get_by_label("Key", exact=True).fill(keys[name].secret)
            page.keyboard.press("Enter")

        sign_in("acme")
        page.get_by_label("Prompt").fill("a secret of acme")
        page.get_by_role("button", name="Sign out").click()
        sign_in("acme")
        # Whoever comes back goes on.
        expect(page.get_by_label("Prompt")).to_have_value("a secret of acme")
        page.get_by_role("button", name="Sign out").click()
        sign_in("globex")
        expect(page.get_by_role("region", name="Account")).to_contain_text("globex")
        page.get_by_role("link", name="Playground").click()
        expect(page.get_by_label("Prompt")).to_have_value("Once upon a time")
        expect(page.get_by_role("main")).not_to_contain_text("acme")
        assert "acme" not in page.url
        tab.check(refusals=True)


def test_a_late_refusal_of_the_key_before_closes_nothing(
    browser: Browser, keyed_url: str, keys: dict[str, CreatedKey]
) -> None:
    with browsers.tab(browser, keyed_url) as tab:
        page = tab.page
        held: list[Route] = []
        page.route("**/v1/adapters", lambda route: held.append(route))
        tab.open("upload", keys["acme"].secret)
        page.locator("input[type=file]").set_input_files({"name": "a.tar", "mimeType": "", "buffer": b"a"})
        page.get_by_role("button", name="Publish").click()
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        # An upload goes on when its view is left.
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("Key", exact=True).fill(keys["spare"].secret)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("Upload")
        with page.expect_response("**/v1/adapters"):
            held[0].fulfill(status=401, content_type="application/json", body='{"error": {"message": "revoked"}}')
        page.get_by_role("link", name="Quotas").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Quotas")
        expect(page.get_by_role("region", name="Account")).to_contain_text("acme")


def test_who_makes_the_first_key_goes_on_with_it(
    browser: Browser, base: FrozenBase, writer: AdapterBundle, tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path / "store")
    store.publish(writer, "acme/story")
    with (
        live_server(build_app(StubEngine(base), store, ServeSettings(store=store.root))) as url,
        browsers.tab(browser, url) as tab,
    ):
        page = tab.open("keys")
        page.get_by_role("button", name="New key").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Tenant", exact=True).fill("acme")
        dialog.get_by_label("Name (optional)").fill("laptop")
        page.keyboard.press("Enter")
        secret = page.locator(".secret code")
        expect(secret).to_contain_text("sk-sera-")
        expect(page.get_by_role("dialog")).to_contain_text("asks everyone for a key from now on")
        made = secret.text_content()
        page.get_by_role("button", name="I have it").click()
        expect(page.locator("tbody tr")).to_contain_text(["laptop"])
        expect(page.get_by_role("region", name="Account")).to_contain_text("acme")
        assert page.evaluate("sessionStorage.getItem('sera-serve.key')") == made
        tab.check()


@pytest.mark.parametrize("late", ["", "/versions"])
def test_the_parts_of_an_adapters_page_have_one_order_whichever_comes_last(
    browser: Browser, keyed_url: str, keys: dict[str, CreatedKey], late: str
) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    with browsers.tab(browser, keyed_url) as tab:
        page = tab.open("adapters", keys["acme"].secret)
        wanted = re.compile(f"/v1/adapters/acme/story{late}($|[?])")
        page.route(wanted, hold)
        with page.expect_request(wanted):
            page.get_by_role("link", name="acme/story").click()
        titles = page.locator("main h1, main h2")
        expect(titles).to_have_count(3 if late else 2)
        assert held, "the other parts are there, and one is late"
        for route in held:
            route.continue_()
        expect(titles).to_have_text(["acme/story", "Versions", "Shared with"])
        tab.check()
