"""The pages of `GET /v1/models` on a server whose base has the name of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.base import freeze_base
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.factories import random_decoder
from support.live_server import live_server
from support.stub_engine import StubEngine
from support.tenants import bearer, make_key

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


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
def test_the_pages_end_and_have_each_id_once(client: httpx.Client, base_name: str, limit: int) -> None:
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
