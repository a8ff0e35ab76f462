"""Archives of every common writer are read; others are refused, in time linear in their bytes."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_factory import make_bundle
from raw_files import special_member, tar_bytes, two_files

from adapters_store import AdapterBundle, InvalidBundle

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
BUNDLE = make_bundle()
GOOD_CONFIG, GOOD_MODEL = two_files(BUNDLE)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
# A quadratic reader takes minutes where a linear one takes milliseconds.
LINEAR_S = 2.0


def header(name: str, kind: bytes, size: int) -> bytes:
    """A POSIX header block."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return header("pax", kind, len(records)) + padded(records)


def record(key: str, value: str) -> bytes:
    """One pax record; its length counts its own digits."""
    rest = f" {key}={value}\n".encode()
    length = next(n for n in range(len(rest), len(rest) + 8) if n == len(rest) + len(str(n)))
    return str(length).encode() + rest


def member(name: str, data: bytes) -> bytes:
    return header(name, b"0", len(data)) + padded(data)


def archive(*before: bytes, after: bytes = bytes(1024)) -> bytes:
    """Headers of any kind, then the two files and the end."""
    return b"".join(before) + member(CONFIG, GOOD_CONFIG) + member(MODEL, GOOD_MODEL) + after


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def changed(start: int, data: bytes) -> bytes:
    """The archive with other bytes in the first header, and its checksum right again."""
    block = bytearray(header(CONFIG, b"0", len(GOOD_CONFIG)))
    block[start : start + len(data)] = data
    return with_checksum(block) + padded(GOOD_CONFIG) + member(MODEL, GOOD_MODEL) + bytes(1024)


def refusal(data: bytes) -> InvalidBundle:
    with pytest.raises(InvalidBundle) as caught:
        AdapterBundle.from_bytes(data)
    return caught.value


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prefix", ["", "./", "my adapter/", "./ädapter/", "d" * 60 + "/"])
def test_archives_by_python_are_read(format: str, prefix: str) -> None:
    members = []
    for name, data in ((f"{prefix}{CONFIG}", GOOD_CONFIG), (f"{prefix}{MODEL}", GOOD_MODEL)):
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.uid, info.uname = len(data), 1_700_000_000.25, 3_000_000, "jörg"
        if format == "ustar":
            info.uid = 1000
        if format != "pax":
            info.mtime = 1_700_000_000
        members.append((info, data))
    if prefix:
        members.insert(0, (special_member(prefix, tarfile.DIRTYPE), b""))
    data = tar_bytes(*members, format=FORMATS[format])
    assert AdapterBundle.from_bytes(data).digest == BUNDLE.digest


@pytest.mark.parametrize(
    ("program", "format"),
    [("tar", name) for name in ("", "oldgnu", "gnu", "ustar", "pax", "posix")]
    + [("bsdtar", name) for name in ("", "gnutar", "ustar", "pax")],
)
def test_archives_by_the_programs_are_read(program: str, format: str, tmp_path: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed; other tests make its headers by hand")
    BUNDLE.save(tmp_path / "adapter")
    option = [f"--format={format}"] if format else []
    command = [program, *option, "-cf", str(tmp_path / "bundle.tar"), "-C", str(tmp_path)]
    for what in ([f"adapter/{CONFIG}", f"adapter/{MODEL}"], ["adapter"], ["-C", "adapter", "."]):
        subprocess.run([*command, *what], check=True)
        assert AdapterBundle.load(tmp_path / "bundle.tar").digest == BUNDLE.digest


def test_archives_with_the_records_of_bsdtar_and_gnu_tar_are_read() -> None:
    records = b"".join(
        [
            record("mtime", "1700000000.123456789"),
            record("atime", "1700000000.5"),
            record("ctime", "1700000000.5"),
            record("LIBARCHIVE.creationtime", "1700000000"),
            record("LIBARCHIVE.xattr.com.apple.provenance", "AQIAa2V5PXZhbHVlCg=="),
            record("SCHILY.fflags", "nodump"),
            record("SCHILY.dev", "16777220"),
            record("uname", "jörg"),
            record("uid", "3000000"),
            record("comment", "two\nlines and 9 a=b\n"),
        ]
    )
    assert AdapterBundle.from_bytes(archive(pax(records))).digest == BUNDLE.digest
    # GNU tar keeps two times in the place of POSIX's prefix.
    block = bytearray(header(CONFIG, b"0", len(GOOD_CONFIG)))
    block[257:265] = b"ustar  \0"
    block[345:369] = b"14527231234\0" * 2
    data = with_checksum(block) + padded(GOOD_CONFIG) + member(MODEL, GOOD_MODEL) + bytes(1024)
    assert AdapterBundle.from_bytes(data).digest == BUNDLE.digest


def test_the_path_of_a_pax_header_names_the_member() -> None:
    short = header("PaxHeaders", b"x", 0)
    assert refusal(archive(short, pax(record("path", "x")))).code == "invalid_archive"
    parts = [
        pax(record("path", f"modèle/{CONFIG}")) + member("x", GOOD_CONFIG),
        pax(record("path", f"modèle/{MODEL}") + record("size", str(len(GOOD_MODEL)))) + member("y", GOOD_MODEL),
    ]
    assert AdapterBundle.from_bytes(b"".join(parts) + bytes(1024)).digest == BUNDLE.digest
    outside = pax(record("path", f"../{CONFIG}")) + member(CONFIG, GOOD_CONFIG)
    assert refusal(outside + parts[1] + bytes(1024)).param == f"../{CONFIG}"


REFUSED: dict[str, tuple[bytes, str]] = {
    "no end": (archive(after=b""), "truncated"),
    "one zero block": (archive(after=bytes(512)), "truncated"),
    "half an end": (archive(after=bytes(1000)), "truncated"),
    "zero block between": (archive(after=bytes(512) + member("x", b"")), "invalid_archive"),
    "bytes after the end": (archive(after=bytes(1024) + b"x"), "invalid_archive"),
    "bytes long after the end": (archive(after=bytes(300_000) + b"x"), "invalid_archive"),
    "a second archive after the end": (archive(after=bytes(1024) + archive()), "invalid_archive"),
    "bytes after a file": (archive().replace(padded(GOOD_CONFIG), GOOD_CONFIG + b"x" + bytes(511)), "invalid_archive"),
    "pax global": (archive(pax(record("mtime", "1"), b"g")), "invalid_archive"),
    "pax for nothing": (member(MODEL, GOOD_MODEL) + pax(record("mtime", "1")) + bytes(1024), "invalid_archive"),
    "pax twice": (archive(pax(record("mtime", "1")), pax(record("mtime", "1"))), "invalid_archive"),
    "pax over 64 KiB": (archive(pax(record("comment", "x" * (65 << 10)))), "invalid_archive"),
    "pax cut": (header("pax", b"x", 900) + b"30 mtime=1", "truncated"),
    "pax key twice": (archive(pax(record("mtime", "1") * 2)), "invalid_archive"),
    "pax size": (archive(pax(record("size", "5"))), "invalid_archive"),
    "pax link": (archive(pax(record("linkpath", "/etc/passwd"))), "invalid_archive"),
    "pax sparse": (archive(pax(record("GNU.sparse.major", "1"))), "invalid_archive"),
    "pax charset": (archive(pax(record("hdrcharset", "BINARY"))), "invalid_archive"),
    "pax old charset": (archive(pax(record("charset", "ISO-IR 8859 1 1998"))), "invalid_archive"),
    "pax real size": (archive(pax(record("SCHILY.realsize", "5"))), "invalid_archive"),
    "pax path not UTF-8": (archive(pax(b"10 path=\xff\n")), "invalid_archive"),
    "pax path with a zero": (archive(pax(record("path", f"{CONFIG}\0.txt"))), "invalid_archive"),
    "pax length too long": (archive(pax(b"0000011 a=bcd\n")), "invalid_archive"),
    "pax length too short": (archive(pax(b"3 a=b\n")), "invalid_archive"),
    "pax length beyond": (archive(pax(b"99 a=b\n")), "invalid_archive"),
    "pax length zero": (archive(pax(b"0 a=b\n")), "invalid_archive"),
    "pax length in other digits": (archive(pax("\u0661\u0661 mtime=1\n".encode())), "invalid_archive"),
    "pax length signed": (archive(pax(b"+7 a=b\n")), "invalid_archive"),
    "pax without a key": (archive(pax(b"5 =b\n")), "invalid_archive"),
    "pax without a value": (archive(pax(b"5 ab\n")), "invalid_archive"),
    "pax without an end": (archive(pax(b"6 a=bc")), "invalid_archive"),
    "GNU long name": (
        tar_bytes(("d" * 120 + f"/{CONFIG}", GOOD_CONFIG), format=tarfile.GNU_FORMAT),
        "invalid_archive",
    ),
    "GNU long link": (archive(header("././@LongLink", b"K", 0)), "invalid_archive"),
    "contiguous file": (changed(156, b"7"), "invalid_archive"),
    "unknown type": (changed(156, b"Z"), "invalid_archive"),
    "size in base 256": (changed(124, b"\x80" + bytes(9) + b"\x01\x00"), "invalid_archive"),
    "size negative": (changed(124, b"-0000000001\0"), "invalid_archive"),
    "size not octal": (changed(124, b"00000000008\0"), "invalid_archive"),
    "size empty": (changed(124, bytes(12)), "invalid_archive"),
    "size with a gap": (changed(124, b"0000 000001\0"), "invalid_archive"),
    "other magic": (archive()[:257] + b"ustar\0  " + archive()[265:], "invalid_archive"),
    "checksum": (archive()[:100] + b"1" + archive()[101:], "invalid_archive"),
    "name not UTF-8": (changed(0, b"\xff\xfe"), "invalid_archive"),
    "bytes after the name": (changed(len(CONFIG) + 1, b"x"), "invalid_archive"),
    "a file with a link's target": (changed(157, b"/etc/passwd"), "invalid_archive"),
    "bytes after the header": (changed(505, b"x"), "invalid_archive"),
    "a file that is called a directory": (changed(len(CONFIG), b"/"), "invalid_archive"),
    "a directory with data": (archive(header("d/", b"5", 512), bytes(512)), "invalid_archive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused_by_code(case: str) -> None:
    data, code = REFUSED[case]
    assert refusal(data).code == code


def test_a_refusal_names_the_member_and_the_remedy() -> None:
    error = refusal(tar_bytes((CONFIG, GOOD_CONFIG), (special_member(MODEL, tarfile.SYMTYPE, "/etc/passwd"), b"")))
    assert error.param == MODEL
    assert "symbolic link" in error.message
    # The command follows links: without -h, it would make the same archive again.
    assert "tar --format=ustar -chf bundle.tar" in error.message


def test_the_remedy_is_a_command_that_works(tmp_path: Path) -> None:
    """The hub's cache has a checkpoint as a folder of links."""
    BUNDLE.save(tmp_path / "blobs")
    links = tmp_path / ("d" * 120)
    links.mkdir()
    for name in (CONFIG, MODEL):
        (links / name).symlink_to(tmp_path / "blobs" / name)
    subprocess.run(["tar", "--format=gnu", "-cf", str(tmp_path / "wrong.tar"), "-C", tmp_path, links.name], check=True)
    message = refusal((tmp_path / "wrong.tar").read_bytes()).message
    command = message.partition("make the archive with: ")[2].split()
    assert command[0] == "tar"
    subprocess.run(command, cwd=links, check=True)
    assert AdapterBundle.load(links / "bundle.tar").digest == BUNDLE.digest


def without_magic(block: bytes) -> bytes:
    header = bytearray(block)
    header[257:] = bytes(255)
    return with_checksum(header)


@pytest.mark.parametrize("options", [["--format=v7"], ["--label=mine"]])
def test_an_archive_without_a_magic_is_called_an_archive(options: list[str], tmp_path: Path) -> None:
    BUNDLE.save(tmp_path / "adapter")
    subprocess.run(["tar", *options, "-cf", str(tmp_path / "bundle.tar"), "-C", tmp_path, "adapter"], check=True)
    error = refusal((tmp_path / "bundle.tar").read_bytes())
    assert (error.code, error.param) == ("invalid_archive", "bundle")
    assert "v7" in error.message and "tar --format=ustar" in error.message
    # Made by hand, as programs of other systems write the sum.
    block = without_magic(header(CONFIG, b"0", len(GOOD_CONFIG)))
    for field in (block[148:156], b"\0" + block[148:154] + b"\0", b" " + block[149:154] + b" \0"):
        data = block[:148] + field + block[156:] + padded(GOOD_CONFIG) + bytes(1024)
        assert "v7" in refusal(data).message
    assert refusal(block[:148] + b"0000000\0" + block[156:] + bytes(1024)).code == "not_safetensors"


def test_a_type_is_named_in_words() -> None:
    assert "is a directory of an incremental archive;" in refusal(changed(156, b"D")).message
    assert "is of the unknown type 'Z';" in refusal(changed(156, b"Z")).message


def test_an_empty_archive_is_no_wrong_kind_of_file() -> None:
    """As `tar` leaves one where it finds none of its files."""
    error = refusal(tar_bytes())
    assert error.code == "not_safetensors" and "begins with zeros" in error.message


def pax_of_digits(n: int) -> bytes:
    return pax(b"1" * n) + archive()


def pax_of_many_records(n: int) -> bytes:
    return archive(pax(b"".join(record(f"k{i}", "") for i in range(n // 10))[: n // 2]))


WORST: dict[str, Callable[[int], bytes]] = {
    "pax of digits": pax_of_digits,
    "pax of digits within the limit": lambda n: b"".join(pax_of_digits(64 << 10) for _ in range(n >> 16)),
    "pax of spaces": lambda n: archive(pax(b" " * n)),
    "pax of equal signs": lambda n: archive(pax(b"=" * n)),
    "many pax records": pax_of_many_records,
    "the smallest records": lambda n: archive(pax(b"5 a=\n" * (n // 5))),
    "many pax headers": lambda n: archive(pax(record("mtime", "1")) * (n >> 10)),
    "zeros": lambda n: archive(after=bytes(n)),
    "zeros and a byte": lambda n: archive(after=bytes(n) + b"x"),
    "a path of slashes": lambda n: archive(pax(record("path", "/" * 60_000))),
    "a path of dots": lambda n: archive(pax(record("path", "./" * 30_000 + CONFIG))),
    "many members": lambda n: b"".join(header("d/", b"5", 0) for _ in range(n >> 9)),
}


@pytest.mark.parametrize("case", WORST)
@pytest.mark.parametrize("size", [64 << 10, 1 << 20])
def test_the_worst_archives_take_linear_time(case: str, size: int) -> None:
    data = WORST[case](size)
    began = time.perf_counter()
    with contextlib.suppress(InvalidBundle):
        AdapterBundle.from_bytes(data)
    assert time.perf_counter() - began < LINEAR_S


def test_sixteen_members_and_no_more() -> None:
    folders = [header(f"d{index}/", b"5", 0) for index in range(15)]
    assert AdapterBundle.from_bytes(archive(*folders[:14])).digest == BUNDLE.digest
    assert refusal(archive(*folders)).param == "bundle"


def test_python_reads_what_we_read() -> None:
    """The archives that these tests make by hand are archives."""
    with tarfile.open(fileobj=io.BytesIO(archive(pax(record("mtime", "1"))))) as opened:
        assert opened.getnames() == [CONFIG, MODEL]
