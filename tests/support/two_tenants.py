"""A server with keys, and two tenants who each have something that the other must not learn of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from fastapi import FastAPI

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.access import AccessDatabase, Keys, Shares
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.factories import random_adapter
from support.live_server import live_server

SHAPE = SeraConfig(8, 4, 16.0, ("q_proj", "v_proj", "down_proj"))
TENANTS = ("alpha", "beta-")
SCOPES = ("infer", "publish", "train")


@dataclass
class TwoTenants:
    """A running server.

    Attributes:
        url: Its address.
        app: The app.
        engine: The engine.
        store: Has `secret`, `sorter` and `shared` of each tenant; `shared` is shared with everyone.
        keys: The secret of each tenant's key, and of the `admin`.
        key_ids: The keys' ids.
        bundles: By adapter.
    """

    url: str
    app: FastAPI
    engine: ServingEngine
    store: AdapterStore
    keys: dict[str, str]
    key_ids: dict[str, str]
    bundles: dict[str, AdapterBundle]

    def restore(self) -> None:
        """Publish and share again what was deleted. Keys that were revoked stay so."""
        for name, bundle in self.bundles.items():
            self.store.publish(bundle, name)
        for tenant in TENANTS:
            self.app.state.access.shares.add(f"{tenant}/shared", "*")

    def client(self, who: str) -> httpx.Client:
        """A client with a key of `alpha`, `beta-` or `admin`."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.keys[who]}"}, timeout=30)


def twin_of(name: str) -> str:
    """A name of the same length that nobody has, at the same place among the names that are there.

    A list goes on after any name: after one at another place, it has other adapters, and that tells nothing.
    """
    return name.replace("secret", "secrex").replace("sorter", "sortex")


@contextmanager
def two_tenants(base: FrozenBase, folder: Path, **settings: object) -> Iterator[TwoTenants]:
    """Serve a base to two tenants with keys of their own."""
    store = AdapterStore(folder / "store")
    bundles: dict[str, AdapterBundle] = {}
    for number, tenant in enumerate(TENANTS):
        bundles[f"{tenant}/secret"] = random_adapter(base, SHAPE, 10 * number, strength=0.5)
        bundles[f"{tenant}/shared"] = random_adapter(base, SHAPE, 10 * number + 1, strength=0.5)
        bundles[f"{tenant}/sorter"] = random_adapter(base, SHAPE, 10 * number + 2, labels=["no", "yes"])
    for name, bundle in bundles.items():
        store.publish(bundle, name)
    database = AccessDatabase(store.root)
    made = {who: Keys(database).create(who, SCOPES) for who in TENANTS}
    made["admin"] = Keys(database).create("operators", ["admin"])
    for tenant in TENANTS:
        Shares(database).add(f"{tenant}/shared", "*")
    database.close()
    chosen = {"pool_mib": 8, "kv_cache_tokens": 8192, "cpu_threads": 1, "store": store.root} | settings
    engine = ServingEngine(base, store, ServeSettings(**chosen))  # type: ignore[arg-type]
    app = build_app(engine, store, engine.settings)
    secrets = {who: created.secret for who, created in made.items()}
    with live_server(app) as url:
        yield TwoTenants(url, app, engine, store, secrets, {w: c.key.id for w, c in made.items()}, bundles)
