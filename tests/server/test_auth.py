"""The principal of each request: HTTP decides the principal, and the engine gets it with the request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import AdapterStore
from sera_serve.access import AccessControl, AccessDatabase
from sera_serve.engine import BASE_PRINCIPAL, Principal
from sera_serve.server.auth import Caller, InvalidKey
from support.answers import refused
from support.stub_engine import StubEngine

GENERATE, CLASSIFY = "/v1/generate", "/v1/classify"


@pytest.mark.parametrize(
    ("path", "body", "principal"),
    [
        (GENERATE, {"adapter": "acme/writer", "prompt": "a"}, Principal("acme")),
        (GENERATE, {"adapter": "acme/writer@v3", "prompt": "a", "stream": True}, Principal("acme")),
        (GENERATE, {"prompt": "a"}, BASE_PRINCIPAL),
        (GENERATE, {"adapter": None, "prompt": "a", "stream": True}, BASE_PRINCIPAL),
        (CLASSIFY, {"adapter": "zoo/sorter@stable", "inputs": ["a"]}, Principal("zoo")),
    ],
)
def test_the_principal_has_the_tenant_of_the_adapter(
    client: httpx.Client, engine: StubEngine, path: str, body: dict[str, Any], principal: Principal
) -> None:
    assert client.post(path, json=body).status_code == 200
    assert engine.principals == [principal]


@pytest.mark.parametrize("adapter", ["acme", "acme/../x", "_base/x", "Acme/x", "acme/x@"])
@pytest.mark.parametrize(
    ("path", "body"),
    [(GENERATE, {"prompt": "a"}), (GENERATE, {"prompt": "a", "stream": True}), (CLASSIFY, {"inputs": ["a"]})],
)
def test_an_unreadable_reference_never_reaches_the_engine(
    client: httpx.Client, engine: StubEngine, path: str, body: dict[str, Any], adapter: str
) -> None:
    refused(client.post(path, json={"adapter": adapter} | body), 422, "invalid_adapter_name")
    assert engine.principals == []


def test_a_caller_takes_turns_as_its_tenant_and_without_a_key_as_its_address(tmp_path: Path) -> None:
    access = AccessControl(AccessDatabase(AdapterStore(tmp_path).root))
    guest = Caller(access, None, "10.0.0.9")
    guest.check_still_accepted()
    key = access.keys.create("acme", ["infer"]).key
    access.refresh()
    assert (Caller(access, key, "10.0.0.9").owner, guest.owner) == ("acme", "10.0.0.9")
    # A long answer that began before the first key was made.
    with pytest.raises(InvalidKey, match="this server needs a key now"):
        guest.check_still_accepted()
    access.database.close()
