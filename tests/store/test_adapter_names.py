"""Adapter ids and references are checked before any path is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundle_factory import make_bundle
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import AdapterStore, InvalidAdapterName, parse_adapter, parse_ref

BAD_NAMES = [
    "",
    "alone",
    "/name",
    "tenant/",
    "a/b/c",
    "../etc/passwd",
    "tenant/..",
    "tenant/../name",
    "tenant/a..b",
    "./name",
    "tenant/.hidden",
    "tenant/-option",
    "tenant/Name",
    "tenant/na me",
    "tenant/name\n",
    "tenant/name\0",
    "tenant/n\u00e4me",
    "tenant/name%2f..",
    "tenant\\name",
    "tenant/" + "a" * 65,
    "//",
    None,
    7,
    ["tenant/name"],
]
BAD_SELECTORS = ["", "v0", "v01", "V1", "a/b", "..", "abc@d", "v1 ", "\n", "f" * 65]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_bad_names_touch_nothing(name: object, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    for use in (
        lambda: store.publish(make_bundle(), name),  # type: ignore[arg-type]
        lambda: store.resolve(name),  # type: ignore[arg-type]
        lambda: store.inspect(name),  # type: ignore[arg-type]
        lambda: store.delete(name),  # type: ignore[arg-type]
        lambda: store.set_alias(name, "stable", "tenant/name"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidAdapterName) as refusal:
            use()
        assert (refusal.value.code, refusal.value.status) == ("invalid_adapter_name", 422)
        assert refusal.value.param in ("adapter", "tenant", "name")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("selector", BAD_SELECTORS, ids=repr)
def test_bad_selectors_are_refused(selector: str) -> None:
    with pytest.raises(InvalidAdapterName):
        parse_ref(f"tenant/name@{selector}")


def test_references() -> None:
    assert parse_ref("t/n") == parse_ref("t/n@latest")
    assert parse_ref("t/n@v12").selector == 12
    assert parse_ref("t/n@0123abcd").by_digest
    # Seven digits are too few to be a digest.
    assert parse_ref("t/n@0123abc").selector == "0123abc"
    assert not parse_ref("t/n@0123abc").by_digest
    assert parse_ref("t/n@v1.2").selector == "v1.2"
    assert parse_adapter("a.b_c-d/0") == ("a.b_c-d", "0")


@pytest.mark.parametrize("alias", ["v3", "0123abcd", "..", "Stable", ""])
def test_alias_cannot_be_mistaken(alias: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    store.publish(make_bundle(), "t/n")
    with pytest.raises(InvalidAdapterName) as refusal:
        store.set_alias("t/n", alias, "t/n@v1")
    assert refusal.value.param == "alias"


@pytest.mark.parametrize("digest", ["", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n"])
def test_load_takes_a_whole_digest(digest: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterName):
        AdapterStore(tmp_path).load(digest)


@given(st.text(max_size=20))
def test_accepted_names_stay_one_path_part(text: str) -> None:
    try:
        tenant, name = parse_adapter(f"t/{text}")
    except InvalidAdapterName:
        return
    assert Path(tenant, name).parts == ("t", text)
    assert (Path("/root") / tenant / name).resolve() == Path("/root/t") / text
