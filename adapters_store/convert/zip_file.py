"""Reader for untrusted zip archives: plain members alone, few of them, each expanded within a bound.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (sections 4.3.7, 4.3.12, 4.3.16). Python's `zipfile`
makes an object for each entry of a directory before a caller can count the entries.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from adapters_store.errors import BundleTooLarge, InvalidArchive, Truncated
from adapters_store.format.mmap_buffer import writable_memory

MAX_MEMBERS = 64
# The end record, and the longest comment after it.
_END = struct.Struct("<4s4H2IH")
_MAX_COMMENT = (1 << 16) - 1
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED, _UTF8 = 0x1, 0x800
_STORED, _DEFLATED = 0, 8
# In place of a number that a zip64 record has.
_ZIP64, _MANY = 0xFFFFFFFF, 0xFFFF
_CHUNK = 1 << 20
_LINK = 0o120000
_KIND = 0o170000
_UNIX = 3


@dataclass(frozen=True)
class ZipMember:
    """A regular file as the archive's own directory describes it.

    Attributes:
        name: The member's path.
        size: Bytes of the file.
    """

    name: str
    size: int
    _method: int
    _crc: int
    _stored: memoryview

    def read(self, max_bytes: int) -> memoryview:
        """The file's bytes, in writable memory if they were compressed.

        Raises:
            BundleTooLarge: The file has more than `max_bytes` bytes; nothing of that size is allocated.
            InvalidArchive: The bytes are not what the directory announces.
        """
        if self.size > max_bytes:
            raise BundleTooLarge(
                f"member {self.name} expands to {self.size} bytes; the limit is {max_bytes}", param=self.name
            )
        data = self._stored if self._method == _STORED else self._inflated()
        if zlib.crc32(data) != self._crc:
            raise _invalid(f"the checksum of {self.name!r} is wrong", self.name)
        return data

    def begin(self, nbytes: int) -> bytes:
        """The file's first bytes, and all of a shorter file. Little more is expanded, and no checksum is looked at.

        Raises:
            InvalidArchive: The bytes cannot be expanded.
        """
        if self._method == _STORED:
            return bytes(self._stored[:nbytes])
        found = bytearray()
        for part in self._parts(min(_CHUNK, nbytes)):
            found += part
            if len(found) >= nbytes:
                break
        return bytes(found[:nbytes])

    def _inflated(self) -> memoryview:
        data = writable_memory(self.size)
        position = 0
        for part in self._parts(_CHUNK):
            data[position : position + len(part)] = part
            position += len(part)
        return data

    def _parts(self, most: int) -> Iterator[bytes]:
        """Expand the file, at most `most` bytes at once. The parts end with an error, or are as long as `size`."""
        stream, position, fed = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0
        waiting = memoryview(b"")
        try:
            while not stream.eof:
                if not waiting:
                    # What is not expanded yet is copied at each step, so little is given at once.
                    waiting = self._stored[fed : fed + _CHUNK]
                    fed += len(waiting)
                # One byte more than there is room for tells a file that is longer than announced.
                part = stream.decompress(waiting, min(most, self.size - position + 1))
                position += len(part)
                if position > self.size:
                    raise _invalid(f"{self.name!r} is longer than its entry says", self.name)
                yield part
                waiting = memoryview(stream.unconsumed_tail)
                if not part and not stream.eof and not waiting and fed == len(self._stored):
                    raise _invalid(f"{self.name!r} ends too soon", self.name)
        except zlib.error as error:
            raise _invalid(f"{self.name!r} cannot be expanded ({error})", self.name) from None
        if position != self.size or stream.unused_data or fed != len(self._stored):
            raise _invalid(f"{self.name!r} has another length than its entry says", self.name)


def looks_like_zip(prefix: bytes) -> bool:
    """Whether the first bytes can begin a zip archive."""
    return prefix[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def zip_members(data: memoryview) -> Iterator[ZipMember]:
    """Yield the regular files of an archive, in the order of its directory. Nothing is expanded.

    Args:
        data: The whole archive.

    Raises:
        InvalidArchive: The archive is damaged, too long a list, encrypted, or has something else than plain files.
        Truncated: The archive has no end record.
    """
    count, length, start = _end_record(data)
    if count > MAX_MEMBERS:
        raise _invalid(f"it has more than {MAX_MEMBERS} members")
    position, end = start, start + length
    for _ in range(count):
        if position + _ENTRY.size > end:
            raise _invalid("its directory is shorter than its end record says")
        entry = _ENTRY.unpack_from(data, position)
        signature, made_by, _, flags, method, _, _, crc, stored, size = entry[:10]
        name_length, extra_length, comment_length, disk, _, external, offset = entry[10:]
        begin = position + _ENTRY.size
        position = begin + name_length + extra_length + comment_length
        if signature != b"PK\x01\x02" or position > end:
            raise _invalid("an entry of its directory is damaged")
        name = _text(bytes(data[begin : begin + name_length]), flags, made_by >> 8)
        if disk or _ZIP64 in (stored, size, offset):
            raise _invalid(f"{name!r} is larger than 4 GiB, or on another volume", name)
        if flags & _ENCRYPTED:
            raise _invalid(f"{name!r} is encrypted", name)
        if made_by >> 8 == _UNIX and (external >> 16) & _KIND == _LINK:
            raise _invalid(f"{name!r} is a symbolic link", name)
        if name.endswith("/"):
            if size:
                raise _invalid(f"directory {name!r} has data", name)
            continue
        if method not in (_STORED, _DEFLATED):
            raise _invalid(f"{name!r} is compressed by method {method}; use deflate, or store it", name)
        yield ZipMember(name, size, method, crc, _stored_bytes(data, name, method, offset, stored, size))
    if position != end:
        raise _invalid("its directory is longer than its entries")


def _end_record(data: memoryview) -> tuple[int, int, int]:
    """(entries, bytes of the directory, its offset); the record is the last one that fits its own comment."""
    tail_start = max(0, len(data) - _END.size - _MAX_COMMENT)
    tail = bytes(data[tail_start:])
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0:
        if at + _END.size <= len(tail):
            _, disk, directory_disk, here, count, length, start, comment = _END.unpack_from(tail, at)
            if at + _END.size + comment == len(tail):
                if _ZIP64 in (length, start) or count == _MANY:
                    raise _invalid("it has the form for more than 4 GiB or 65,534 members (zip64)")
                if disk or directory_disk or here != count:
                    raise _invalid("it has several volumes")
                if start + length > tail_start + at:
                    raise _invalid("its directory lies beyond its end record")
                return count, length, start
        at = tail.rfind(b"PK\x05\x06", 0, at)
    raise Truncated("the zip archive ends without its directory; send it again, whole", param="bundle")


def _stored_bytes(data: memoryview, name: str, method: int, offset: int, stored: int, size: int) -> memoryview:
    if offset + _LOCAL.size > len(data) or bytes(data[offset : offset + 4]) != b"PK\x03\x04":
        raise _invalid(f"the header of {name!r} is not where its entry says", name)
    name_length, extra_length = _LOCAL.unpack_from(data, offset)[9:]
    begin = offset + _LOCAL.size + name_length + extra_length
    content = data[begin : begin + stored]
    if len(content) != stored:
        raise _invalid(f"the archive ends inside {name!r}", name)
    if method == _STORED and stored != size:
        raise _invalid(f"{name!r} has two lengths", name)
    return content


def _text(raw: bytes, flags: int, system: int) -> str:
    """The name of an entry. It is compared and shown, and never used as a path."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        if flags & _UTF8:
            raise _invalid(f"the name {raw[:64]!r} is marked as UTF-8, and is none") from None
        # 4.4.4 and appendix D. Info-ZIP's zip marks no name as UTF-8 in some locales, and Windows' Explorer marks none.
        name = raw.decode("cp437")
    if "\0" in name:
        raise _invalid(f"the name {name[:64]!r} has a zero byte")
    # 4.4.17 asks for slashes. `Compress-Archive` of Windows PowerShell 5 writes back slashes all the same.
    return name if system == _UNIX else name.replace("\\", "/")


def _invalid(reason: str, param: str = "bundle") -> InvalidArchive:
    return InvalidArchive(
        f"the zip archive cannot be read: {reason}; make it with: zip -r adapter.zip FOLDER", param=param
    )
