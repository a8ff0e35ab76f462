"""The reader of an upload's form: what a hostile form costs is bounded by bytes, whatever its size."""

from __future__ import annotations

import errno
import itertools
import os
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from sera_serve.server.native import upload_form
from sera_serve.server.native.upload_form import FormReader, InvalidForm, UploadNotWritten, boundary_of

CHUNK = 64 << 10
REMEDY = "send the field bundle"
OPEN = b'--b\r\nContent-Disposition: form-data; name="bundle"; filename="a"\r\n'
NAME = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\na/b\r\n'


def forever(data: bytes) -> Iterator[bytes]:
    """Endless chunks of the same bytes over and over."""
    chunk = data * (CHUNK // len(data) + 1)
    return itertools.repeat(chunk)


def read(chunks: Iterable[bytes]) -> FormReader:
    reader = FormReader("multipart/form-data; boundary=b", {"bundle": None}, REMEDY)
    try:
        for chunk in chunks:
            reader.feed(chunk)
        reader.finish(b"")
    except BaseException:
        reader.close()
        raise
    return reader


@pytest.mark.parametrize("size", [1, 3, 17, CHUNK])
def test_a_form_is_read_whatever_the_chunks(size: int) -> None:
    content = os.urandom(CHUNK) + b"\r\n--\r\n-\r\n--a" * 9
    form = NAME + OPEN + b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--b--\r\n"
    # The first bytes hold the first boundary: a body is cut into chunks of 64 KiB.
    reader = read([form[:5], *(form[start : start + size] for start in range(5, len(form), size))])
    name, bundle = reader.parts
    assert (name.name, name.text, name.is_file, name.nbytes) == ("name", "a/b", False, 3)
    assert (bundle.name, bundle.is_file, bundle.nbytes) == ("bundle", True, len(content))
    assert bundle.file is not None
    bundle.file.seek(0)
    assert bundle.file.read() == content
    reader.close()
    assert bundle.file.closed


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (b"a%22b", 'a"b'),
        (b"a%0D%0Ab", "a\r\nb"),
        # Nothing else is an escape, and each is read once.
        (b"100%25 %20%0a%2522", "100%25 %20%0a%2522"),
        (b"%%2222", '%"22'),
        (b"%", "%"),
        (b"\xc3\xa4;%22\xff", 'ä;"\ufffd'),
    ],
)
def test_names_are_read_as_clients_escape_them(written: bytes, meant: str) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="x"; filename="' + written + b'"\r\n\r\n\r\n--b--\r\n'
    assert read([form]).parts[0].filename == meant
    field = written.replace(b"\xff", b"")
    form = b'--b\r\nContent-Disposition: form-data; name="' + field + b'"\r\n\r\n\r\n--b--\r\n'
    assert read([form]).parts[0].name == meant.replace("\ufffd", "")


HOSTILE: dict[str, Callable[[], Iterable[bytes]]] = {
    "a name of a header without end": lambda: [OPEN, *itertools.islice(forever(b"a"), 1000)],
    "a value of a header without end": lambda: [OPEN + b"X: ", *itertools.islice(forever(b"a"), 1000)],
    "spaces before a value without end": lambda: [OPEN + b"X:", *itertools.islice(forever(b" "), 1000)],
    "thousands of headers": lambda: [OPEN, *itertools.islice(forever(b"X: y\r\n"), 1000)],
    "thousands of different headers": lambda: [OPEN, b"".join(b"X-%d: y\r\n" % i for i in range(9000))],
    "thousands of empty parts": lambda: [b"--b\r\n", *itertools.islice(forever(b"\r\n\r\n--b\r\n"), 1000)],
    "thousands of named parts": lambda: itertools.islice(forever(NAME), 1000),
    "thousands of files": lambda: itertools.islice(forever(OPEN + b"\r\nx\r\n"), 1000),
    "padding after a boundary without end": lambda: [OPEN + b"\r\n\r\n--b", *itertools.islice(forever(b" "), 1000)],
    "line ends before the first boundary": lambda: itertools.islice(forever(b"\r\n"), 1000),
    "a preamble": lambda: [b"preamble\r\n", NAME],
    "a preamble after a line end": lambda: [b"\r\nx", NAME],
    "a preamble without end": lambda: itertools.islice(forever(b"\r\nx"), 1000),
    "an epilogue": lambda: [NAME + b"--b--\r\nepilogue"],
    "an epilogue without end": lambda: [NAME + b"--b--\r\n", *itertools.islice(forever(b"x"), 1000)],
    "an epilogue of forms": lambda: [NAME + b"--b--\r\n", *itertools.islice(forever(NAME), 1000)],
    "lines that look like boundaries": lambda: [OPEN + b"\r\n", *itertools.islice(forever(b"\r\n--bX"), 1000)],
    "almost last boundaries": lambda: [OPEN + b"\r\n", *itertools.islice(forever(b"\r\n--b-"), 1000)],
    "boundaries across chunks": lambda: [OPEN + b"\r\n", *[b"\r\n-", b"-bX"] * 1000],
    "a field without end": lambda: [NAME[:-2], *itertools.islice(forever(b"x"), 1000)],
    "no boundary": lambda: itertools.islice(forever(b"-"), 1000),
    "other boundary": lambda: [b"--c\r\n"],
    "cut": lambda: [NAME + OPEN + b"\r\nhalf"],
    "cut in a boundary": lambda: [NAME + b"--b-"],
    "no name": lambda: [b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--"],
    "no disposition": lambda: [b"--b\r\n\r\nx\r\n--b--"],
    "another disposition": lambda: [NAME.replace(b"form-data", b"attachment") + b"--b--"],
    "two dispositions": lambda: [OPEN + b"Content-Disposition: form-data; name=x\r\n\r\n\r\n--b--"],
    "name not UTF-8": lambda: [NAME.replace(b"a/b", b"\xff") + b"--b--"],
    "field not UTF-8": lambda: [NAME.replace(b'"name"', b'"\xff"') + b"--b--"],
    "base64": lambda: [OPEN + b"Content-Transfer-Encoding: base64\r\n\r\neA==\r\n--b--"],
    "field in UTF-16": lambda: [NAME.replace(b"\r\n\r\n", b"\r\nContent-Type: text/plain; charset=utf-16\r\n\r\n", 1)],
}


# The others are faults of no field.
NAMED = {"name not UTF-8": "name", "base64": "bundle", "field in UTF-16": "name", "a field without end": "name"}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_form_is_refused_within_its_first_bytes(case: str) -> None:
    """64 MiB of each form are there to be read; two chunks are enough to refuse any, and little memory."""
    taken = 0

    def counted() -> Iterator[bytes]:
        nonlocal taken
        for chunk in HOSTILE[case]():
            taken += len(chunk)
            yield chunk

    tracemalloc.start()
    try:
        with pytest.raises(InvalidForm) as refusal:
            read(counted())
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert taken <= 3 * CHUNK
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_multipart")
    assert "bundle" in refusal.value.message or "field" in refusal.value.message
    assert refusal.value.param == NAMED.get(case)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "b" * 71,
        "multipart/form-data; boundary=" + "b" * (32 << 10),
        *(
            f"multipart/form-data; boundary=b; charset={name}"
            for name in ("undefined", "punycode", "utf-16", "idna", "latin-1", "base64", "", "\x00", "é")
        ),
    ],
)
def test_a_content_type_that_names_no_form_of_ours_is_refused(content_type: str) -> None:
    with pytest.raises(InvalidForm) as refusal:
        boundary_of(content_type, REMEDY)
    assert refusal.value.param == "Content-Type"


@pytest.mark.parametrize("charset", ["", "; charset=utf-8", '; charset="UTF-8"', "; charset=us-ascii"])
def test_the_boundary_of_a_form_in_utf8_is_found(charset: str) -> None:
    assert boundary_of(f'multipart/form-data; boundary="b b"{charset}', REMEDY) == b"b b"


def test_other_files_than_the_bundle_are_not_kept() -> None:
    reader = read([OPEN.replace(b"bundle", b"other") + b"\r\n" + b"x" * (4 << 20) + b"\r\n--b--\r\n"])
    assert reader.parts[0].file is None
    assert reader.parts[0].nbytes == 4 << 20


class _FullFile:
    """A temporary file on a disk that is full after so many bytes; the rest of a write stays in the buffer."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.closed = False

    def write(self, data: Any) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        self.write(b"x" * 100)

    def close(self) -> None:
        self.closed = True
        self.flush()


@pytest.mark.parametrize("room", [0, 10, 4096, (8 << 10) + 50])
def test_a_full_temporary_directory_is_named(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _FullFile(room)
    monkeypatch.setattr(upload_form, "SpooledTemporaryFile", lambda **options: file)
    with pytest.raises(UploadNotWritten, match=r"No space left on device; .* TMPDIR") as refusal:
        read([NAME + OPEN + b"\r\n", b"x" * (8 << 10), b"\r\n--b--\r\n"])
    assert (refusal.value.status, refusal.value.code) == (507, "upload_not_written")
    assert file.closed
