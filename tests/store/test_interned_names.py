"""No name that a client chooses is interned: CPython 3.12 keeps interned strings for good."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bundle_factory import make_bundle

from adapters_store import AdapterBundle, AdapterStore
from adapters_store.errors import AdapterNotFound


def test_the_store_interns_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path)
    bundle = AdapterBundle.from_bytes(make_bundle(1).to_bytes())
    other = make_bundle(2)
    interned: list[str] = []
    intern = sys.intern

    def recording(text: str) -> str:
        interned.append(text)
        return intern(text)

    monkeypatch.setattr(sys, "intern", recording)
    first, _ = store.publish(bundle, "acme/support"), store.publish(other, "acme/support")
    store.set_alias("acme/support", "stable", "acme/support@v1")
    assert store.resolve("acme/support@stable").digest == store.load(first.digest).digest
    assert store.inspect("acme/support").aliases == {"latest": 2, "stable": 1}
    assert store.config(first.digest) == bundle.config
    assert len(store.list_page().adapters) == len(list(store.iter_adapters("acme"))) == 1
    with pytest.raises(AdapterNotFound):
        store.resolve("nobody/nothing@nowhere")
    store.remove_alias("acme/support", "stable")
    store.delete("acme/support@v2")
    store.delete("acme/support")
    store.collect_garbage()
    assert interned == []
    # What the above would have found.
    assert str(tmp_path / "nobody") and "nobody" in interned
