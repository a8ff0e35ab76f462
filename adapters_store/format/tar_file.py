"""Reader for untrusted tar archives: plain members alone, in time linear in the archive's bytes.

Format: POSIX.1-1988 ustar headers and pax extended headers,
https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html#tag_20_92_13. The checks are stricter than those of
Python's `tarfile`, whose pattern for pax records takes quadratic time and holds the interpreter's lock meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from adapters_store.errors import InvalidArchive, Truncated

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
MAX_MEMBERS = 16
# Writers put a few hundred bytes of times and owners there.
_MAX_PAX_BYTES = 64 << 10
_MAX_PAX_LENGTH_DIGITS = 6
# With -h links are followed. The hub's cache has a link for each file of a checkpoint.
_REMEDY = "make the archive with: tar --format=ustar -chf bundle.tar adapter_config.json adapter_model.safetensors"

_FILE = (b"0", b"\0")
_DIRECTORY = b"5"
_PAX = b"x"
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"7": "a contiguous file",
    b"D": "a directory of an incremental archive",
    b"M": "a part of a file (of several volumes)",
    b"V": "a label (--label)",
    b"g": "a header for all members (pax global)",
    b"K": "a GNU long link name",
    b"L": "a GNU long name",
    b"S": "a sparse file",
    b"X": "a Solaris extended header",
}
# pax records that make another file of a member. All records outside these are times, owners and the like.
_REFUSED_RECORDS = ("charset", "hdrcharset", "linkpath", "SCHILY.filetype", "SCHILY.realsize")
_REFUSED_PREFIX = "GNU.sparse."


@dataclass(frozen=True)
class TarMember:
    """A regular file or a directory.

    Attributes:
        name: The member's path.
        is_directory: Whether the member is a directory. A directory has no data.
        size: Bytes that the header announces.
        data: The file's bytes, a slice of the archive; shorter than `size` where the archive ends.
    """

    name: str
    is_directory: bool
    size: int
    data: memoryview


def looks_like_tar(prefix: bytes) -> bool:
    """Whether the first 512 bytes begin a tar archive, which may be one that is refused."""
    if prefix[257:262] == b"ustar":
        return True
    # Headers of the old form v7 have no magic, and a checksum.
    field = prefix[148:156].strip(b"\0 ")
    return field.isdigit() and not field.strip(b"01234567") and _checksum(prefix) == int(field, 8)


def tar_members(data: memoryview, max_members: int = MAX_MEMBERS) -> Iterator[TarMember]:
    """Yield the members of an archive in order. Nothing is copied but headers.

    Args:
        data: The whole archive.
        max_members: The most files and directories.

    Raises:
        InvalidArchive: The archive is damaged, or has something else than files and directories.
        Truncated: The archive ends before a member or its own end mark does.
    """
    position, count = 0, 0
    attributes: dict[str, str] | None = None
    while (header := _block(data, position)) != _ZEROS:
        _check_header(header)
        kind, size = header[156:157], _octal(header[124:136], "size")
        begin = position + _BLOCK
        position = begin + -(-size // _BLOCK) * _BLOCK
        if kind == _PAX:
            if attributes is not None:
                raise _invalid("two pax headers follow each other")
            attributes = _pax_records(data[begin : begin + size], size)
        else:
            count += 1
            if count > max_members:
                raise _invalid(f"it has more than {max_members} members")
            yield _member(header, size, data[begin : begin + size], attributes or {})
            attributes = None
        if position <= len(data) and any(data[begin + size : position]):
            raise _invalid("bytes follow a member that belong to no member")
    if attributes is not None:
        raise _invalid("a pax header has no member")
    _check_end(data, position)


def _block(data: memoryview, position: int) -> bytes:
    block = bytes(data[position : position + _BLOCK])
    if len(block) != _BLOCK:
        raise Truncated(
            "the archive ends without the two zero blocks of its end; upload it again, whole", param="bundle"
        )
    return block


def _check_end(data: memoryview, position: int) -> None:
    if _block(data, position + _BLOCK) != _ZEROS:
        raise _invalid("a zero block stands between its members")
    rest = data[position + 2 * _BLOCK :]
    if len(rest) and np.frombuffer(rest, np.uint8).any():
        raise _invalid("bytes follow its end; nothing would read them")


def _check_header(header: bytes) -> None:
    if header[257:265] not in (b"ustar\x0000", b"ustar  \0"):
        raise _invalid("a header has neither the magic of POSIX nor that of GNU, as the old form v7 and labels have it")
    if _checksum(header) != _octal(header[148:156], "checksum"):
        raise _invalid("the checksum of a header is wrong; upload it again")


def _checksum(header: bytes) -> int:
    # The sum counts its own field as spaces.
    return sum(header[:148]) + 8 * ord(" ") + sum(header[156:])


def _member(header: bytes, size: int, content: memoryview, attributes: dict[str, str]) -> TarMember:
    name = attributes.get("path") or _name(header)
    kind = header[156:157]
    if kind not in (*_FILE, _DIRECTORY):
        what = _REFUSED_TYPES.get(kind, f"of the unknown type {kind.decode('latin-1')!r}")
        raise _invalid(f"member {name!r} is {what}", param=name)
    if any(header[157:257]):
        raise _invalid(f"member {name!r} has the target of a link", param=name)
    for key, value in attributes.items():
        if key in _REFUSED_RECORDS or key.startswith(_REFUSED_PREFIX) or (key == "size" and value != str(size)):
            raise _invalid(f"member {name!r} has the pax record {key!r}", param=name)
    is_directory = kind == _DIRECTORY
    if is_directory and size:
        raise _invalid(f"directory {name!r} has data", param=name)
    if not is_directory and name.endswith("/"):
        raise _invalid(f"member {name!r} is a file with the name of a directory", param=name)
    return TarMember(name, is_directory, size, content)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:265] == b"ustar  \0":
        # GNU has two times here, and then what belongs to archives of several volumes and to sparse files.
        if any(header[369:512]):
            raise _invalid(f"member {name!r} has fields that only GNU's special members have", param=name)
        return name
    prefix = _text(header[345:500])
    if any(header[500:512]):
        raise _invalid(f"member {name!r} has bytes after the fields of its header", param=name)
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    raw = field.rstrip(b"\0")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid(f"the name {raw!r} is not UTF-8") from None
    if "\0" in text:
        raise _invalid(f"the name {text!r} has bytes after its end")
    return text


def _octal(field: bytes, what: str) -> int:
    """The number in a field: octal digits, perhaps after spaces, and perhaps spaces or zero bytes after them."""
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits or digits.strip(b"01234567"):
        raise _invalid(f"the {what} {field!r} of a header is no octal number")
    return int(digits, 8)


def _pax_records(raw: memoryview, size: int) -> dict[str, str]:
    """The records `length key=value` of a pax header, by key."""
    if size > _MAX_PAX_BYTES:
        raise _invalid(f"a pax header has {size} bytes; the limit is {_MAX_PAX_BYTES}")
    if len(raw) != size:
        raise Truncated("the archive ends inside a pax header; upload it again, whole", param="bundle")
    data, position = bytes(raw), 0
    records: dict[str, str] = {}
    while position < size:
        space = data.find(b" ", position, position + _MAX_PAX_LENGTH_DIGITS + 1)
        digits = data[position:space] if space >= 0 else b""
        # `isdigit` is true of ASCII digits alone in bytes.
        end = position + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= size or data[end - 1 : end] != b"\n" or not key or not equals:
            raise _invalid("a record of a pax header is not of the form 'length key=value'")
        name = key.decode("utf-8", "backslashreplace")
        if name in records:
            raise _invalid(f"a pax header has {name[:64]!r} twice")
        records[name] = _text(value) if name == "path" else value.decode("utf-8", "backslashreplace")
        position = end
    return records


def _invalid(reason: str, param: str = "bundle") -> InvalidArchive:
    return InvalidArchive(f"the archive cannot be read: {reason}; {_REMEDY}", param=param)
