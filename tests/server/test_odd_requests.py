"""Every route, asked in every odd way: each answer has one shape, one id, and a status that the documents have."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from support.answers import check_declared, openapi_document, refused
from support.raw_http import RawClient

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
VALUES = {
    **{"tenant": "absent", "name": "one@v9", "model": "absent/one@v9"},
    **{"file_id": "file-0", "job_id": "ftjob-0"},
    **{"alias": "stable", "with": "other", "id": "none"},
}
PATHS = [
    *(re.sub(r"{(\w+)}", lambda match: VALUES[match[1]], path) for path in openapi_document()["paths"]),
    "/openapi.json",
    "/nothing",
]
ALLOWED = {
    "/v1/generate": "OPTIONS, POST",
    "/v1/classify": "OPTIONS, POST",
    "/v1/adapters": "GET, HEAD, OPTIONS, POST",
    "/v1/adapters/absent/one@v9": "DELETE, GET, HEAD, OPTIONS",
    "/v1/adapters/absent/one@v9/pin": "DELETE, OPTIONS, PUT",
    "/v1/adapters/absent/one@v9/aliases/stable": "DELETE, OPTIONS, PUT",
    "/v1/adapters/absent/one@v9/shares/other": "DELETE, OPTIONS, PUT",
    "/v1/keys": "GET, HEAD, OPTIONS, POST",
    "/v1/keys/none": "DELETE, OPTIONS",
    "/v1/quotas": "GET, HEAD, OPTIONS",
    "/v1/quotas/absent": "DELETE, GET, HEAD, OPTIONS, PUT",
    **dict.fromkeys(["/v1/adapters/absent/one@v9/versions", "/v1/adapters/absent/one@v9/shares"], "GET, HEAD, OPTIONS"),
    "/v1/me": "GET, HEAD, OPTIONS",
    **dict.fromkeys(["/v1/files", "/v1/fine_tuning/jobs"], "GET, HEAD, OPTIONS, POST"),
    "/v1/files/file-0": "DELETE, GET, HEAD, OPTIONS",
    "/v1/files/file-0/content": "GET, HEAD, OPTIONS",
    "/v1/fine_tuning/jobs/ftjob-0": "GET, HEAD, OPTIONS",
    "/v1/fine_tuning/jobs/ftjob-0/cancel": "OPTIONS, POST",
    "/v1/fine_tuning/jobs/ftjob-0/events": "GET, HEAD, OPTIONS",
    "/v1/fine_tuning/jobs/ftjob-0/checkpoints": "GET, HEAD, OPTIONS",
    **dict.fromkeys(["/v1/completions", "/v1/chat/completions", "/v1/responses"], "OPTIONS, POST"),
    **dict.fromkeys(["/v1/embeddings", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"], "OPTIONS, POST"),
    **dict.fromkeys(["/tokenize", "/detokenize"], "OPTIONS, POST"),
    "/v1/models": "GET, HEAD, OPTIONS",
    "/v1/models/absent/one@v9": "DELETE, GET, HEAD, OPTIONS",
    **dict.fromkeys(["/healthz", "/readyz", "/metrics", "/v1/stats", "/openapi.json"], "GET, HEAD, OPTIONS"),
}
# Paths with a parameter, which the document has in another form.
OPENAI = ("/v1/models/", "/v1/files/", "/v1/fine_tuning/jobs/")
WAYS: list[tuple[str, bytes, dict[str, str]]] = [
    ("", b"", {}),
    ("?x=1", b"", {}),
    ("?limit=1&limit=2", b"", {}),
    ("?&", b"", {}),
    ("?" + "&".join(f"p{i}=1" for i in range(500)), b"", {}),
    ("?%ff=%00", b"", {}),
    ("", b"{}", {"Content-Type": "application/json"}),
    ("", b"[[[", {"Content-Type": "application/json; charset=utf-7"}),
    ("", b"\x1f\x8b", {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
    ("", b"--b--", {"Content-Type": "multipart/form-data; boundary=b"}),
    ("", b"x", {"Content-Type": "text/plain", "Accept": "image/png", "Range": "bytes=0-1", "If-Match": '"a"'}),
    ("", b"", {"Host": "evil.example"}),
    ("", b"", {"Origin": "https://evil.example"}),
    ("", b"", {"Sec-Fetch-Site": "cross-site"}),
]


def check(response: httpx.Response) -> None:
    """Check what every answer has in common."""
    assert response.headers["x-request-id"].startswith("req-")
    assert response.status_code < 500 or response.request.url.path == "/readyz"
    check_declared(response)
    if response.request.method == "HEAD" or response.status_code == 204:
        assert response.content == b""
    elif response.status_code >= 400:
        refused(response, response.status_code, json.loads(response.content)["error"]["code"])


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_has_the_shape_and_a_declared_status(client: httpx.Client, path: str) -> None:
    statuses = set()
    for method in METHODS:
        for query, body, headers in WAYS:
            response = client.request(method, path + query, content=body, headers=headers)
            check(response)
            statuses.add(response.status_code)
            if response.status_code in (204, 405):
                assert response.headers["allow"] == ALLOWED[path]
    # OpenAI's clients know no 422.
    tags = {tag for way in openapi_document()["paths"].get(path, {}).values() for tag in way.get("tags", ())}
    wrong = 400 if "openai" in tags or path.startswith(OPENAI) else 422
    assert statuses >= ({403, 404} if path == "/nothing" else {204, 403, 405, wrong})


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/v1/adapters", "/v1/adapters/demo/writer", "/openapi.json"])
def test_head_is_get_without_a_body(client: httpx.Client, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert set(head.headers) == set(got.headers)
    # The metrics count the requests between the two.
    assert path == "/metrics" or head.headers["content-length"] == got.headers["content-length"]


def test_requests_by_head_have_their_route_and_method_in_the_metrics(client: httpx.Client) -> None:
    client.head("/v1/adapters/demo/writer")
    client.options("/v1/adapters/demo/writer")
    text = client.get("/metrics").text
    for method, status in (("HEAD", 200), ("OPTIONS", 204)):
        labels = f'{{method="{method}",route="/v1/adapters/{{tenant}}/{{name}}",status="{status}"}}'
        assert f"sera_http_requests_total{labels}" in text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/adapters/demo/writer"])
def test_a_query_that_a_route_does_not_read_is_refused(client: httpx.Client, path: str) -> None:
    assert refused(client.get(path, params={"verbose": 1}), 422, "invalid_request")["param"] == "verbose"
    refused(client.get(path + "?&"), 422, "invalid_request")


def test_a_repeated_query_parameter_is_refused(client: httpx.Client) -> None:
    error = refused(client.get("/v1/adapters?limit=1&after=a/b&limit=2"), 422, "invalid_request")
    assert error["param"] == "limit" and "twice" in error["message"]
    many = "&".join(f"p{number}=1" for number in range(1000))
    assert "1000 parameters" in refused(client.get(f"/v1/adapters?{many}"), 422, "invalid_request")["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/healthz"),
        ("GET", "/v1/adapters"),
        ("HEAD", "/metrics"),
        ("DELETE", "/v1/adapters/demo/writer"),
        ("PUT", "/v1/adapters/demo/writer/pin"),
        ("OPTIONS", "/v1/generate"),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_nobody_reads_is_refused(client: httpx.Client, method: str, path: str, chunked: bool) -> None:
    content = iter([b"{}"]) if chunked else b"{}"
    response = client.request(method, path, content=content)
    assert response.status_code == 400
    if method != "HEAD":
        refused(response, 400, "unexpected_body")
    assert client.get("/v1/adapters/demo/writer").status_code == 200


def test_a_length_of_zero_is_no_body(client: httpx.Client) -> None:
    assert client.put("/v1/adapters/demo/writer/pin", headers={"Content-Length": "0"}).status_code == 200
    assert client.delete("/v1/adapters/demo/writer/pin").status_code == 200


def test_an_encoded_body_and_a_second_content_type_are_refused(client: httpx.Client) -> None:
    headers = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
    error = refused(client.post("/v1/generate", content=b"{}", headers=headers), 415, "unsupported_media_type")
    assert error["param"] == "Content-Encoding"
    headers = [("Content-Type", "application/json"), ("Content-Type", "text/plain")]
    error = refused(client.post("/v1/generate", content=b"{}", headers=headers), 415, "unsupported_media_type")
    assert "twice" in error["message"]
    headers = [("Content-Type", "application/json"), ("Content-Encoding", "identity")]
    assert client.post("/v1/generate", content=b'{"prompt": "a"}', headers=headers).status_code == 200


def test_no_other_path_is_served() -> None:
    # The paths above are all there are.
    assert set(ALLOWED) == set(PATHS) - {"/nothing"}
    assert not [path for path in PATHS if re.search("[{}]", path)]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/models", "/v1/models"),
        ("/openai/v1/embeddings", "/v1/embeddings"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1//files/", "/v1/files"),
        ("/adapters/demo/writer", "/v1/adapters/demo/writer"),
        ("/docs/", "/docs"),
        ("/health", "/healthz"),
        ("/", None),
        ("/v1", None),
        ("/v1/moderations", None),
        ("/v1/v1", None),
        ("/adapters/demo/" + "w" * 400, None),
    ],
)
def test_an_unknown_path_is_told_what_it_may_have_meant(url: str, path: str, meant: str | None) -> None:
    """OpenAI's client shows the message alone; a base URL without /v1, or with a slash too many, is a first mistake."""
    for method in ("GET", "POST"):
        with RawClient(url) as client:
            client.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
            answer = client.response()
        assert answer.status == 404
        hint = "GET /docs lists the paths" if meant is None else f"did you mean {meant}?"
        assert json.loads(answer.body)["error"]["message"] == f"no such path; {hint}"


def test_a_refused_method_is_told_those_that_are_allowed(client: httpx.Client) -> None:
    error = refused(client.get("/v1/completions"), 405, "method_not_allowed")
    assert error["message"] == "GET is not allowed here; allowed are OPTIONS, POST"
