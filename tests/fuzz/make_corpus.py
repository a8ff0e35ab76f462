"""Writes the corpus: valid inputs, and inputs that have hurt this server or others like it.

    python -m fuzz.make_corpus        (in the folder `tests`)

An input that a fuzz run finds is added by hand, as a file with a name that says what it is.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
sys.path.insert(0, str(FOLDER.parents[1] / "store"))

from bundle_factory import make_bundle, make_classifier  # noqa: E402
from raw_files import safetensors_bytes, special_member, split_file, two_files  # noqa: E402
from raw_files import tar_bytes as padded_tar  # noqa: E402

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
BUNDLE = make_bundle()
GOOD_CONFIG, GOOD_MODEL = two_files(BUNDLE)


def tar_bytes(*members: tuple[tarfile.TarInfo | str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive that ends with two empty blocks; the usual padding to 20 would be most of the corpus."""
    content = padded_tar(*members, format=format).rstrip(b"\0")
    return content + bytes(-len(content) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)


GOOD_TAR = tar_bytes((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL))
TINY_TAR = tar_bytes((CONFIG, b"{}"))


def http() -> dict[str, bytes]:
    """Requests with their heads, some with several on one connection."""
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    body = b'{"prompt": "hello", "max_new_tokens": 4}'
    typed = b"Host: localhost\r\nContent-Type: application/json\r\n"
    post = b"POST /v1/generate HTTP/1.1\r\n" + typed
    length = b"Content-Length: %d\r\n\r\n"
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
    plain = post + length % len(body) + body
    stream = b'{"prompt": "hello", "stream": true}'
    return {
        "get": get + b"\r\n",
        "head": b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "options": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "list": b"GET /v1/adapters?limit=1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "list_repeated_parameter": b"GET /v1/adapters?limit=1&limit=2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "inspect": b"GET /v1/adapters/demo/writer%40v1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "inspect_climbing": b"GET /v1/adapters/..%2f..%2fetc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "delete_unknown": b"DELETE /v1/adapters/no/one HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "metrics": b"GET /metrics HTTP/1.0\r\n\r\n",
        "absolute_uri": b"GET http://localhost/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "connect": b"CONNECT x:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "post": plain,
        "post_stream": post + length % len(stream) + stream,
        "classify": b"POST /v1/classify HTTP/1.1\r\n"
        + typed
        + length % 43
        + b'{"adapter": "demo/sorter", "inputs": ["a"]}',
        "post_chunked": chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        "chunk_extensions": chunked + b"%x;a=b;c\r\n%b\r\n0;d=e\r\n\r\n" % (len(body), body),
        "trailers": chunked + b"2\r\n{}\r\n0\r\nX-Trailer: y\r\nContent-Length: 5\r\n\r\n",
        "trailer_unended": chunked + b"2\r\n{}\r\n0\r\nX: " + b"a" * 2000,
        "chunk_size_huge": chunked + b"ffffffffffffffff1\r\n{}\r\n0\r\n\r\n",
        "chunk_size_negative": chunked + b"-1\r\n{}\r\n0\r\n\r\n",
        "length_and_chunked": post + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "two_lengths": post + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n" + body,
        "length_negative": post + b"Content-Length: -1\r\n\r\n{}",
        "length_huge": post + b"Content-Length: 99999999999999999999\r\n\r\n{}",
        "length_too_large": post + b"Content-Length: 1048577\r\n\r\n{}",
        "body_cut": post + length % 100 + body,
        "body_on_get": get + b"Content-Length: 2\r\n\r\n{}",
        "encoding_gzip": post + b"Content-Encoding: gzip\r\n" + length % len(body) + body,
        "expect": post + b"Expect: 100-continue\r\n" + length % len(body) + body,
        "upgrade": get + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
        "upgrade_h2c": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "no_host": b"GET /healthz HTTP/1.1\r\n\r\n",
        "two_hosts": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: y\r\n\r\n",
        "header_unended": get + b"X: " + b"a" * 2000,
        "header_folded": get + b"X: a\r\n b\r\n\r\n",
        "header_without_colon": get + b"X\r\n\r\n",
        "header_nul": get + b"X: a\0b\r\n\r\n",
        "headers_many": get + b"a: b\r\n" * 300 + b"\r\n",
        "bare_line_feeds": b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
        "uri_unended": b"GET /" + b"a" * 2000,
        "uri_raw_bytes": b"GET /\xff\xfe\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "version_wrong": b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        "tls_hello": bytes.fromhex("16030100a5010000a10303") + bytes(range(32)),
        "pipelined": (get + b"\r\n") * 6,
        "pipelined_mixed": plain + get + b"\r\n" + plain + b"GARBAGE\r\n\r\n",
        "cross_site": plain.replace(b"Host: localhost\r\n", b"Host: evil.example\r\nOrigin: https://evil.example\r\n"),
        "empty_line_first": b"\r\n\r\n" + get + b"\r\n",
    }


def multipart() -> dict[str, bytes]:
    """Forms, each after its Content-Type and an empty line."""
    kind = b"multipart/form-data; boundary=b"
    name = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nfuzz/new\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="bundle"; filename="f"\r\n\r\nno bundle\r\n'
    end = b"--b--\r\n"
    form = name + file + end
    disposition = b'form-data; name="name"'

    def of(content: bytes, content_type: bytes = kind) -> bytes:
        return content_type + b"\r\n\r\n" + content

    charsets = ("undefined", "punycode", "idna", "utf-16", "rot13", "unknown-8bit", "")
    return {
        "form": of(form),
        "form_of_model": of(form.replace(b"no bundle", GOOD_MODEL)),
        "quoted_boundary": of(form, b'multipart/form-data; boundary="b"'),
        **{f"charset_{c.replace('-', '_') or 'empty'}": of(form, kind + b"; charset=" + c.encode()) for c in charsets},
        "no_boundary": of(form, b"multipart/form-data"),
        "boundary_empty": of(form, b"multipart/form-data; boundary="),
        "boundary_long": of(form, b"multipart/form-data; boundary=" + b"b" * 300),
        "boundary_not_ascii": of(form, b"multipart/form-data; boundary=\xff"),
        "other_kind": of(form, b"multipart/mixed; boundary=b"),
        "name_alone": of(name + end),
        "bundle_alone": of(file + end),
        "name_twice": of(name + name + file + end),
        "unknown_field": of(name.replace(b'name="name"', b'name="alias"') + form),
        "many_fields": of(name * 40 + form),
        "name_not_utf8": of(form.replace(b"fuzz/new", b"fuzz/\xff\xfe")),
        "name_is_file": of(form.replace(disposition, disposition + b'; filename="n"')),
        "name_star": of(form.replace(b'name="name"', b"name*=utf-8''name")),
        "no_disposition": of(form.replace(b"Content-Disposition: " + disposition, b"X: y")),
        "disposition_unended": of(form.replace(disposition, b'form-data; name="' + b"\\" * 500)),
        "part_header_long": of(form.replace(disposition, disposition + b"; x=" + b"a" * 1100)),
        "part_headers_many": of(form.replace(disposition, disposition + b"\r\nA: b" * 200)),
        "part_transfer_encoding": of(form.replace(disposition, disposition + b"\r\nContent-Transfer-Encoding: base64")),
        "cut_in_file": of(name + file[:60]),
        "cut_in_header": of(name[:20]),
        "no_end": of(name + file),
        "preamble_epilogue": of(b"before\r\n" + form + b"after"),
        "bare_line_feeds": of(form.replace(b"\r\n", b"\n")),
        "carriage_returns": of(name + b"\r" * 800 + end),
        "empty": of(b""),
    }


def tar() -> dict[str, bytes]:
    """Archives: valid ones of each format, and headers that readers have stumbled over."""
    members = ((CONFIG, GOOD_CONFIG), (MODEL, GOOD_MODEL))
    model = special_member(MODEL, tarfile.GNUTYPE_SPARSE)
    block = GOOD_TAR[:512]
    return {
        "pax": tar_bytes(*members, format=tarfile.PAX_FORMAT),
        "gnu": tar_bytes(*members, format=tarfile.GNU_FORMAT),
        "ustar": tar_bytes(*members, format=tarfile.USTAR_FORMAT),
        "in_folder": tar_bytes((special_member("b", tarfile.DIRTYPE), b""), *((f"b/{n}", c) for n, c in members)),
        "long_name": tar_bytes(*((f"{'b' * 150}/{name}", content) for name, content in members)),
        "pax_digits": extended(b"1" * (28 << 10)),
        "pax_spaces": extended(b" " * 1000),
        "pax_record": extended(b"30 path=adapter_config.json\n\n") + TINY_TAR,
        "pax_zero_length": extended(b"0 a=b\n") + TINY_TAR,
        "pax_length_too_large": extended(b"99999999999 a=b\n") + TINY_TAR,
        "pax_length_digits": extended(b"1" * 4400 + b" a=b\n") + TINY_TAR,
        "pax_no_equals": extended(b"9 abcdef\n") + TINY_TAR,
        "pax_size": extended(b"22 size=99999999999999\n") + TINY_TAR,
        "pax_size_negative": extended(b"11 size=-1\n") + TINY_TAR,
        "pax_not_utf8": extended(b"12 path=\xff\xfe\xfd\n") + TINY_TAR,
        "pax_charset": extended(b"21 hdrcharset=BINARY\n") + TINY_TAR,
        "pax_sparse": extended(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + TINY_TAR,
        "pax_chain": extended(b"7 a=bc\n") * 3 + TINY_TAR,
        "pax_alone": extended(b"7 a=bc\n"),
        "pax_global": extended(b"7 a=bc\n", tarfile.XGLTYPE) + TINY_TAR,
        "pax_global_path": extended(b"30 path=adapter_config.json\n\n", tarfile.XGLTYPE) + TINY_TAR,
        "gnu_long_name_endless": extended(b"a" * 1100, tarfile.GNUTYPE_LONGNAME) + TINY_TAR,
        "gnu_long_link": extended(b"a" * 10, tarfile.GNUTYPE_LONGLINK) + TINY_TAR,
        "gnu_sparse": tar_bytes((model, b"")),
        "symlink": tar_bytes((special_member(MODEL, tarfile.SYMTYPE, CONFIG), b"")),
        "device": tar_bytes((special_member(CONFIG, tarfile.CHRTYPE), b"")),
        "climbing": tar_bytes((f"../{CONFIG}", GOOD_CONFIG), (MODEL, GOOD_MODEL)),
        "size_base256": checksummed(block[:124] + b"\xff" * 12 + block[136:]) + TINY_TAR,
        "size_octal_spaces": checksummed(block[:124] + b" " * 12 + block[136:]) + TINY_TAR,
        "member_twice": tar_bytes(*members, members[0]),
        "member_third": tar_bytes(*members, ("README", b"hello")),
        "members_many": tar_bytes(*((f"f{i}", b"") for i in range(17))),
        "cut": GOOD_TAR[: len(GOOD_TAR) // 3],
        "cut_in_header": GOOD_TAR[:300],
        "checksum_wrong": GOOD_TAR[:148] + b"0000000\0" + GOOD_TAR[156:],
        "bytes_after_end": GOOD_TAR + b"more",
        "no_end": GOOD_TAR.rstrip(b"\0"),
    }


def extended(payload: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header of some bytes, without the member that it is for."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(payload)
    return info.tobuf(tarfile.USTAR_FORMAT) + payload + b"\0" * (-len(payload) % tarfile.BLOCKSIZE)


def checksummed(block: bytes) -> bytes:
    """A header block with the checksum that it must have."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def safetensors() -> dict[str, bytes]:
    """Files of tensors, single-file bundles among them."""
    good = BUNDLE.to_bytes()
    header, data = split_file(good)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

    def of(**fields: object) -> bytes:
        return safetensors_bytes({"x": entry | fields}, bytes(4))

    return {
        "generator": good,
        "classifier": make_classifier().to_bytes(),
        "without_configuration": GOOD_MODEL,
        "empty": b"",
        "length_alone": good[:8],
        "length_huge": b"\xff" * 8 + good[8:],
        "length_1gb": (1 << 30).to_bytes(8, "little") + b"{" + bytes(100),
        "header_cut": good[:100],
        "data_cut": good[:-1],
        "data_more": good + b"x",
        "header_list": safetensors_bytes("[]"),
        "header_deep": safetensors_bytes('{"a":' * 1100),
        "header_arrays_deep": safetensors_bytes('{"a":' + "[" * 1100),
        "header_key_twice": safetensors_bytes('{"x":{},"x":{}}'),
        "header_not_utf8": safetensors_bytes(b'{"\xff":1}'),
        "header_surrogate": safetensors_bytes('{"\\ud800":{}}'),
        "header_spaces": safetensors_bytes("{" + " " * 1000 + "}"),
        "dtype_unknown": of(dtype="F8_E4M3"),
        "dtype_list": of(dtype=["F32"]),
        "shape_empty": of(shape=[0], data_offsets=[0, 0]),
        "shape_negative": of(shape=[-1]),
        "shape_huge": of(shape=[1 << 40, 1 << 40]),
        "shape_number_huge": of(shape=[10**400]),
        "shape_real": of(shape=[1.0]),
        "shape_true": of(shape=[True]),
        "shape_many": of(shape=[1] * 64),
        "offsets_backwards": of(data_offsets=[4, 0]),
        "offsets_overlap": safetensors_bytes({"x": entry, "y": entry}, bytes(4)),
        "metadata_number": safetensors_bytes({"__metadata__": {"format": 1}}),
        "metadata_more": safetensors_bytes(header | {"__metadata__": {**header["__metadata__"], "a": "b"}}, data),
        "config_deep": configured(header, data, '{"training":' + "[" * 1100),
        "config_numbers": configured(header, data, '{"format_version":' + "9" * 4400 + "}"),
        "config_infinite": configured(header, data, BUNDLE.config.canonical_json().replace("0.5", "1e999")),
        "not_finite": good[:-4] + b"\x00\x00\x80\x7f",
    }


def configured(header: dict[str, object], data: bytes, config: str) -> bytes:
    """A single-file bundle with another configuration."""
    return safetensors_bytes(header | {"__metadata__": {"adapter_config": config}}, data)


def jsons() -> dict[str, bytes]:
    """Texts that are JSON, nearly JSON, or JSON with two meanings."""
    return {
        "object": json.dumps({"prompt": "hello", "stop": ["a", "é"], "seed": None, "top_p": 0.5}).encode(),
        "not_ascii": '{"prompt": "☠ é 😀"}'.encode(),
        "escapes": b'"\\u0041\\ud83d\\ude00\\n\\/"',
        "tokens": json.dumps({"token_ids": [-1] * 400}).encode(),
        "deep_arrays": b"[" * 1100,
        "deep_arrays_ended": b"[" * 900 + b"]" * 900,
        "deep_objects": b'{"a":' * 1100,
        "key_twice": b'{"a": 1, "a": 2}',
        "key_twice_escaped": b'{"a": 1, "\\u0061": 2}',
        "keys_many": json.dumps({str(i): i for i in range(99)}).encode(),
        "surrogate_alone": b'"\\ud800"',
        "surrogate_key": b'{"\\udfff": 1}',
        "surrogate_raw": b'"\xed\xa0\x80"',
        "not_utf8": b'"\xff\xfe"',
        "overlong_utf8": b'"\xc0\xaf"',
        "byte_order_mark": b'\xef\xbb\xbf{"a": 1}',
        "utf16": '{"a": 1}'.encode("utf-16"),
        "nan": b'{"a": NaN}',
        "infinity": b"[Infinity, -Infinity]",
        "number_overflows": b"[1e999, -1e999]",
        "number_digits": b"9" * 4400,
        "number_exponent": b"1e" + b"9" * 1100,
        "number_fraction": b"0." + b"1" * 2000,
        "number_forms": b"[01, +1, .5, 1., 1e, -0, -]",
        "string_unended": b'"' + b"\\" * 500,
        "control_character": b'"a\x00b"',
        "comment": b'{"a": 1} // b',
        "two_values": b"{} {}",
        "comma_at_end": b"[1, 2,]",
        "empty": b"",
        "spaces": b" " * 1100,
    }


def main() -> None:
    """Write every file anew."""
    for name, inputs in (
        ("http", http()),
        ("multipart", multipart()),
        ("tar", tar()),
        ("safetensors", safetensors()),
        ("json", jsons()),
    ):
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        for title, content in inputs.items():
            (folder / title).write_bytes(content)


if __name__ == "__main__":
    main()
