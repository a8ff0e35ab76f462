"""A header is read alike with kept tables, which only the form has that the library writes, and without."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from bundle_factory import make_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import safetensors_bytes
from wrong_files import ENTRIES, OUTSIDE, TENSORS

from adapters_store import AdapterBundle, AdapterStore, BundleLimits, InvalidBundle
from adapters_store.format import bundle as bundle_module
from adapters_store.format.safetensors_file import Header, parse_header
from adapters_store.format.tensor_table import KEPT_CHARACTERS, kept_table

ENTRY = '"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def outcome(data: bytes, kept_tables: bool = True) -> Header | tuple[type[InvalidBundle], str | None, str]:
    try:
        return parse_header(memoryview(data), len(data), BundleLimits(), kept_tables=kept_tables)
    except InvalidBundle as error:
        return type(error), error.param, str(error)


def assert_read_alike(data: bytes) -> None:
    assert outcome(data) == outcome(data, kept_tables=False)


@pytest.mark.parametrize("case", [*OUTSIDE, *ENTRIES, *TENSORS])
def test_what_is_refused_is_refused_alike(case: str) -> None:
    assert_read_alike((OUTSIDE | ENTRIES | TENSORS)[case][0])


@pytest.mark.parametrize(
    "header",
    [
        f'{{"__metadata__":{{"a":"b"}},{ENTRY}}}',
        f'{{"__metadata__":{{}},{ENTRY}}}',
        '{"__metadata__":{"a":"b"}}',
        '{"__metadata__":{"a":"b"},}',
        '{"__metadata__":{"a":"b"}, }',
        '{"__metadata__":{"a":"b"},\n} ',
        # Twice: a tensor may not have this name.
        '{"__metadata__":{"a":"b"},"__metadata__":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        f'{{"__metadata__":{{"a":"b"}},{ENTRY},{ENTRY}}}',
        f'{{"__metadata__":{{"a":"b","a":"c"}},{ENTRY}}}',
        f'{{"__metadata__":{{"a":"b",}},{ENTRY}}}',
        f'{{"__metadata__":{{"a":"b""c":"d"}},{ENTRY}}}',
        f'{{"__metadata__":{{"a":"\\x"}},{ENTRY}}}',
        f'{{"__metadata__":{{"a":"\\ud800"}},{ENTRY}}}',
        f'{{"__metadata__":{{"a":"\t"}},{ENTRY}}}',
        f'{{"__metadata__":{{"a":1}},{ENTRY}}}',
        f'{{"__metadata__":{{"a":"b"}},,{ENTRY}}}',
        f'{{"__metadata__":{{"a":"b"}},{ENTRY}}} ',
        f'{{"__metadata__":{{"a":"b"}},{ENTRY}}}x',
        f'{{"__metadata__":{{"a":"}},\\"{{"}},{ENTRY}}}',
        f'{{"__metadata__":{{"a":"b\\\\"}},{ENTRY}}}',
    ],
)
def test_odd_headers_are_read_alike(header: str) -> None:
    assert_read_alike(safetensors_bytes(header, bytes(8)))


@settings(deadline=None, max_examples=500)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from('{}[]",:\\0a \n\u4e00'), st.booleans()),
        min_size=1,
        max_size=3,
    )
)
def test_damaged_headers_are_read_alike(edits: list[tuple[float, str, bool]]) -> None:
    header = f'{{"__metadata__":{{"adapter_config":"{{\\"a\\":\\"b\\\\\\\\\\"}}","format":"pt"}},{ENTRY}}}'
    for place, piece, overwrite in edits:
        at = int(place * len(header))
        header = header[:at] + piece + header[at + overwrite :]
    assert_read_alike(safetensors_bytes(header, bytes(8)))


def test_adapters_of_one_kind_share_their_table_and_nothing_else() -> None:
    first, second = (make_bundle(seed, training={"seed": seed}).to_bytes() for seed in (1, 2))
    headers = [outcome(data) for data in (first, second)]
    assert isinstance(headers[0], Header) and isinstance(headers[1], Header)
    assert headers[0].table is headers[1].table and headers[0].metadata != headers[1].metadata
    for seed, data in ((1, first), (2, second)):
        read, made = AdapterBundle.from_bytes(data, kept_tables=True), make_bundle(seed, training={"seed": seed})
        assert read.config == made.config and read.digest == made.digest
        assert read.tensors.keys() == made.tensors.keys()
        assert all(torch.equal(read.tensors[name], tensor) for name, tensor in made.tensors.items())


def test_the_padding_makes_no_other_kind() -> None:
    """A header is as long as a multiple of 8 bytes, whatever the length of the configuration."""
    sizes = range(8)
    headers = [outcome(make_bundle(1, training={"note": "x" * size}).to_bytes()) for size in sizes]
    assert len({id(header.table) for header in headers if isinstance(header, Header)}) == 1


def test_only_a_store_keeps_tables(tmp_path: Path) -> None:
    """An upload fills no memory, and takes the same time whatever others have uploaded."""
    store, bundle = AdapterStore(tmp_path), make_bundle(1)
    kept_table.cache_clear()
    AdapterBundle.from_bytes(bundle.to_bytes())
    parse_header(memoryview(bundle.to_bytes()), len(bundle.to_bytes()), BundleLimits())
    store.publish(bundle, "acme/a")
    bundle.save(tmp_path / "folder")
    AdapterBundle.load(tmp_path / "folder")
    assert kept_table.cache_info().currsize == 0
    store.load(bundle.digest)
    assert kept_table.cache_info().currsize == 1


def test_a_large_bundle_that_is_hashed_delays_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    small, let_go = make_bundle(2), threading.Event()
    own = bundle_module.hash_meanwhile

    def hash_late(manifest: str, data: Sequence[memoryview]) -> Callable[[], str]:
        def wait() -> str:
            assert let_go.wait(20)
            return own(manifest, data)()

        return wait

    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "hash_meanwhile", hash_late)
        large = AdapterBundle.from_bytes(make_bundle(1).to_bytes())
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(lambda: large.digest)
        try:
            read = AdapterBundle.from_bytes(small.to_bytes())
            assert threads.submit(lambda: read.digest).result(10) == small.digest
            assert not late.done()
        finally:
            let_go.set()
        assert late.result(10) == make_bundle(1).digest


def test_a_long_header_is_read_and_not_kept() -> None:
    """A hostile file cannot fill the memory with tables."""
    entries = {f"t{i:06}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(5000)}
    header = {"__metadata__": {"format": "pt"}, **entries}
    data = safetensors_bytes(header, bytes(4 * len(entries)))
    assert len(json.dumps(entries)) > KEPT_CHARACTERS
    before = kept_table.cache_info()
    read = outcome(data)
    assert isinstance(read, Header) and len(read.table.entries) == len(entries)
    assert kept_table.cache_info() == before
    assert_read_alike(data)


def test_few_tables_are_kept() -> None:
    for size in range(1, 100):
        entry = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
        outcome(safetensors_bytes({"__metadata__": {"format": "pt"}, "x": entry}, bytes(4 * size)))
    assert kept_table.cache_info().currsize <= 16


def test_the_elements_of_each_tensor() -> None:
    bundle = make_bundle()
    mixed = dict(bundle.tensors)
    for name, dtype in zip(mixed, (torch.float16, torch.bfloat16, torch.float32), strict=False):
        mixed[name] = mixed[name].to(dtype)
    # One byte more in front: no tensor lies on a boundary.
    for made, shift in ((bundle, 0), (bundle, 1), (AdapterBundle(bundle.config, mixed), 0)):
        whole = made.to_bytes()
        if shift:
            length = int.from_bytes(whole[:8], "little")
            whole = (length + shift).to_bytes(8, "little") + whole[8 : 8 + length] + b" " * shift + whole[8 + length :]
        for given_bundle in (made, AdapterBundle.from_bytes(whole)):
            flat = given_bundle.flat_tensors()
            assert flat.keys() == made.tensors.keys()
            for name, tensor in made.tensors.items():
                assert flat[name].dtype == tensor.dtype and torch.equal(flat[name], tensor.reshape(-1))
