"""`/v1/models`: its pages, also where the base has the name of an adapter; lists longer than a part; deletions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from adapters_store import AdapterBundle, AdapterStore, Page
from sera_serve.base import freeze_base
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from sera_serve.server.openai import models
from support.factories import random_decoder
from support.live_server import live_server
from support.stub_engine import StubEngine
from support.tenants import bearer, make_key

# Of a tenant: more than the server reads in one turn.
MANY = 2500
NAMES = ["acme/a", "acme/b", "acme/c", "acme/d"]


@pytest.fixture(scope="module", params=NAMES)
def base_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["open", "keys"])
def client(
    request: pytest.FixtureRequest, base_name: str, writer: AdapterBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    root: Path = tmp_path_factory.mktemp("models") / "store"
    store = AdapterStore(root)
    for name in NAMES:
        store.publish(writer, name)
    made = random_decoder()
    base = freeze_base(made.model, made.tokenizer, base_name)
    headers = bearer(make_key(root, "acme").secret) if request.param == "keys" else {}
    with (
        live_server(build_app(StubEngine(base), store, ServeSettings(store=root))) as url,
        httpx.Client(base_url=url, headers=headers) as client,
    ):
        yield client


@pytest.mark.parametrize("at_once", [1, 2, models._AT_ONCE])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
def test_the_pages_end_and_have_each_id_once(
    client: httpx.Client, base_name: str, limit: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_AT_ONCE", at_once)
    others = [name for name in NAMES if name != base_name]
    found: list[str] = []
    query: dict[str, str | int] = {"limit": limit}
    for _ in range(10):
        page = client.get("/v1/models", params=query).json()
        ids = [model["id"] for model in page["data"]]
        # A page is full but for the last one; the base comes on top of the first.
        assert not page["has_more"] or len(ids) == limit + (not found)
        found += ids
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert found == [base_name, *others]
    # The id reaches the base, which has no parent.
    assert client.get(f"/v1/models/{base_name}").json()["parent"] is None


class LongStore(AdapterStore):
    """A store that seems to have `MANY` adapters. It notes the lists that are read from it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[int] = []

    def list_page(
        self,
        tenant: str | None = None,
        after: str | None = None,
        limit: int = 100,
        between: Callable[[], None] | None = None,
    ) -> Page:
        self.read.append(limit)
        one = self.summary("acme/a")
        first = 0 if not after else int(after.removeprefix("acme/")) + 1
        found = tuple(replace(one, adapter=f"acme/{index:05}") for index in range(first, min(first + limit, MANY)))
        return Page(found, found[-1].adapter if first + limit < MANY else None)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_path_without_a_name_says_where_the_names_are(method: str, client: httpx.Client) -> None:
    answer = client.request(method, "/v1/models/")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "GET /v1/models lists them" in answer.json()["error"]["message"]


def test_openai_s_client_which_reads_one_page_lists_every_adapter(writer: AdapterBundle, tmp_path: Path) -> None:
    store = LongStore(tmp_path / "store")
    store.publish(writer, "acme/a")
    base = random_decoder()
    with live_server(build_app(StubEngine(base), store, ServeSettings(store=store.root))) as url:
        listed = OpenAI(base_url=f"{url}/v1", api_key="none").models.list()
        found = [model.id for model in listed]
        assert found == [base.name, *(f"acme/{index:05}" for index in range(MANY))]
        assert listed.model_extra == {"has_more": False, "last_id": found[-1]}
        # In parts, so that a long list does not keep the lists of other clients waiting.
        assert len(store.read) == 3 and max(store.read) <= 1000
        page = OpenAI(base_url=f"{url}/v1", api_key="none").models.list(extra_query={"limit": 2, "after": "acme/02497"})
        assert [model.id for model in page] == ["acme/02498", "acme/02499"]


def test_openai_client_deletes_an_adapter(writer: AdapterBundle, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    for name in ("acme/a", "acme/b"):
        store.publish(writer, name)
    base = random_decoder()
    with (
        live_server(build_app(StubEngine(base), store, ServeSettings(store=store.root))) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        deleted = client.models.delete("acme/a")
        assert (deleted.id, deleted.object, deleted.deleted) == ("acme/a", "model", True)
        assert [model.id for model in client.models.list()] == [base.name, "acme/b"]
        with pytest.raises(NotFoundError):
            client.models.delete("acme/a")
        with pytest.raises(BadRequestError, match="is the base"):
            client.models.delete(base.name)
        with pytest.raises(NotFoundError, match="at most"):
            client.models.delete("acme/" + "a" * 2000)
        assert [model.id for model in client.models.list()] == [base.name, "acme/b"]
