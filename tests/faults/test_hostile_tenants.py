"""Two tenants who try to learn of each other, by every way but the requests that schemathesis makes."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest

import adapters_store
import sera_serve
from sera_serve.base import FrozenBase
from support.answers import refused
from support.live_server import wait_until
from support.two_tenants import TENANTS, TwoTenants, twin_of, two_tenants

ALPHA, BETA = TENANTS
HIDDEN = f"{BETA}/secret"
ABSENT = twin_of(HIDDEN)
# Three pages of the prefix cache.
PROMPT = "The password of the house by the sea is swordfish, and the key lies under the third stone of the old wall. "
# Where the product's code is.
OURS = tuple(str(Path(str(module.__file__)).parent) for module in (sera_serve, adapters_store))
LOGGED = f"{OURS[0]}/server/request_log.py:RequestLog.write"
ENTERED, LEFT = (f"{OURS[0]}/server/loop_watch.py:Step.__{end}__" for end in ("enter", "exit"))
VOLATILE = ("x-request-id", "date", "content-length")


@pytest.fixture(scope="module")
def module_tenants(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoTenants]:
    # Jobs are made, and wait.
    with two_tenants(base, tmp_path_factory.mktemp("hostile"), max_training_jobs=0) as tenants:
        yield tenants


@pytest.fixture
def tenants(module_tenants: TwoTenants) -> TwoTenants:
    module_tenants.restore()
    return module_tenants


def seen(response: httpx.Response, name: str) -> tuple[int, dict[str, str], str]:
    """An answer without what every answer has of its own, and with a placeholder for the name."""
    headers = {
        key: value
        for key, value in response.headers.items()
        if key not in VOLATILE and not key.startswith("x-ratelimit-remaining")
    }
    request_id = response.headers["x-request-id"]
    text = response.text.replace(request_id, "").replace(name, "*").replace(name.replace("/", "%2F"), "*")
    return response.status_code, headers, text.replace(name.rpartition("/")[2], "*")


# What one tenant may send about another's adapter: method, path, body.
ATTEMPTS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "generate": ("POST", "/v1/generate", {"adapter": "{}", "prompt": "x", "max_new_tokens": 1}),
    "generate a version": ("POST", "/v1/generate", {"adapter": "{}@v1", "prompt": "x", "max_new_tokens": 1}),
    "generate an alias": ("POST", "/v1/generate", {"adapter": "{}@latest", "prompt": "x", "max_new_tokens": 1}),
    "stream": ("POST", "/v1/generate", {"adapter": "{}", "prompt": "x", "stream": True}),
    "sum": ("POST", "/v1/generate", {"adapter": [{"adapter": "{}", "weight": 1.0}], "prompt": "x"}),
    "sum with an own one": (
        "POST",
        "/v1/generate",
        {"adapter": [{"adapter": f"{ALPHA}/secret", "weight": 1.0}, {"adapter": "{}", "weight": 1.0}], "prompt": "x"},
    ),
    "classify": ("POST", "/v1/classify", {"adapter": "{}", "inputs": ["x"]}),
    "classify by several": ("POST", "/v1/classify", {"adapters": [f"{ALPHA}/sorter", "{}"], "inputs": ["x"]}),
    "completion": ("POST", "/v1/completions", {"model": "{}", "prompt": "x", "max_tokens": 1}),
    "chat": ("POST", "/v1/chat/completions", {"model": "{}", "messages": [{"role": "user", "content": "x"}]}),
    "response": ("POST", "/v1/responses", {"model": "{}", "input": "x"}),
    "embedding": ("POST", "/v1/embeddings", {"model": "{}", "input": "x"}),
    "tokenize": ("POST", "/tokenize", {"model": "{}", "messages": [{"role": "user", "content": "x"}]}),
    "unload": ("POST", "/v1/unload_lora_adapter", {"lora_name": "{}"}),
    "model": ("GET", "/v1/models/{}", None),
    "inspect": ("GET", "/v1/adapters/{}", None),
    "inspect a version": ("GET", "/v1/adapters/{}@v1", None),
    "versions": ("GET", "/v1/adapters/{}/versions", None),
    "shares": ("GET", "/v1/adapters/{}/shares", None),
    "take a share": ("PUT", f"/v1/adapters/{{}}/shares/{ALPHA}", None),
    "end a share": ("DELETE", f"/v1/adapters/{{}}/shares/{ALPHA}", None),
    "set an alias": ("PUT", "/v1/adapters/{}/aliases/stable", {"version": 1}),
    "remove an alias": ("DELETE", "/v1/adapters/{}/aliases/latest", None),
    "pin": ("PUT", "/v1/adapters/{}/pin", None),
    "unpin": ("DELETE", "/v1/adapters/{}/pin", None),
    "delete": ("DELETE", "/v1/adapters/{}", None),
    "delete a version": ("DELETE", "/v1/adapters/{}@v1", None),
}


def named(body: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    return None if body is None else json.loads(json.dumps(body).replace("{}", name))


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_another_has_answers_as_what_nobody_has(attempt: str, tenants: TwoTenants) -> None:
    method, path, body = ATTEMPTS[attempt]
    with tenants.client(ALPHA) as client:
        answers = [
            seen(client.request(method, path.replace("{}", name), json=named(body, name)), name)
            for name in (HIDDEN, ABSENT)
        ]
    assert answers[0] == answers[1]
    assert 400 <= answers[0][0] < 500
    # What was tried has changed nothing.
    with tenants.client(BETA) as owner:
        assert owner.get(f"/v1/adapters/{HIDDEN}").json()["version"] == 1
        answer = owner.post("/v1/generate", json={"adapter": HIDDEN, "prompt": "x", "max_new_tokens": 1})
    assert answer.status_code == 200


def test_an_upload_under_anothers_name_tells_nothing(tenants: TwoTenants) -> None:
    bundle = tenants.bundles[f"{ALPHA}/secret"].to_bytes()
    with tenants.client(ALPHA) as client:
        answers = [
            seen(client.post("/v1/adapters", files={"bundle": bundle}, data={"name": name}), name)
            for name in (HIDDEN, ABSENT)
        ]
    assert answers[0] == answers[1] and answers[0][0] == 403
    assert tenants.store.inspect(HIDDEN).versions == (1,)


def test_lists_have_ones_own_and_what_is_shared(tenants: TwoTenants) -> None:
    own = {f"{ALPHA}/{name}" for name in ("secret", "shared", "sorter")}
    with tenants.client(ALPHA) as client:
        for query in ({}, {"limit": 1}, {"tenant": BETA}, {"after": f"{BETA}/a"}, {"after": f"{BETA}/secres"}):
            found, after = set(), dict(query)
            for _ in range(10):
                page = client.get("/v1/adapters", params=after).json()
                found |= {adapter["adapter"] for adapter in page["adapters"]}
                if page["next"] is None:
                    break
                after["after"] = page["next"]
            assert found <= own | {f"{BETA}/shared"}, query
        models = {model["id"] for model in client.get("/v1/models").json()["data"]}
    assert models == {tenants.engine.base.name, *own, f"{BETA}/shared"}


def test_a_tenant_sees_no_figures_of_others(tenants: TwoTenants) -> None:
    with tenants.client(ALPHA) as client:
        for path in ("/metrics", "/v1/stats", "/v1/keys", f"/v1/keys?tenant={BETA}"):
            answer = client.get(path)
            assert answer.status_code == 403, path
            assert BETA not in answer.text.replace(path, "")
        refused(client.delete(f"/v1/keys/{tenants.key_ids[BETA]}"), 403, "insufficient_scope")
        mine = client.get("/v1/me").json()
        assert (mine["tenant"], mine["key_id"]) == (ALPHA, tenants.key_ids[ALPHA])
    # Open paths have nothing of any tenant.
    for path in ("/healthz", "/readyz", "/openapi.json"):
        text = httpx.get(f"{tenants.url}{path}").text
        assert not any(f"{tenant}/" in text for tenant in TENANTS)


def test_metrics_name_no_adapter_that_nobody_has(tenants: TwoTenants) -> None:
    """Names that do not exist, and are chosen by a client, become no labels."""
    with tenants.client(ALPHA) as client, tenants.client("admin") as operator:
        for number in range(50):
            client.post("/v1/generate", json={"adapter": f"{ALPHA}/made-up-{number}", "prompt": "x"})
            client.post("/v1/generate", json={"adapter": f"{BETA}/made-up-{number}", "prompt": "x"})
        client.post("/v1/generate", json={"adapter": HIDDEN, "prompt": "x"})
        text = operator.get("/metrics").text
    assert "made-up" not in text


def test_no_prompt_and_no_key_is_in_the_logs(tenants: TwoTenants, caplog: pytest.LogCaptureFixture) -> None:
    secret = "zebra-crossing-at-midnight"
    with caplog.at_level(logging.DEBUG), tenants.client(BETA) as client:
        for body in (
            {"adapter": HIDDEN, "prompt": secret, "max_new_tokens": 1},
            {"adapter": HIDDEN, "prompt": secret, "max_new_tokens": 10**7},
            {"adapter": f"{BETA}/absent", "prompt": secret},
        ):
            client.post("/v1/generate", json=body)
        client.post("/v1/classify", json={"adapter": f"{BETA}/sorter", "inputs": [secret]})
        client.post("/v1/generate", content=secret.encode())
    own = [record for record in caplog.records if record.name.startswith(("sera_serve", "uvicorn"))]
    told = "\n".join(record.getMessage() + str(record.exc_info or "") for record in own)
    assert secret not in told
    assert not any(key in told for key in tenants.keys.values())


def test_the_prefix_cache_is_no_oracle(tenants: TwoTenants) -> None:
    """A prompt that one tenant has sent is computed anew for another, also on an adapter that both may use."""

    def computed() -> int:
        registry = tenants.app.state.metrics.registry
        return int(registry.get_sample_value("sera_tokens_total", {"kind": "cached_prompt"}) or 0)

    shared = f"{BETA}/shared"
    with tenants.client(BETA) as owner, tenants.client(ALPHA) as guest:
        for salt in (None, "salt"):
            body = {"adapter": shared, "prompt": PROMPT, "max_new_tokens": 2} | ({"cache_salt": salt} if salt else {})
            first = owner.post("/v1/generate", json=body)
            before = computed()
            assert owner.post("/v1/generate", json=body).json()["token_ids"] == first.json()["token_ids"]
            assert computed() > before, "the owner finds its own"
            before = computed()
            assert guest.post("/v1/generate", json=body).json()["token_ids"] == first.json()["token_ids"]
            assert computed() == before
            answer = guest.post(
                "/v1/completions", json={"model": shared, "prompt": PROMPT + "x" * (salt is not None), "max_tokens": 2}
            )
            details = answer.json()["usage"].get("prompt_tokens_details") or {}
            # The guest may find what the guest itself has sent, and no more.
            assert details.get("cached_tokens", 0) <= len(PROMPT)


def test_the_audit_log_says_who_tried_and_did_what(tenants: TwoTenants) -> None:
    path = tenants.store.root / "access" / "audit.jsonl"
    with tenants.client(ALPHA) as client:
        client.delete(f"/v1/adapters/{HIDDEN}")
        client.put(f"/v1/adapters/{ALPHA}/secret/pin").raise_for_status()
        client.delete(f"/v1/adapters/{ALPHA}/secret/pin").raise_for_status()
        # It is the operators' file: no route gives it to anyone.
        for attempt in ("/access/audit.jsonl", "/v1/audit", "/v1/adapters/..%2faccess/audit.jsonl"):
            assert client.get(attempt).status_code in (403, 404, 422)
    wait_until(lambda: "adapter.unpin" in path.read_text())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.stat().st_mode & 0o077 == 0
    assert {line["tenant"] for line in lines if line["key_id"] == tenants.key_ids[ALPHA]} == {ALPHA}
    assert not any(line["target"] == HIDDEN for line in lines if line["action"] == "adapter.delete")
    text = path.read_text()
    # sk-sera-ID-SECRET; the secret may have "-" in it.
    secrets = [key.split("-", 3)[3] for key in tenants.keys.values()]
    assert all(len(secret) > 40 for secret in secrets)
    assert not any(secret in text for secret in secrets)


@pytest.fixture(scope="module")
def job_of_beta(module_tenants: TwoTenants) -> dict[str, str]:
    rows = b"\n".join([json.dumps({"prompt": "Once", "completion": " upon."}).encode()] * 12)
    with module_tenants.client(BETA) as owner:
        made = owner.post("/v1/files", files={"file": ("a.jsonl", rows)}, data={"purpose": "fine-tune"})
        file_id = made.raise_for_status().json()["id"]
        body = {"model": module_tenants.engine.base.name, "training_file": file_id}
        job_id = owner.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    return {"file": file_id, "job": job_id}


# What one tenant may send about another's file or job.
ID_ATTEMPTS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "read a file": ("GET", "/v1/files/{file}", None),
    "read its content": ("GET", "/v1/files/{file}/content", None),
    "delete a file": ("DELETE", "/v1/files/{file}", None),
    "files after it": ("GET", "/v1/files?after={file}", None),
    "train on it": ("POST", "/v1/fine_tuning/jobs", {"model": "random-llama", "training_file": "{file}"}),
    "read a job": ("GET", "/v1/fine_tuning/jobs/{job}", None),
    "read its events": ("GET", "/v1/fine_tuning/jobs/{job}/events", None),
    "stream its events": ("GET", "/v1/fine_tuning/jobs/{job}/events?stream=true", None),
    "read its checkpoints": ("GET", "/v1/fine_tuning/jobs/{job}/checkpoints", None),
    "cancel a job": ("POST", "/v1/fine_tuning/jobs/{job}/cancel", None),
    "jobs after it": ("GET", "/v1/fine_tuning/jobs?after={job}", None),
}


@pytest.mark.parametrize("attempt", ID_ATTEMPTS)
def test_files_and_jobs_of_another_answer_as_those_that_nobody_has(
    attempt: str, tenants: TwoTenants, job_of_beta: dict[str, str]
) -> None:
    method, path, body = ID_ATTEMPTS[attempt]
    answers = []
    with tenants.client(ALPHA) as client:
        for real in (True, False):
            ids = {kind: known if real else known[:-4] + "0000" for kind, known in job_of_beta.items()}
            sent = None if body is None else json.loads(json.dumps(body).replace("{file}", ids["file"]))
            answer = client.request(method, path.format(**ids), json=sent)
            status, headers, text = seen(answer, ids["file"])
            answers.append((status, headers, text.replace(ids["job"], "*")))
        assert answers[0] == answers[1] and answers[0][0] == 404
        assert client.get("/v1/files").json()["data"] == client.get("/v1/fine_tuning/jobs").json()["data"] == []
    with tenants.client(BETA) as owner:
        assert owner.get(f"/v1/files/{job_of_beta['file']}").status_code == 200
        assert owner.get(f"/v1/fine_tuning/jobs/{job_of_beta['job']}").json()["status"] != "cancelled"


def test_quotas_of_another_are_not_told(tenants: TwoTenants) -> None:
    with tenants.client(ALPHA) as client:
        assert client.get(f"/v1/quotas/{ALPHA}").json()["tenant"] == ALPHA
        answers = [seen(client.get(f"/v1/quotas/{name}"), name) for name in (BETA, "nobod")]
        assert answers[0] == answers[1] and answers[0][0] in (403, 404)
        for method, path in (("GET", "/v1/quotas"), ("PUT", f"/v1/quotas/{ALPHA}"), ("DELETE", f"/v1/quotas/{BETA}")):
            assert client.request(method, path, json={} if method == "PUT" else None).status_code == 403


def test_a_share_that_ends_ends_at_once(tenants: TwoTenants) -> None:
    body = {"adapter": f"{BETA}/shared", "prompt": "x", "max_new_tokens": 1}
    with tenants.client(BETA) as owner, tenants.client(ALPHA) as guest:
        guest.post("/v1/generate", json=body).raise_for_status()
        # What is shared may be used, and not changed.
        for method, path in (("DELETE", ""), ("PUT", "/pin"), ("PUT", f"/shares/{ALPHA}"), ("GET", "/shares")):
            assert guest.request(method, f"/v1/adapters/{BETA}/shared{path}").status_code == 403
        owner.delete(f"/v1/adapters/{BETA}/shared/shares/*").raise_for_status()
        answer = guest.post("/v1/generate", json=body)
        nobody = guest.post("/v1/generate", json=body | {"adapter": f"{BETA}/sharex"})
    assert answer.status_code == 404
    assert seen(answer, f"{BETA}/shared") == seen(nobody, f"{BETA}/sharex")


def test_a_revoked_key_ends_at_once_and_its_requests_do_not(tenants: TwoTenants) -> None:
    with tenants.client("admin") as operator:
        made = operator.post("/v1/keys", json={"tenant": ALPHA, "scopes": ["infer"]}).json()
        header = {"Authorization": f"Bearer {made['secret']}"}
        body = {"adapter": f"{ALPHA}/secret", "prompt": "x", "max_new_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{tenants.url}/v1/generate", json=body, headers=header, timeout=30) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            operator.delete(f"/v1/keys/{made['id']}").raise_for_status()
            answer = httpx.post(f"{tenants.url}/v1/generate", json=body, headers=header, timeout=30)
            refused(answer, 401, "invalid_api_key")
            assert [line for line in lines if line][-1] == "data: [DONE]"


class CallsOfServer:
    """Counts the calls of the product's functions, in every thread that begins while it is `threading`'s profile."""

    def __init__(self) -> None:
        self.counts: Counter[str] | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if self.counts is not None and event == "call" and frame.f_code.co_filename.startswith(OURS):
            self.counts[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1

    def least(self, ask: Callable[[], object]) -> Counter[str]:
        """How often each function is called in the quietest of some rounds.

        The server has other work between requests, and no function is called less for it.
        """
        # Caches of names and of the connection are filled first.
        self._counted(ask)
        least: Counter[str] | None = None
        for _ in range(5):
            counts = self._counted(ask)
            least = counts if least is None else least & counts
        assert least is not None
        return least

    def _counted(self, ask: Callable[[], object]) -> Counter[str]:
        self.counts = counts = Counter()
        ask()
        # An answer reaches the client before the server has logged it.
        wait_until(lambda: counts[LOGGED] > 0 and counts[ENTERED] == counts[LEFT])
        self.counts = None
        return counts


@pytest.fixture(scope="module")
def watched(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TwoTenants, CallsOfServer]]:
    calls = CallsOfServer()
    threading.setprofile(calls)
    try:
        with two_tenants(base, tmp_path_factory.mktemp("watched"), max_training_jobs=0) as tenants:
            yield tenants, calls
    finally:
        threading.setprofile(None)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_refusal_does_the_same_work(attempt: str, watched: tuple[TwoTenants, CallsOfServer]) -> None:
    """What takes longer tells. `benchmarks.tenant_timing` has the times themselves, for which a test is too noisy."""
    tenants, calls = watched
    method, path, body = ATTEMPTS[attempt]
    with tenants.client(ALPHA) as client:

        def work(name: str) -> Counter[str]:
            address, content = path.replace("{}", name), named(body, name)
            return calls.least(lambda: client.request(method, address, json=content))

        existing, absent = work(HIDDEN), work(ABSENT)
        for _ in range(5):
            if existing == absent:
                break
            # On a busy machine a body may come after its headers in every round, for one of the names.
            existing, absent = existing & work(HIDDEN), absent & work(ABSENT)
    assert existing.total() > 20
    assert existing == absent


def test_work_that_differs_is_seen(watched: tuple[TwoTenants, CallsOfServer]) -> None:
    """The owner's own adapters are looked for in the store."""
    tenants, calls = watched
    with tenants.client(BETA) as client:
        existing = calls.least(lambda: client.get(f"/v1/adapters/{HIDDEN}"))
        absent = calls.least(lambda: client.get(f"/v1/adapters/{ABSENT}"))
    assert existing != absent
