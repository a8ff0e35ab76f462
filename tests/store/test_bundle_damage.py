"""Any bytes at all are a bundle or a refusal of its type."""

from __future__ import annotations

import contextlib
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import safetensors_bytes, tar_bytes
from wrong_files import CONFIG, GOOD, GOOD_CONFIG, GOOD_MODEL, MODEL

from adapters_store import AdapterBundle, InvalidBundle, validate_bundle

TAR = tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL))
CHUNKS = st.binary(min_size=1, max_size=12) | st.sampled_from(
    [b"{", b"}", b"[", b'"', b"0", b"-1", b"1e9", b"null", b"\xff" * 8, b"ustar", b"\x80\x00\x00\x01", b"9" * 12]
)


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from([GOOD, TAR, tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL), format=tarfile.GNU_FORMAT)]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), CHUNKS, st.booleans()), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_any_damage_is_refused_by_type(data: bytes, edits: list[tuple[float, bytes, bool]], kept: float) -> None:
    """Whatever the bytes, the answer is a bundle or an `InvalidBundle`."""
    for place, piece, overwrite in edits:
        at = int(place * len(data))
        data = data[:at] + piece + data[at + len(piece) * overwrite :]
    if kept < 0.2:
        data = data[: int(len(data) * kept * 5)]
    with contextlib.suppress(InvalidBundle):
        validate_bundle(AdapterBundle.from_bytes(data))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=600) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_refused_by_type(data: bytes) -> None:
    for attempt in (data, safetensors_bytes(b"{" + data), tar_bytes((CONFIG, data), (MODEL, data)), data + TAR[200:]):
        with pytest.raises(InvalidBundle):
            AdapterBundle.from_bytes(attempt)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(range(512)), CHUNKS, st.sampled_from([0, 1024 + len(GOOD_CONFIG) // 512 * 512]))
def test_damaged_tar_header_with_a_right_checksum_is_refused_by_type(at: int, piece: bytes, start: int) -> None:
    data = bytearray(TAR)
    piece = piece[: 512 - at]
    data[start + at : start + at + len(piece)] = piece
    header = data[start : start + 512]
    header[148:156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    with contextlib.suppress(InvalidBundle):
        AdapterBundle.from_bytes(data)
