"""POST /v1/adapters: an upload is applied or refused, and the server goes on in both cases."""

from __future__ import annotations

import io
import json
import pickle
import socket
import struct
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapters_store import AdapterBundle, AdapterStore, Published
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from sera_serve.server.native import upload_form
from sera_serve.server.native.uploads import UploadSlots
from support.answers import refused
from support.factories import random_adapter, random_decoder
from support.live_server import live_server, wait_until
from support.small_disk import fill_bytes, small_disk
from support.stub_engine import StubEngine

Files = list[tuple[str, tuple[str | None, bytes]]]
NAME = ("name", (None, b"acme/new"))
NAME_PART = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nacme/new\r\n'


def bundle_part(data: bytes) -> tuple[str, tuple[str, bytes]]:
    return ("bundle", ("adapter.safetensors", data))


def upload(client: httpx.Client, data: bytes, name: str = "acme/new") -> httpx.Response:
    return client.post("/v1/adapters", files={"bundle": ("adapter.safetensors", data)}, data={"name": name})


def tar_of(directory: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(directory.iterdir()):
            archive.add(path, path.name)
    return buffer.getvalue()


def with_tensors(bundle: AdapterBundle, **changes: torch.Tensor | None) -> bytes:
    """Return the bundle with changed factors of the first adapted layer. None removes a factor."""
    path = next(iter(bundle.config.modules))
    tensors = dict(bundle.tensors)
    for factor, tensor in changes.items():
        name = f"{path}.{factor}"
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return AdapterBundle(bundle.config, tensors).to_bytes()


@pytest.fixture
def hostile(writer: AdapterBundle, base: FrozenBase) -> dict[str, tuple[bytes, int, str]]:
    """Bundles that the server must refuse: bytes, status, code."""
    good = writer.to_bytes()
    a = writer.tensors[f"{next(iter(writer.config.modules))}.sera_a"]
    other = random_adapter(random_decoder(seed=5), SeraConfig(8, 4, 16, ("q_proj",)), seed=1)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return {
        "truncated": (good[:-10], 422, "truncated"),
        "cut in its header": (good[:50], 422, "truncated"),
        "empty": (b"", 422, "truncated"),
        "pickle": (pickle.dumps({"weights": [1.0] * 100}), 422, "not_safetensors"),
        "torch.save": (torch_saved(), 422, "not_safetensors"),
        "gzip": (b"\x1f\x8b" + bytes(100), 422, "not_safetensors"),
        "1 GB header": (struct.pack("<Q", 1 << 30) + b"{" + bytes(100), 422, "header_too_large"),
        "no configuration": (struct.pack("<Q", len(header)) + header + bytes(4), 422, "missing_file"),
        "other base": (other.to_bytes(), 422, "wrong_base"),
        "missing tensor": (with_tensors(writer, sera_b=None), 422, "missing_tensor"),
        "extra tensor": (with_tensors(writer, sera_d=torch.zeros(2)), 422, "unexpected_tensor"),
        "wrong shape": (with_tensors(writer, sera_a=a[:-1]), 422, "wrong_shape"),
        "not a number": (with_tensors(writer, sera_a=torch.full_like(a, torch.nan)), 422, "not_finite"),
        "infinity": (with_tensors(writer, sera_a=torch.full_like(a, torch.inf)), 422, "not_finite"),
    }


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def test_an_acknowledged_upload_is_in_the_store(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle, tmp_path: Path
) -> None:
    response = upload(client, writer.to_bytes(), "acme/fresh")
    assert response.status_code == 201
    assert response.json() == {"adapter": "acme/fresh", "version": 1, "digest": writer.digest, "warnings": []}
    assert store.load(store.resolve("acme/fresh").digest).digest == writer.digest
    # A tar with the same content gives the same version.
    writer.save(tmp_path / "bundle")
    again = upload(client, tar_of(tmp_path / "bundle"), "acme/fresh")
    assert (again.status_code, again.json()) == (201, response.json())


def test_every_hostile_bundle_is_refused_and_the_server_goes_on(
    client: httpx.Client, store: AdapterStore, hostile: dict[str, tuple[bytes, int, str]]
) -> None:
    before = list(store.iter_adapters())
    for kind, (data, status, code) in hostile.items():
        error = refused(upload(client, data), status, code)
        assert error["message"], kind
        assert str(store.root) not in error["message"]
    assert list(store.iter_adapters()) == before
    assert client.get("/readyz").status_code == 200
    assert client.post("/v1/generate", json={"prompt": "hello"}).status_code == 200


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("config", [None, b'{"peft_type": "LORA"}'], ids=["alone", "with its configuration"])
def test_a_file_of_torch_save_is_named_as_one(client: httpx.Client, as_zip: bool, config: bytes | None) -> None:
    # More tensors than an archive may have members.
    tensors = {f"layer{index}.lora_A.weight": torch.zeros(1) for index in range(100)}
    torch.save(tensors, written := io.BytesIO(), _use_new_zipfile_serialization=as_zip)
    files = {"bundle": ("adapter_model.bin", written.getvalue())}
    if config is not None:
        files["config"] = ("adapter_config.json", config)
    answer = client.post("/v1/adapters", data={"name": "acme/pickled"}, files=files)
    assert "pickled checkpoints are never read" in refused(answer, 422, "not_safetensors")["message"]


def test_a_refusal_of_another_base_names_the_field(
    client: httpx.Client, hostile: dict[str, tuple[bytes, int, str]]
) -> None:
    error = refused(upload(client, hostile["other base"][0]), 422, "wrong_base")
    assert error["param"] == "adapter_config.base.weights_digest"


@pytest.mark.parametrize(
    "name",
    [
        "../etc",
        "a/../b",
        "acme/..",
        "acme/new/../../x",
        "/etc/passwd",
        "acme",
        "acme/",
        "/new",
        "",
        "Acme/New",
        "acme/né",
        "acme/new\0",
        "acme\\new",
        "acme/new@latest",
        "acme/" + "x" * 65,
        "acme/%2e%2e",
    ],
)
def test_an_impossible_name_is_refused(client: httpx.Client, writer: AdapterBundle, name: str) -> None:
    assert refused(upload(client, writer.to_bytes(), name), 422, "invalid_adapter_name")["param"] == "name"


@pytest.mark.parametrize(
    ("files", "status", "code", "param"),
    [
        ([NAME], 422, "missing_field", "bundle"),
        ([bundle_part(b"x")], 422, "missing_field", "name"),
        ([NAME, bundle_part(b"x"), ("alias", (None, b"stable"))], 422, "unknown_field", "alias"),
        ([NAME, NAME, bundle_part(b"x")], 422, "unknown_field", "name"),
        ([NAME, bundle_part(b"x"), bundle_part(b"y")], 422, "unknown_field", "bundle"),
        ([NAME, ("bundle", (None, b"x"))], 422, "invalid_request", "bundle"),
        ([("name", ("name.txt", b"acme/new")), bundle_part(b"x")], 422, "invalid_request", "name"),
        ([NAME] + [(f"f{i}", (None, b"x")) for i in range(9)], 400, "invalid_multipart", None),
        ([("name", (None, b"x" * 10_000)), bundle_part(b"x")], 400, "invalid_multipart", "name"),
    ],
)
def test_a_form_with_other_fields_is_refused(
    client: httpx.Client, files: Files, status: int, code: str, param: str | None
) -> None:
    assert refused(client.post("/v1/adapters", files=files), status, code)["param"] == param


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        (None, b"x", 415, "unsupported_media_type"),
        ("application/json", b'{"name": "a/b"}', 415, "unsupported_media_type"),
        ("application/octet-stream", b"x", 415, "unsupported_media_type"),
        ("multipart/form-data", b"x", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=b", b"no such boundary", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=b", b"", 422, "missing_field"),
        *(
            (f"multipart/form-data; boundary=b; charset={name}", b"--b--\r\n", 400, "invalid_multipart")
            for name in ("undefined", "punycode", "utf-16", "idna", "no-such")
        ),
        ("multipart/form-data; boundary=b", NAME_PART + b"--b--\r\nand more", 400, "invalid_multipart"),
        (
            "multipart/form-data; boundary=b",
            b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
            400,
            "invalid_multipart",
        ),
    ],
)
def test_a_body_other_than_a_form_is_refused(
    client: httpx.Client, kind: str | None, body: bytes, status: int, code: str
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    refused(client.post("/v1/adapters", content=body, headers=headers), status, code)


def test_a_bundle_over_the_limit_is_refused(client: httpx.Client) -> None:
    # The body is within the limit of the form. The bundle alone exceeds its limit.
    refused(upload(client, bytes((1 << 20) + 1)), 413, "bundle_too_large")
    refused(upload(client, bytes(2 << 20)), 413, "body_too_large")


def test_an_interrupted_upload_leaves_nothing(
    client: httpx.Client, url: str, store: AdapterStore, writer: AdapterBundle
) -> None:
    before = list(store.iter_adapters())
    request = client.build_request(
        "POST", "/v1/adapters", files={"bundle": ("a", writer.to_bytes())}, data={"name": "acme/half"}
    )
    body = request.read()
    host, port = url.removeprefix("http://").split(":")
    for part in (0.0, 0.3, 0.9):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST /v1/adapters HTTP/1.1\r\nHost: {host}\r\nContent-Type: {request.headers['content-type']}\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            connection.sendall(body[: int(part * len(body))])
    assert client.get("/healthz").status_code == 200
    assert list(store.iter_adapters()) == before


def test_a_failed_write_is_reported_and_logged_but_the_client_sees_no_path(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle, caplog: pytest.LogCaptureFixture
) -> None:
    before, scratch = list(store.iter_adapters()), store.root / "tmp"
    scratch.rmdir()
    try:
        answer = upload(client, writer.to_bytes(), "acme/nowhere")
    finally:
        scratch.mkdir()
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (507, "store_write_failed", "store")
    assert "No such file or directory (tmp/" in error["message"]
    assert str(store.root) not in answer.text and str(store.root) in caplog.text
    assert list(store.iter_adapters()) == before
    assert upload(client, writer.to_bytes(), "acme/nowhere").status_code == 201


@contextmanager
def begun_upload(url: str, sent: bytes = b"") -> Iterator[socket.socket]:
    """The headers of an upload of 1,000 bytes, and its first bytes."""
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + sent)
        yield connection


@pytest.mark.parametrize("sent", [b"", NAME_PART])
def test_uploads_over_the_limit_are_answered_503_until_one_ends(
    base: FrozenBase, store: AdapterStore, writer: AdapterBundle, sent: bytes
) -> None:
    app = build_app(StubEngine(base), store, ServeSettings(store=store.root, max_uploads=2))

    def under_way() -> int:
        slots: UploadSlots | None = getattr(app.state, "upload_slots", None)
        return slots.count() if slots else 0

    with live_server(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        with begun_upload(url, sent), begun_upload(url, sent):
            wait_until(lambda: under_way() == 2)
            answer = upload(client, writer.to_bytes(), "acme/third")
            refused(answer, 503, "too_many_uploads")
            assert int(answer.headers["retry-after"]) > 0
            assert under_way() == 2
            assert client.get("/readyz").status_code == 200
        wait_until(lambda: under_way() == 0)
        assert upload(client, writer.to_bytes(), "acme/third").status_code == 201
        # A refused form ends its upload too.
        assert client.post("/v1/adapters", files=[NAME]).status_code == 422
        wait_until(lambda: under_way() == 0)


def files_in(folder: Path) -> list[str]:
    """Names of what is open in a folder by this process: temporary files have no name of their own."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(descriptor.readlink()))
    return [path for path in found if path.startswith(f"{folder}/")]


@pytest.mark.parametrize("end", ["refused", "cut", "read"])
def test_the_temporary_file_of_an_upload_goes_with_it(
    url: str, client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(upload_form, "_MEMORY_BYTES", 1 << 10)
    data = bytes(200 << 10)
    if end == "cut":
        part = NAME_PART + b'--b\r\nContent-Disposition: form-data; name="bundle"; filename="a"\r\n\r\n'
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = "POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            connection.sendall(f"{head}Content-Length: 500000\r\n\r\n".encode() + part + data)
            wait_until(lambda: len(files_in(tmp_path)) == 1)
    else:
        # No bundle is read where the name is refused; the zeros are refused where it is accepted.
        name, code = ("acme/new", "not_safetensors") if end == "read" else ("acme", "invalid_adapter_name")
        refused(upload(client, data, name), 422, code)
    wait_until(lambda: not files_in(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_full_temporary_directory_is_reported_and_leaves_nothing(
    client: httpx.Client, writer: AdapterBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_form, "_MEMORY_BYTES", 1 << 10)
    with small_disk(tmp_path / "disk") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        fill_bytes(disk)
        error = refused(upload(client, writer.to_bytes()), 507, "upload_not_written")
        assert "TMPDIR" in error["message"] and str(disk) not in error["message"]
        assert [path.name for path in disk.iterdir()] == ["filler"]
        wait_until(lambda: not files_in(disk))
        (disk / "filler").unlink()
        assert upload(client, writer.to_bytes()).status_code == 201


def test_concurrent_uploads_get_their_own_versions_and_one_thread(
    url: str, base: FrozenBase, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, threads = store.publish, []

    def recorded(bundle: AdapterBundle, name: str, **options: bool) -> Published:
        threads.append(threading.get_ident())
        return publish(bundle, name, **options)

    monkeypatch.setattr(store, "publish", recorded)
    bundles = [random_adapter(base, SeraConfig(4, 2, 8, ("q_proj",)), seed=seed) for seed in range(6)]

    def send(bundle: AdapterBundle) -> dict[str, Any]:
        with httpx.Client(base_url=url, timeout=30) as client:
            return upload(client, bundle.to_bytes(), "acme/busy").raise_for_status().json()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(send, bundles))
    assert sorted(answer["version"] for answer in answers) == [1, 2, 3, 4, 5, 6]
    assert {answer["digest"] for answer in answers} == {bundle.digest for bundle in bundles}
    assert store.inspect("acme/busy").versions == (1, 2, 3, 4, 5, 6)
    assert len(threads) == 6 and len(set(threads)) == 1
