"""A bundle is the same in every container, and its digest depends on all of its content and on nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tarfile
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bundle_factory import Q, config_fields, fill, make_bundle, make_classifier
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import safetensors_bytes, split_file, tar_bytes, two_files

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, export_peft
from adapters_store.format import bundle as bundle_module

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def modules(draw: st.DrawFn) -> dict[str, object]:
    split = draw(st.sampled_from([1, 2, 3]))
    return {
        "d_in": split * draw(st.integers(1, 4)),
        "d_out": split * draw(st.integers(1, 4)),
        "rank": split * draw(st.integers(1, 3)),
        "split": split,
        "use_mixer": draw(st.booleans()),
        "scaling": draw(st.floats(-1e6, 1e6)),
    }


@st.composite
def bundles(draw: st.DrawFn) -> AdapterBundle:
    paths = st.from_regex(r"\A[a-z_0-9]{1,5}(\.[a-zA-Z_0-9]{1,5}){0,2}\Z")
    head = {}
    if draw(st.booleans()):
        labels = draw(st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=4, unique=True))
        head = {"task": "classify", "labels": labels, "pooling": "cls"}
    fields = config_fields(
        modules=draw(st.dictionaries(paths, modules(), min_size=1, max_size=3)),
        training=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
        **head,
    )
    return fill(AdapterConfig.from_json(json.dumps(fields)), draw(st.integers(0, 1000)), draw(DTYPES))


def assert_same(left: AdapterBundle, right: AdapterBundle) -> None:
    assert left.config == right.config
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert tensor.dtype == right.tensors[name].dtype
        assert torch.equal(tensor, right.tensors[name])
    assert left.digest == right.digest


@settings(deadline=None, max_examples=60)
@given(bundles())
def test_every_container_gives_the_same_bundle(bundle: AdapterBundle) -> None:
    single = bundle.to_bytes()
    config, model = two_files(bundle)
    assert_same(bundle, AdapterBundle.from_bytes(single))
    assert_same(bundle, AdapterBundle.from_bytes(bytearray(single)))
    assert_same(bundle, AdapterBundle.from_bytes(memoryview(b"x" + single)[1:]))
    assert_same(bundle, AdapterBundle.from_bytes(memoryview(bytearray(b"x" + single))[1:]))
    members = (("adapter_config.json", config), ("adapter_model.safetensors", model))
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert_same(bundle, AdapterBundle.from_bytes(tar_bytes(*members, format=format)))
        inside = [(f"some directory/{name}", content) for name, content in reversed(members)]
        assert_same(bundle, AdapterBundle.from_bytes(tar_bytes(*inside, format=format)))


@settings(deadline=None, max_examples=30)
@given(bundles())
def test_what_we_write_the_library_reads(bundle: AdapterBundle) -> None:
    read = safetensors.torch.load(bundle.to_bytes())
    assert read.keys() == bundle.tensors.keys()
    assert all(torch.equal(tensor, bundle.tensors[name]) for name, tensor in read.items())


def test_directory_and_files_on_disk(tmp_path: Path) -> None:
    bundle = make_classifier()
    bundle.save(tmp_path / "new" / "bundle")
    bundle.save_file(tmp_path / "bundle.safetensors")
    with tarfile.open(tmp_path / "bundle.tar", "w") as archive:
        archive.add(tmp_path / "new" / "bundle", "bundle")
    for path in ("new/bundle", "bundle.safetensors", "bundle.tar"):
        assert_same(bundle, AdapterBundle.load(tmp_path / path))
    assert sorted(path.name for path in (tmp_path / "new/bundle").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_on_disk_have_the_permissions_of_any_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    bundle = make_classifier()
    before = os.umask(umask)
    try:
        bundle.save(tmp_path / "bundle")
        bundle.save_file(tmp_path / "bundle.safetensors")
        export_peft(bundle, tmp_path / "peft")
        AdapterStore(tmp_path / "store").publish(bundle, "acme/mine")
    finally:
        os.umask(before)
    written = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".json"))
    assert [path.name for path in written].count("adapter_model.safetensors") == 2
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in written} == {path.name: mode for path in written}
    # A file that is replaced keeps its own.
    (tmp_path / "bundle.safetensors").chmod(0o640)
    bundle.save_file(tmp_path / "bundle.safetensors")
    assert stat.S_IMODE((tmp_path / "bundle.safetensors").stat().st_mode) == 0o640


def test_tensors_stored_in_another_order_are_the_same_bundle() -> None:
    bundle = make_bundle()
    header, data = split_file(bundle.to_bytes())
    metadata = header.pop("__metadata__")
    shuffled, reordered = {"__metadata__": {"format": "pt", **metadata}}, b""
    for name in sorted(header, reverse=True):
        begin, end = header[name]["data_offsets"]
        offsets = [len(reordered), len(reordered) + end - begin]
        shuffled[name] = {**header[name], "data_offsets": offsets}
        reordered += data[begin:end]
    assert_same(bundle, AdapterBundle.from_bytes(safetensors_bytes(shuffled, reordered)))


def test_digest_follows_the_written_definition() -> None:
    bundle = make_bundle(training={"note": "é", "rate": 1e-4})
    names = sorted(bundle.tensors)
    manifest = json.dumps(
        {
            "config": bundle.config.model_dump(),
            "tensors": [[name, "F32", list(bundle.tensors[name].shape)] for name in names],
        },
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    digest = hashlib.sha256(len(manifest).to_bytes(8, "little") + manifest)
    for name in names:
        digest.update(bundle.tensors[name].numpy().tobytes())
    assert bundle.digest == digest.hexdigest()


def test_digest_is_pinned() -> None:
    """A change of this value orphans every digest that clients hold: it needs a new format version."""
    config = AdapterConfig.from_json(json.dumps(config_fields()))
    zeros = AdapterBundle(config, {name: torch.zeros_like(t) for name, t in fill(config).tensors.items()})
    assert zeros.digest == "2c0c15cf2a10ec064fcf480f471b0445e6084e212c58d56ec0e5f82c9f87b889"


@pytest.mark.parametrize("what", ["value", "sign of zero", "dtype", "config", "training"])
def test_digest_depends_on_all_content(what: str) -> None:
    bundle = make_bundle()
    tensors = {name: tensor.clone() for name, tensor in bundle.tensors.items()}
    tensors[f"{Q}.sera_c"][3, 3] = 0.0
    reference = AdapterBundle(bundle.config, tensors)
    config = bundle.config
    if what == "value":
        tensors[f"{Q}.sera_b"][1, 11] += 1
    elif what == "sign of zero":
        tensors[f"{Q}.sera_c"][3, 3] = -0.0
    elif what == "dtype":
        tensors[f"{Q}.sera_a"] = tensors[f"{Q}.sera_a"].half()
    else:
        change = {"config": {"method": "moslora"}, "training": {"training": {"seed": 1}}}[what]
        config = config.model_copy(update=change)
    assert AdapterBundle(config, tensors).digest != reference.digest


@pytest.mark.parametrize("hashed_from", [0, 1 << 20])
def test_spelling_of_the_configuration_does_not_matter(hashed_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # From so many bytes on a thread hashes what was written, while it is checked.
    monkeypatch.setattr(bundle_module, "_HASHED_BESIDE_FROM", hashed_from)
    bundle = make_bundle()
    assert AdapterBundle.from_bytes(bundle.to_bytes()).digest == bundle.digest
    config, model = two_files(bundle)
    value = json.loads(config)
    value["modules"][Q]["scaling"] = 0.50
    for name in ("labels", "pooling", "max_length"):
        del value[name]
    respelled = json.dumps(dict(reversed(value.items())), indent=3).encode()
    members = (("adapter_config.json", respelled), ("adapter_model.safetensors", model))
    assert AdapterBundle.from_bytes(tar_bytes(*members)).digest == bundle.digest


def test_a_bundle_is_read_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(bundle_module, "_HASHED_BESIDE_FROM", 0)
    bundle = make_bundle()
    data = bundle.to_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        read = AdapterBundle.from_bytes(data)
        assert read.digest == bundle.digest


def test_bundle_does_not_follow_the_training_that_goes_on() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 2))
    source = make_bundle()
    bundle = AdapterBundle(source.config, {**source.tensors, f"{Q}.sera_a": weight})
    digest = bundle.digest
    with torch.no_grad():
        weight.add_(1)
    assert not bundle.tensors[f"{Q}.sera_a"].requires_grad
    assert AdapterBundle(bundle.config, bundle.tensors).digest == digest


def test_views_and_tied_tensors_are_written_whole() -> None:
    source = make_bundle()
    square = torch.randn(8, 8)
    tensors = {**source.tensors, f"{Q}.sera_a": square.T[:, 2:4], f"{Q}.sera_c": square[:4, :4]}
    tensors[f"{Q}.sera_b"] = torch.ones(1, 1).expand(2, 12)
    bundle = AdapterBundle(source.config, tensors)
    assert torch.equal(AdapterBundle.from_bytes(bundle.to_bytes()).tensors[f"{Q}.sera_a"], square.T[:, 2:4])


def test_read_tensors_can_be_written_to() -> None:
    for data in (make_bundle().to_bytes(), bytearray(make_bundle().to_bytes())):
        for tensor in AdapterBundle.from_bytes(data).tensors.values():
            tensor.zero_()


def test_the_size_of_the_file_is_known_before_it_is_written() -> None:
    texts = ["", "\u4e00" * 1000, '"\\\n\t\x01\x7f/\u2028' * 100, *("a" * length for length in range(1, 9))]
    for seed, text in enumerate(texts):
        bundle = make_bundle(seed, training={"description": text})
        tensors = dict(bundle.tensors)
        for name, dtype in zip(list(tensors)[1:], (torch.float16, torch.bfloat16, torch.float32), strict=False):
            tensors[name] = tensors[name].to(dtype)
        for made in (bundle, make_classifier(seed), AdapterBundle(bundle.config, tensors)):
            assert made.file_bytes == len(made.to_bytes())
            assert AdapterBundle.from_bytes(made.to_bytes()).file_bytes == made.file_bytes


def test_sizes() -> None:
    bundle = make_classifier()
    assert bundle.config.parameters == (8 + 12) * 2 + 16 + 2 * 6 + 2
    assert bundle.nbytes == 4 * bundle.config.parameters
