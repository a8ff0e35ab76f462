"""Readers of bytes that clients send: any input is accepted or refused by its type, in proportion to its length."""

from __future__ import annotations

import contextlib
import json
import tarfile

import pytest
from hypothesis import strategies as st

from adapters_store import AdapterBundle, InvalidBundle, parse_json, validate_bundle
from fuzz.make_corpus import GOOD_TAR, extended
from fuzz.mutation import Input, corpus, fuzz, mutated, seconds_for, within_time

JSON_TOKENS = (b"{", b"}", b"[", b"]", b",", b'{"a":', b"null", b"true", b"1e9", b"NaN", b"\\ud800", b"\\u0061")
TENSOR_TOKENS = (*JSON_TOKENS, b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"')
TAR_TOKENS = (b"ustar\x0000", b"ustar  \0", b"path=", b"size=", b"GNU.sparse.map=", b"0000644\0", b"\x80" + bytes(11))
KINDS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"X", b"S")


def check_bundle(data: bytes) -> None:
    def read() -> None:
        with contextlib.suppress(InvalidBundle):
            validate_bundle(AdapterBundle.from_bytes(data))

    within_time(data, read)


def check_json(data: bytes) -> None:
    def read() -> None:
        with contextlib.suppress(json.JSONDecodeError):
            value = parse_json(data)
            assert value == json.loads(data)
            assert parse_json(json.dumps(value)) == value

    within_time(data, read)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Extended headers with right checksums and lengths, and any content, before a good archive."""
    data = b""
    for _ in range(draw(st.integers(1, 3))):
        piece = draw(st.sampled_from([b"1", b" ", b"\0", b"1 ", b"\n", b"=", b"7 a=bc\n", b"a"]))
        payload = piece * draw(st.integers(0, 60_000 // len(piece)))
        payload += draw(
            st.sampled_from([b"", b"30 path=adapter_config.json\n\n", b"22 size=99999999999999\n", b"0 =\n"])
        )
        data += extended(payload, draw(st.sampled_from(KINDS)))
    return Input(data + GOOD_TAR)


@pytest.mark.parametrize("kind", ["tar", "safetensors"])
def test_every_bundle_of_the_corpus_is_read_or_refused_by_type(kind: str) -> None:
    for data in corpus(kind).values():
        check_bundle(data)


def test_every_json_of_the_corpus_is_read_or_refused_by_type() -> None:
    for data in corpus("json").values():
        check_json(data)


def test_mutated_archives() -> None:
    fuzz(check_bundle, mutated(list(corpus("tar").values()), TAR_TOKENS), seconds_for(0.12))


def test_archives_with_extended_headers() -> None:
    fuzz(check_bundle, archives(), seconds_for(0.12))


def test_mutated_safetensors() -> None:
    fuzz(check_bundle, mutated(list(corpus("safetensors").values()), TENSOR_TOKENS), seconds_for(0.13))


def test_mutated_json() -> None:
    fuzz(check_json, mutated(list(corpus("json").values()), JSON_TOKENS), seconds_for(0.13))
