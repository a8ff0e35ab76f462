"""PEFT checkpoints over HTTP: uploads, loading by path, and a watched directory."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from adapters_store.errors import StoreWriteFailed
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app, watcher
from sera_serve.server.publishing import Publisher
from support.answers import refused
from support.live_server import live_server, wait_until
from support.peft_checkpoints import CONFIG, WEIGHTS, edit_config, save_checkpoint
from support.stub_engine import StubEngine


@pytest.fixture(scope="module")
def checkpoint(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(base.model, tmp_path_factory.mktemp("peft") / "adapter")


def zipped(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    return buffer.getvalue()


def test_an_upload_is_imported(client: httpx.Client, store: AdapterStore, checkpoint: Path) -> None:
    answer = client.post("/v1/adapters", files={"bundle": zipped(checkpoint)}, data={"name": "acme/zipped"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["warnings"] == []
    bundle = store.load(answer.json()["digest"])
    assert bundle.config.method == "lora"
    files = {"bundle": (checkpoint / WEIGHTS).read_bytes(), "config": (checkpoint / CONFIG).read_bytes()}
    again = client.post("/v1/adapters", files=files, data={"name": "acme/zipped"})
    assert again.json() == answer.json()


def test_uploads_that_are_refused(
    client: httpx.Client, checkpoint: Path, writer: AdapterBundle, tmp_path: Path
) -> None:
    def upload(files: dict[str, bytes], data: dict[str, str] | None = None) -> httpx.Response:
        return client.post("/v1/adapters", files=files, data={"name": "acme/bad"} | (data or {}))

    weights = (checkpoint / WEIGHTS).read_bytes()
    assert refused(upload({"bundle": weights}), 422, "missing_file")["param"] == CONFIG
    assert refused(upload({"bundle": weights, "config": b"{"}), 422, "invalid_config")["param"] == CONFIG
    twice = upload({"bundle": writer.to_bytes(), "config": b'{"peft_type": "LORA"}'})
    assert refused(twice, 422, "invalid_config")["param"] == "config"
    assert refused(upload({"bundle": weights}, {"config": "{}"}), 422, "invalid_request")["param"] == "config"
    long = upload({"bundle": weights, "config": bytes((1 << 20) + 1)})
    assert refused(long, 400, "invalid_multipart")["param"] == "config"
    absurd = (1 << 63).to_bytes(8, "little") + b"{"
    damaged = {b"": "truncated", b"x": "truncated", bytes(8): "not_safetensors", absurd: "not_safetensors"}
    for data, code in damaged.items():
        for files in ({"bundle": data}, {"bundle": data, "config": (checkpoint / CONFIG).read_bytes()}):
            refused(upload(files), 422, code)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "dora"))
    edit_config(folder, use_qalora=True)
    error = refused(upload({"bundle": zipped(folder)}), 422, "unsupported_adapter")
    assert error["param"] == "adapter_config.use_qalora"


def test_loading_by_path_is_off_by_default(client: httpx.Client) -> None:
    body = {"lora_name": "acme/by-path", "lora_path": "/etc"}
    error = refused(client.post("/v1/load_lora_adapter", json=body), 403, "loading_by_path_disabled")
    assert "--lora-path-root" in error["message"]
    refused(client.post("/v1/unload_lora_adapter", json={"lora_name": "demo/writer"}), 403, "loading_by_path_disabled")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, writer: AdapterBundle) -> Path:
    root = tmp_path_factory.mktemp("allowed")
    shutil.copytree(checkpoint, root / "team" / "adapter")
    writer.save(root / "bundle")
    (root / "out").symlink_to(checkpoint)
    (root / "dangling").mkdir()
    for name in (CONFIG, WEIGHTS):
        (root / "dangling" / name).symlink_to("nowhere")
    return root


@pytest.fixture(scope="module")
def loading(base: FrozenBase, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    store = AdapterStore(tmp_path_factory.mktemp("loading") / "store")
    settings = ServeSettings(store=store.root, lora_path_root=root, quotas={"full": {"bytes": 0}})
    app = build_app(StubEngine(base), store, settings)
    with live_server(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client


def test_load_and_unload(loading: httpx.Client, root: Path) -> None:
    def load(name: str, path: object, **fields: object) -> httpx.Response:
        return loading.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})

    assert load("acme/one", "team/adapter").status_code == 200
    # The same again is no other adapter; another content needs load_inplace.
    assert load("acme/one", root / "team" / "adapter").json()["version"] == 1
    assert refused(load("acme/one", "bundle"), 400, "adapter_exists")["param"] == "lora_name"
    assert load("acme/one", "bundle", load_inplace=True).json()["version"] == 2
    assert loading.get("/v1/adapters/acme/one").json()["version"] == 2
    assert loading.post("/v1/unload_lora_adapter", json={"lora_name": "acme/one"}).status_code == 200
    gone = loading.post("/v1/unload_lora_adapter", json={"lora_name": "acme/one"})
    assert refused(gone, 404, "adapter_not_found")["param"] == "lora_name"
    refused(
        loading.post("/v1/unload_lora_adapter", json={"lora_name": "acme/one", "lora_int_id": 3}), 422, "invalid_value"
    )


def test_what_is_wrong_with_the_adapter_is_said_of_its_path(loading: httpx.Client, root: Path) -> None:
    (root / "cut.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    for name, path, status, code in (
        ("acme/cut", "cut.zip", 422, "truncated"),
        ("full/one", "team/adapter", 403, "quota_exceeded"),
    ):
        answer = loading.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        assert refused(answer, status, code)["param"] == "lora_path"


def test_zeros_in_an_archive_are_refused_by_their_shape(loading: httpx.Client, checkpoint: Path) -> None:
    """50 KiB of an archive would take gigabytes, and many seconds."""
    rank, prefix = 200_000, "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    size = rank * 64 * 2
    shapes = {"A": ([rank, 64], [0, size]), "B": ([64, rank], [size, 2 * size])}
    header = json.dumps(
        {
            f"{prefix}{part}.weight": {"dtype": "F16", "shape": shape, "data_offsets": place}
            for part, (shape, place) in shapes.items()
        }
    ).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(WEIGHTS, len(header).to_bytes(8, "little") + header + bytes(2 * size))
        archive.write(checkpoint / CONFIG, CONFIG)
    answer = loading.post("/v1/adapters", files={"bundle": buffer.getvalue()}, data={"name": "acme/bomb"})
    error = refused(answer, 422, "adapter_too_large")
    assert error["param"] == f"{prefix}A.weight"
    assert f"the rank {rank} of " in error["message"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("..", 403, "path_not_allowed"),
        ("team/../../x", 403, "path_not_allowed"),
        ("/etc", 403, "path_not_allowed"),
        ("out", 403, "path_not_allowed"),
        ("out/adapter_model.safetensors", 403, "path_not_allowed"),
        ("a\0b", 422, "invalid_request"),
        ("nothing-here", 422, "missing_file"),
        ("dangling", 422, "missing_file"),
        ("dangling/adapter_config.json", 422, "missing_file"),
    ],
)
def test_no_path_leaves_the_directory(path: str, status: int, code: str, loading: httpx.Client, root: Path) -> None:
    answer = loading.post("/v1/load_lora_adapter", json={"lora_name": "acme/two", "lora_path": path})
    # Where the directory lies on the server is not the client's to know.
    assert str(root.parent) not in refused(answer, status, code)["message"]


def test_a_name_without_a_tenant(loading: httpx.Client) -> None:
    answer = loading.post("/v1/load_lora_adapter", json={"lora_name": "sql-lora", "lora_path": "team/adapter"})
    assert refused(answer, 422, "invalid_adapter_name")["param"] == "lora_name"


@pytest.fixture
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "POLL_S", 0.05)


@pytest.mark.usefixtures("fast_polls")
def test_a_watched_directory(
    base: FrozenBase, checkpoint: Path, writer: AdapterBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = tmp_path / "watched"
    (watched / "acme").mkdir(parents=True)
    shutil.copytree(checkpoint, watched / "acme" / "early")
    store = AdapterStore(tmp_path / "store")
    store.publish(writer, "acme/by-hand")
    engine = StubEngine(base)

    def names() -> set[str]:
        return {info.adapter for info in store.iter_adapters()}

    def errors() -> list[str]:
        return [record.message for record in caplog.records if record.levelno >= logging.ERROR]

    with caplog.at_level(logging.INFO, "sera_serve.watch"):
        with live_server(build_app(engine, store, ServeSettings(store=store.root, watch=watched))):
            wait_until(lambda: "acme/early" in names())
            # Half of a copy is refused once, and published when it is whole.
            half = watched / "acme" / "late"
            half.mkdir()
            shutil.copy(checkpoint / CONFIG, half)
            wait_until(lambda: len(errors()) == 1)
            assert "adapter_model.safetensors" in errors()[0]
            shutil.copy(checkpoint / WEIGHTS, half)
            wait_until(lambda: "acme/late" in names())
            (watched / "acme" / "packed.safetensors").write_bytes(writer.to_bytes())
            wait_until(lambda: "acme/packed" in names())
            # Another content makes another version.
            edit_config(half, lora_alpha=99)
            wait_until(lambda: store.inspect("acme/late").versions == (1, 2))
            shutil.rmtree(half)
            (watched / "acme" / "packed.safetensors").unlink()
            wait_until(lambda: names() == {"acme/early", "acme/by-hand"})
            # Other adapters have the content of all but one version.
            wait_until(lambda: len(engine.deleted) == 1)
            # A directory that was unmounted is no reason to withdraw anything.
            shutil.move(watched, tmp_path / "away")
            wait_until(lambda: any("cannot be read" in message for message in errors()))
            assert names() == {"acme/early", "acme/by-hand"}
        assert len(errors()) == 2


def test_what_changes_waits_until_it_is_quiet(checkpoint: Path, tmp_path: Path) -> None:
    directory = watcher.WatchedDirectory(tmp_path)
    target = tmp_path / "acme" / "growing"
    target.mkdir(parents=True)
    for size in range(5):
        (target / WEIGHTS).write_bytes(bytes(size))
        assert directory.poll() == ([], [])
    assert directory.poll() == ([], [])
    assert directory.poll() == (["acme/growing"], [])
    directory.mark_handled("acme/growing", published=True)
    assert directory.poll() == ([], [])
    # Gone from one poll is not gone.
    target.rename(tmp_path / "aside")
    assert directory.poll() == ([], [])
    (tmp_path / "aside").rename(target)
    # It is back as it was.
    for _ in range(4):
        assert directory.poll() == ([], [])
    (target / WEIGHTS).write_bytes(b"other")
    assert [directory.poll() for _ in range(3)] == [([], []), ([], []), (["acme/growing"], [])]
    directory.mark_handled("acme/growing", published=True)
    shutil.rmtree(target)
    assert directory.poll() == ([], [])
    assert directory.poll() == ([], ["acme/growing"])
    directory.forget("acme/growing")
    assert directory.poll() == ([], [])


def test_a_refusal_is_forgotten_with_its_file(tmp_path: Path) -> None:
    directory = watcher.WatchedDirectory(tmp_path)
    target, published = tmp_path / "acme" / "refused", tmp_path / "acme" / "published"
    for folder in (target, published):
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_bytes(b"x")
    for _ in range(3):
        directory.poll()
    directory.mark_handled("acme/published", published=True)
    assert directory.try_later("acme/refused", "the disk is full")
    directory.poll()
    assert not directory.try_later("acme/refused", "the disk is full")
    shutil.rmtree(target)
    shutil.rmtree(published)
    directory.poll()
    assert directory.poll() == ([], ["acme/published"])
    # This one is still to be withdrawn.
    assert directory.try_later("acme/published", "the database is locked")
    directory.poll()
    assert not directory.try_later("acme/published", "the database is locked")
    target.mkdir()
    (target / WEIGHTS).write_bytes(b"x")
    directory.poll()
    assert directory.try_later("acme/refused", "the disk is full")


def test_a_file_that_vanishes_within_an_adapter_withdraws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = watcher.WatchedDirectory(tmp_path)
    target = tmp_path / "acme" / "one"
    target.mkdir(parents=True)
    (target / WEIGHTS).write_bytes(b"x")
    for _ in range(3):
        directory.poll()
    directory.mark_handled("acme/one", published=True)

    def vanished(path: str) -> tuple[str, int, int, int]:
        raise FileNotFoundError(path)

    with monkeypatch.context() as patched:
        patched.setattr(watcher, "_state", vanished)
        for _ in range(5):
            assert directory.poll() == ([], [])
    # It is back as it was; then it changes.
    assert [directory.poll() for _ in range(4)] == [([], [])] * 4
    (target / WEIGHTS).write_bytes(b"other")
    assert [directory.poll() for _ in range(3)] == [([], []), ([], []), (["acme/one"], [])]


@pytest.mark.parametrize("place", ["", "acme"])
def test_what_was_unmounted_is_not_gone(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty directory below a mount is readable."""
    root, devices = tmp_path / "watched", {"": 1, "acme": 1, "beta": 1}
    names = ["acme/one", "acme/two", "beta/three"]
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / WEIGHTS).write_bytes(b"x")
    stat = Path.stat

    def on_devices(path: Path, **options: Any) -> Any:
        found = stat(path, **options)
        place = "" if path == root else path.name
        return os.stat_result((*found[:2], devices.get(place, found.st_dev), *found[3:10]))

    monkeypatch.setattr(Path, "stat", on_devices)
    directory = watcher.WatchedDirectory(root)
    ready = [directory.poll() for _ in range(3)][-1][0]
    assert ready == names
    for name in names:
        directory.mark_handled(name, published=True)
    away = tmp_path / "away"
    (root / place / "two" if place else root / "acme").rename(away)
    devices |= {place: 2}
    for _ in range(5):
        assert directory.poll() == ([], [])
    # Mounted again, it has one adapter less, which is now gone.
    away.rename(root / place / "two" if place else root / "acme")
    devices |= {place: 1}
    shutil.rmtree(root / "acme" / "one")
    assert [directory.poll()[1] for _ in range(3)][1:] == [["acme/one"], ["acme/one"]]
    # Another file system that has everything is taken as it is.
    directory.forget("acme/one")
    devices |= {place: 3}
    assert directory.poll() == ([], [])
    shutil.rmtree(root / "acme" / "two")
    assert [directory.poll()[1] for _ in range(2)] == [[], ["acme/two"]]


def test_what_was_refused_is_looked_at_again_when_it_comes_back(tmp_path: Path) -> None:
    directory = watcher.WatchedDirectory(tmp_path)
    (tmp_path / "acme").mkdir()
    target, aside = tmp_path / "acme" / "one.tar", tmp_path / "aside"
    target.write_bytes(b"x")
    assert [directory.poll() for _ in range(3)][-1] == (["acme/one"], [])
    directory.mark_handled("acme/one", published=False)
    target.rename(aside)
    directory.poll()
    aside.rename(target)
    assert [directory.poll() for _ in range(3)][-1] == (["acme/one"], [])


def test_what_was_there_before_the_watch_is_old_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = watcher.WatchedDirectory(tmp_path)
    for tenant in ("acme", "slow"):
        (tmp_path / tenant).mkdir()
        (tmp_path / tenant / "old.tar").write_bytes(b"x")
    (tmp_path / "acme" / "slow.tar").write_bytes(b"x")
    state, scandir = watcher._state, os.scandir

    def unreadable(path: str) -> tuple[str, int, int, int]:
        if path.endswith("slow.tar"):
            raise PermissionError(path)
        return state(path)

    def unreadable_folder(path: str | Path) -> object:
        if str(path).endswith("slow"):
            raise PermissionError(path)
        return scandir(path)

    with monkeypatch.context() as patched:
        # The file system is not all there yet.
        patched.setattr(watcher, "_state", unreadable)
        patched.setattr(watcher.os, "scandir", unreadable_folder)
        for _ in range(3):
            directory.poll()
    (tmp_path / "acme" / "new.tar").write_bytes(b"x")
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "one.tar").write_bytes(b"x")
    ready = [directory.poll() for _ in range(3)][-1][0]
    assert ready == ["acme/new", "acme/old", "acme/slow", "late/one", "slow/old"]
    assert [name for name in ready if directory.is_old(name)] == ["acme/old", "acme/slow", "slow/old"]
    (tmp_path / "acme" / "old.tar").write_bytes(b"other")
    directory.poll()
    assert not directory.is_old("acme/old")


@pytest.mark.usefixtures("fast_polls")
def test_a_restart_moves_no_latest_back(
    base: FrozenBase, writer: AdapterBundle, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sera_serve.watch")
    watched = tmp_path / "watched"
    shutil.copytree(checkpoint, watched / "acme" / "one")
    store, engine = AdapterStore(tmp_path / "store"), StubEngine(base)

    def polled() -> None:
        count = len(engine.checked)
        wait_until(lambda: len(engine.checked) > count)
        # The check comes before the publication.
        time.sleep(0.3)

    def served() -> AbstractContextManager[str]:
        return live_server(build_app(engine, store, ServeSettings(store=store.root, watch=watched)))

    def recorded() -> list[str]:
        return [json.loads(line)["action"] for line in (store.root / "access" / "audit.jsonl").read_text().splitlines()]

    with served():
        polled()
        assert store.inspect("acme/one").versions == (1,)
    assert recorded() == ["adapter.publish"]
    store.publish(writer, "acme/one")
    said = f"{watched / 'acme' / 'one'} is published as acme/one@v1"
    assert caplog.messages.count(said) == 1
    with served():
        polled()
        assert (store.resolve("acme/one").version, store.inspect("acme/one").versions) == (2, (1, 2))
        # Nothing has changed.
        assert recorded() == ["adapter.publish"]
        assert caplog.messages.count(said) == 1
        # The same content, which somebody copies there again, is wanted.
        (watched / "acme" / "one" / CONFIG).write_bytes((checkpoint / CONFIG).read_bytes())
        polled()
        assert store.resolve("acme/one").version == 1
        assert recorded() == ["adapter.publish"] * 2
        assert caplog.messages.count(said) == 2
        # It still belongs to the watch.
        shutil.rmtree(watched / "acme" / "one")
        wait_until(lambda: store.count_adapters() == 0)
    shutil.copytree(checkpoint, watched / "acme" / "one")
    store.publish(writer, "acme/one")
    with served():
        # What is new is published, though it came while no server ran.
        polled()
        assert store.resolve("acme/one").version == 4


def test_an_entry_that_cannot_be_read_stops_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = watcher.WatchedDirectory(tmp_path)
    for name in ("bad", "good"):
        (tmp_path / "acme" / name).mkdir(parents=True)
        (tmp_path / "acme" / name / WEIGHTS).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for _ in range(3):
        ready, _ = directory.poll()
    for name in ready:
        directory.mark_handled(name, published=True)
    assert ready == ["acme/bad", "acme/good"]
    shutil.rmtree(tmp_path / "acme" / "bad")
    (tmp_path / "acme" / "bad").symlink_to(tmp_path / "acme" / "bad")
    (tmp_path / "acme" / "good" / "more").write_bytes(b"y")
    assert [directory.poll() for _ in range(3)] == [([], []), ([], []), (["acme/good"], [])]
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "loop" in messages[0] and "acme/bad" in messages[1]


@pytest.mark.usefixtures("fast_polls")
def test_neither_a_link_nor_an_unexpected_error_ends_the_watch(
    base: FrozenBase, writer: AdapterBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = tmp_path / "watched"
    for tenant in ("acme", "other"):
        (watched / tenant).mkdir(parents=True)
    store = AdapterStore(tmp_path / "store")
    engine = StubEngine(base)
    (watched / "other" / "own.safetensors").write_bytes(writer.to_bytes())

    def names() -> set[str]:
        return {info.adapter for info in store.iter_adapters()}

    def logged(part: str) -> bool:
        return any(part in record.message for record in caplog.records)

    def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    with live_server(build_app(engine, store, ServeSettings(store=store.root, watch=watched))):
        wait_until(lambda: names() == {"other/own"})
        (watched / "acme" / "taken.safetensors").symlink_to(watched / "other" / "own.safetensors")
        wait_until(lambda: logged("outside the allowed directory"))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Publisher, "publish", fail)
            patched.setattr(Publisher, "remove", fail)
            (watched / "acme" / "faulty.safetensors").write_bytes(writer.to_bytes())
            wait_until(lambda: logged("faulty.safetensors is not published"))
            (watched / "other" / "own.safetensors").unlink()
            wait_until(lambda: logged("other/own vanished and stays published"))
            patched.setattr(watcher.WatchedDirectory, "poll", fail)
            wait_until(lambda: logged("was not read because of an unexpected error"))
        (watched / "acme" / "next.safetensors").write_bytes(writer.to_bytes())
        wait_until(lambda: names() == {"other/own", "acme/next"})


@pytest.mark.usefixtures("fast_polls")
def test_what_the_store_cannot_take_now_is_tried_again_and_logged_once(
    base: FrozenBase,
    writer: AdapterBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(watcher, "_RETRY_POLLS", 4)
    watched = tmp_path / "watched"
    (watched / "acme").mkdir(parents=True)
    store = AdapterStore(tmp_path / "store")
    tried: list[str] = []

    def refuse(*arguments: object, **named: object) -> None:
        tried.append("once more")
        raise StoreWriteFailed("the store could not be written: No space left on device", param="store")

    def errors() -> list[str]:
        return [record.message for record in caplog.records if record.levelno >= logging.ERROR]

    with live_server(build_app(StubEngine(base), store, ServeSettings(store=store.root, watch=watched))):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(AdapterStore, "publish", refuse)
            (watched / "acme" / "one.safetensors").write_bytes(writer.to_bytes())
            wait_until(lambda: len(tried) > 2)
            assert len(errors()) == 1 and "one.safetensors is not published yet" in errors()[0]
        wait_until(lambda: store.count_adapters() == 1)
        tried.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(AdapterStore, "delete", refuse)
            (watched / "acme" / "one.safetensors").unlink()
            wait_until(lambda: len(tried) > 2)
            assert len(errors()) == 2 and "acme/one vanished and cannot be withdrawn yet" in errors()[1]
        wait_until(lambda: store.count_adapters() == 0)


def test_what_is_no_adapter_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "acme").mkdir()
    for name in ("Bad Name.tar", "notes.txt", ".hidden.tar", "one.tar", "one.zip"):
        (tmp_path / "acme" / name).write_bytes(b"x")
    directory = watcher.WatchedDirectory(tmp_path)
    for _ in range(4):
        directory.poll()
    messages = sorted(record.message for record in caplog.records)
    assert len(messages) == 3
    assert "Bad Name.tar" in messages[0]
    assert "notes.txt" in messages[1]
    assert "one.zip" in messages[2]


def test_an_adapter_that_lies_outside_a_tenants_folder_is_named_and_left_alone(
    checkpoint: Path, writer: AdapterBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(checkpoint, tmp_path / "mine")
    (tmp_path / "loose.safetensors").write_bytes(writer.to_bytes())
    (tmp_path / ".hidden").write_bytes(b"")
    directory = watcher.WatchedDirectory(tmp_path)
    assert [directory.poll() for _ in range(4)] == [([], [])] * 4
    # The third is of its README.
    assert [record.message for record in caplog.records][:2] == [
        f"{tmp_path}/loose.safetensors is left out: it lies in no tenant's folder; "
        f"move it to {tmp_path}/TENANT/loose.safetensors",
        f"{tmp_path}/mine is an adapter's folder, and should be a tenant's; move it to {tmp_path}/TENANT/mine",
    ]


def test_a_configuration_in_a_tenants_folder_withdraws_nothing(writer: AdapterBundle, tmp_path: Path) -> None:
    folder = tmp_path / "acme"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "other.safetensors"):
        (folder / name).write_bytes(writer.to_bytes())
    directory = watcher.WatchedDirectory(tmp_path)
    assert [directory.poll() for _ in range(3)][-1] == (["acme/adapter_model", "acme/other"], [])
    for name in ("acme/adapter_model", "acme/other"):
        directory.mark_handled(name, published=True)
    (folder / "adapter_config.json").write_text("{}")
    assert [directory.poll() for _ in range(4)] == [([], [])] * 4


def test_nothing_is_watched_by_default() -> None:
    async def enter() -> None:
        async with watcher.watching(None, None, None, None):  # type: ignore[arg-type]
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(enter())
