"""Reader of an untrusted multipart form, with bounds on everything but the bundle itself.

python-multipart finds the parts, and bounds their headers. This module bounds the rest: the number of parts, all bytes
that belong to no part, and lines that look like a boundary, which the library goes through byte by byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, cast

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from sera_serve.errors import InvalidRequest, SeraServeError

FORM_TYPE = "multipart/form-data"
_MAX_PARTS = 8
_MAX_TEXT_BYTES = 1024
_MAX_PART_HEADERS = 8
_MAX_PART_HEADER_BYTES = 4096
# Boundaries, headers of parts, and the padding that a boundary may have.
_MAX_OVERHEAD_BYTES = 64 << 10
_OVERHEAD_OF_PART = 1 << 10
# The bounds are checked after each so many bytes.
_CHUNK_BYTES = 64 << 10
# RFC 2046, 5.1.1.
_MAX_BOUNDARY_BYTES = 70
_MEMORY_BYTES = 1 << 20
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"ascii")
_PLAIN_ENCODINGS = (b"7bit", b"8bit", b"binary")
# Names in Content-Disposition: https://html.spec.whatwg.org/#multipart-form-data
_ESCAPED = {b"%22": b'"', b"%0D": b"\r", b"%0A": b"\n"}
_ESCAPE = re.compile(rb"%22|%0D|%0A")


class InvalidForm(InvalidRequest):
    """The multipart body cannot be parsed."""

    code = "invalid_multipart"
    status = 400


class UploadNotWritten(SeraServeError):
    """The temporary file of an upload could not be written: the temporary directory is full or not writable."""

    code = "upload_not_written"
    status = 507


class MissingField(InvalidRequest):
    """A field of the form is missing."""

    code = "missing_field"


class UnknownField(InvalidRequest):
    """The form has an unknown field, or the same field twice."""

    code = "unknown_field"


@dataclass
class FormPart:
    """One field of the form.

    Attributes:
        name: The field's name.
        is_file: Whether the part has a file name.
        filename: The file name that the client gave; empty for a part that is no file. It is data, never a path.
        text: The value of a field that is no file.
        file: The content of a file in a field whose files are kept; None for others.
        nbytes: Bytes of the value.
    """

    name: str
    is_file: bool
    filename: str = ""
    text: str = ""
    file: BinaryIO | None = None
    nbytes: int = 0

    def opened(self) -> BinaryIO:
        """Return the content of a file that is kept, to be read from its beginning."""
        assert self.file is not None
        self.file.seek(0)
        return self.file


@dataclass
class _Headers:
    """The headers of the part that is being read."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    name: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)


def form_content(required: list[str], fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a request body that is a form, for OpenAPI. `fields` has the schema of each."""
    return {FORM_TYPE: {"schema": {"type": "object", "required": required, "properties": fields}}}


def boundary_of(content_type: str, remedy: str) -> bytes:
    """The boundary in the Content-Type of a form.

    Args:
        content_type: The header's value.
        remedy: What a form of this route looks like, for messages.

    Raises:
        InvalidForm: There is none, it is not of the allowed length, or the form has another charset than UTF-8.
    """
    # HTTP headers are bytes; Starlette has decoded them as latin-1.
    _, options = parse_options_header(content_type)
    _check_charset(options, "Content-Type", "Content-Type")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise InvalidForm(
            f"Content-Type needs a boundary of 1 to {_MAX_BOUNDARY_BYTES} bytes; {remedy}", param="Content-Type"
        )
    return boundary


class FormReader:
    """Reads one form. Its methods block on the disk; one thread at a time calls them."""

    def __init__(
        self,
        content_type: str,
        kept: Mapping[str, int | None],
        remedy: str,
        *,
        max_parts: int = _MAX_PARTS,
        in_memory: int | None = None,
        repeats: bool = False,
    ) -> None:
        """Set up; no file is made before a part needs it.

        Args:
            content_type: The header's value.
            kept: Fields whose files are kept, and the most bytes of each; None is the limit of the body.
            remedy: What a form of this route looks like, for messages.
            max_parts: The most fields.
            in_memory: Bytes of a file from which on it goes to the disk; None is 1 MiB.
            repeats: Whether a field may have several files. Of any other, the first alone is kept.

        Raises:
            InvalidForm: The header is not that of a form; see `boundary_of`.
        """
        boundary = boundary_of(content_type, remedy)
        self.parts: list[FormPart] = []
        self._kept = kept
        self._remedy = remedy
        self._max_parts = max_parts
        # One before each part, one at the end. A client chooses a boundary that is not in its data.
        self._max_boundaries = max_parts + 2
        self._max_overhead = max(_MAX_OVERHEAD_BYTES, max_parts * _OVERHEAD_OF_PART)
        self._in_memory = _MEMORY_BYTES if in_memory is None else in_memory
        self._repeats = repeats
        self._delimiter = b"\r\n--" + boundary
        self._files: list[BinaryIO] = []
        self._headers = _Headers()
        self._text = bytearray()
        self._tail = b""
        self._last = b""
        self._received = 0
        self._in_parts = 0
        self._boundaries = 0
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
            max_header_count=_MAX_PART_HEADERS,
            max_header_size=_MAX_PART_HEADER_BYTES,
        )

    def feed(self, data: bytes) -> None:
        """Read the next bytes of the body.

        Raises:
            InvalidForm: They cannot belong to an acceptable form.
            UploadNotWritten: The temporary file could not be written.
        """
        for start in range(0, len(data), _CHUNK_BYTES):
            self._read(data[start : start + _CHUNK_BYTES])

    def finish(self, data: bytes) -> None:
        """Read the last bytes of the body; raises as `feed` does, and where the form has not ended."""
        if data:
            self.feed(data)
        if not self._received:
            return
        if not self._ended:
            raise InvalidForm(f"the body ends before its last boundary; {self._remedy}")
        if not self._last.removesuffix(b"\r\n").endswith(self._delimiter[2:] + b"--"):
            raise InvalidForm(f"bytes follow the last boundary of the body; {self._remedy}")
        try:
            for file in self._files:
                file.flush()
        except OSError as error:
            raise _not_written(error) from error

    def fields(self, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, FormPart]:
        """Return the parts of a form that is read, by name. Fields whose files are kept are files, all others texts.

        Raises:
            MissingField, UnknownField: A field is missing, unknown, or there twice.
            InvalidRequest: A file was sent as a text, or a text as a file.
        """
        found: dict[str, FormPart] = {}
        for part in self.parts:
            name, is_kept = part.name, part.name in self._kept
            if name not in (*required, *optional):
                raise UnknownField(f"form field {name[:64]!r} is unknown; {self._remedy}", param=name[:64])
            if name in found and not (self._repeats and is_kept):
                raise UnknownField(f"form field {name} appears twice; send it once", param=name)
            if is_kept and not part.is_file:
                raise InvalidRequest(f"form field {name} is text; send it as a file: curl -F {name}=@FILE", param=name)
            if part.is_file and not is_kept:
                raise InvalidRequest(f"form field {name} is a file; send it as text", param=name)
            found[name] = part
        for name in required:
            if name not in found:
                raise MissingField(f"form field {name} is missing; {self._remedy}", param=name)
        return found

    def close(self) -> None:
        """Delete the temporary file."""
        for file in self._files:
            try:
                file.close()
            except OSError:
                # The last bytes of a refused upload did not fit on the disk. The file is closed all the same.
                continue

    def _read(self, data: bytes) -> None:
        if not self._received and not data.lstrip(b"\r\n").startswith(self._delimiter[2:]):
            raise InvalidForm(f"the body does not begin with its boundary; {self._remedy}")
        seen = self._tail + data
        # The first boundary has no line before it.
        found = seen.count(self._delimiter)
        left = self._max_boundaries - self._boundaries
        if found > left:
            # The bytes before the first boundary beyond the limit. Where these boundaries begin fields, the parser
            # refuses the number of fields.
            beyond = len(self._delimiter) + len(seen.split(self._delimiter, left + 1)[-1])
            self._parse(data[: max(0, len(data) - beyond)])
            raise InvalidForm(f"the body has more than {self._max_boundaries} boundaries; {self._remedy}")
        self._boundaries += found
        # Too short to hold the delimiter, so that none is counted twice.
        self._tail = seen[-len(self._delimiter) + 1 :]
        # The last boundary, its two hyphens, and a line end.
        self._last = (self._last + data)[-len(self._delimiter) - 4 :]
        self._received += len(data)
        self._parse(data)
        if self._received - self._in_parts > self._max_overhead:
            raise InvalidForm(f"more than {self._max_overhead} bytes of the body belong to no field; {self._remedy}")

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidForm(f"the form cannot be read: {error}; {self._remedy}") from error

    def _on_part_begin(self) -> None:
        if len(self.parts) == self._max_parts:
            raise InvalidForm(f"the form has more than {self._max_parts} fields; {self._remedy}")
        self._headers = _Headers()
        self._text.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._headers.name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers.value += data[start:end]

    def _on_header_end(self) -> None:
        headers = self._headers
        name = bytes(headers.name).lower()
        if name in headers.values:
            raise InvalidForm(f"a field of the form has the header {name.decode('ascii')} twice; {self._remedy}")
        headers.values[name] = bytes(headers.value)
        headers.name.clear()
        headers.value.clear()

    def _on_headers_finished(self) -> None:
        values = self._headers.values
        kind, options = parse_options_header(values.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise InvalidForm(f"a field of the form has no name in its Content-Disposition; {self._remedy}")
        # It names nothing here, so any bytes will do.
        filename = _unescaped(options.get(b"filename", b"")).decode("utf-8", "replace")
        name = _utf8(_unescaped(options[b"name"]), "the name of a field", self._remedy)
        part = FormPart(name, b"filename" in options, filename)
        encoding = values.get(b"content-transfer-encoding", b"binary").strip().lower()
        if encoding not in _PLAIN_ENCODINGS:
            raise InvalidForm(
                f"form field {part.name!r} has a transfer encoding; send its bytes as they are", param=part.name
            )
        if not part.is_file:
            _check_charset(parse_options_header(values.get(b"content-type"))[1], f"form field {part.name!r}", part.name)
        elif part.name in self._kept and (self._repeats or all(part.name != other.name for other in self.parts)):
            try:
                part.file = cast(BinaryIO, SpooledTemporaryFile(max_size=self._in_memory))  # noqa: SIM115
            except OSError as error:
                raise _not_written(error) from error
            self._files.append(part.file)
        self.parts.append(part)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        part.nbytes += end - start
        self._in_parts += end - start
        if part.file is not None:
            most = self._kept[part.name]
            if most is not None and part.nbytes > most:
                raise InvalidForm(
                    f"form field {part.name!r} has more than {most} bytes; send a shorter file", param=part.name
                )
            try:
                part.file.write(memoryview(data)[start:end])
            except OSError as error:
                raise _not_written(error) from error
        elif not part.is_file:
            if part.nbytes > _MAX_TEXT_BYTES:
                raise InvalidForm(
                    f"form field {part.name!r} has more than {_MAX_TEXT_BYTES} bytes; send a file as a file; "
                    f"{self._remedy}",
                    param=part.name,
                )
            self._text += data[start:end]

    def _on_part_end(self) -> None:
        part = self.parts[-1]
        if not part.is_file:
            part.text = _utf8(bytes(self._text), f"form field {part.name!r}", self._remedy, part.name)

    def _on_end(self) -> None:
        self._ended = True


def _check_charset(options: dict[bytes, bytes], where: str, param: str) -> None:
    charset = options.get(b"charset", b"utf-8")
    if charset.lower() not in _CHARSETS:
        raise InvalidForm(
            f"{where} has the charset {charset.decode('latin-1')!r}; send UTF-8, or leave the charset out", param=param
        )


def _unescaped(name: bytes) -> bytes:
    """A name as its client has it. Browsers, curl, httpx and requests write three characters as the HTML standard says.

    They leave a % as it is. So a name that really has %22 is read with a quote; the Fetch standard reads it so too.
    """
    return _ESCAPE.sub(lambda found: _ESCAPED[found[0]], name)


def _utf8(value: bytes, what: str, remedy: str, param: str | None = None) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidForm(f"{what} is not UTF-8; {remedy}", param=param) from None


def _not_written(error: OSError) -> UploadNotWritten:
    return UploadNotWritten(
        f"the upload could not be written to the server's temporary directory: {error.strerror or error}; free space "
        "there, or start the server with TMPDIR naming a directory that has room for max_uploads bundles"
    )
