"""POST /v1/generate over a stub engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from sera_serve.engine import GenerateParams
from support.answers import events, refused
from support.live_server import wait_until
from support.stub_engine import (
    CRASHES,
    CRASHES_LATER,
    FAILS_LATER,
    FLOODING,
    LATE,
    LATE_LATER,
    OTHERS_SHED,
    OVERLOADED,
    SECRET,
    TEXTS,
    TOO_LONG,
    StubEngine,
)

ANSWER = {
    "id": "gen-1",
    "adapter": "demo/writer",
    "version": 3,
    "text": "".join(TEXTS),
    "token_ids": [0, 1, 2],
    "finish_reason": "stop",
    "usage": {"prompt_tokens": 5, "completion_tokens": 3},
}


def generate(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/generate", json=body)


def test_a_response_has_exactly_the_documented_fields(client: httpx.Client) -> None:
    response = generate(client, adapter="demo/writer", prompt="hello")
    assert response.status_code == 200
    assert response.json() == ANSWER


def test_every_field_reaches_the_engine(client: httpx.Client, engine: StubEngine) -> None:
    fields = {
        "adapter": "demo/writer@v2",
        "token_ids": [5, 0, 7],
        "max_new_tokens": 9,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 11,
        "stop": ["\n", "END"],
        "priority": "high",
        "timeout_s": 30,
        "cache_salt": "s" * 64,
        "min_p": 0.25,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.5,
        "stop_token_ids": [4, 9],
        "ignore_eos": True,
        "min_tokens": 3,
        "n": 2,
        "logprobs": 0,
        "prompt_logprobs": 20,
    }
    assert generate(client, **fields, logit_bias={"7": -100, "0": 2.5}).status_code == 200
    assert engine.asked[0] == GenerateParams(**fields, logit_bias={7: -100.0, 0: 2.5})  # type: ignore[arg-type]
    engine.begin_record()
    assert generate(client, prompt="hello", max_new_tokens=None).status_code == 200
    assert engine.asked == [GenerateParams(prompt="hello", max_new_tokens=None)]


def test_defaults_are_greedy_and_the_base_model(client: httpx.Client, engine: StubEngine) -> None:
    response = generate(client, prompt="hello")
    assert (response.json()["adapter"], response.json()["version"]) == (None, None)
    assert generate(client, prompt="hello", adapter=None).status_code == 200
    assert engine.asked == [GenerateParams(prompt="hello")] * 2


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "prompt"),
        ({"prompt": "a", "token_ids": [1]}, "invalid_value", "token_ids"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": ["a"]}, "invalid_value", "prompt"),
        ({"token_ids": []}, "invalid_value", "token_ids"),
        ({"token_ids": [1, -1]}, "invalid_value", "token_ids[1]"),
        ({"token_ids": [1, True]}, "invalid_value", "token_ids[1]"),
        ({"token_ids": [1, "2"]}, "invalid_value", "token_ids[1]"),
        ({"token_ids": [1, 2.0]}, "invalid_value", "token_ids[1]"),
        ({"token_ids": [2**31]}, "invalid_value", "token_ids[0]"),
        ({"prompt": "a", "adapter": 3}, "invalid_value", "adapter"),
        ({"prompt": "a", "adapter": ""}, "invalid_value", "adapter"),
        ({"prompt": "a", "adapter": "x" * 10_000}, "invalid_value", "adapter"),
        ({"prompt": "a", "max_new_tokens": 0}, "invalid_value", "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": 2**40}, "invalid_value", "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": "5"}, "invalid_value", "max_new_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "invalid_value", "temperature"),
        ({"prompt": "a", "temperature": 2.1}, "invalid_value", "temperature"),
        ({"prompt": "a", "temperature": True}, "invalid_value", "temperature"),
        ({"prompt": "a", "top_p": 0}, "invalid_value", "top_p"),
        ({"prompt": "a", "top_p": 1.5}, "invalid_value", "top_p"),
        ({"prompt": "a", "top_k": -1}, "invalid_value", "top_k"),
        ({"prompt": "a", "top_k": 2**31}, "invalid_value", "top_k"),
        ({"prompt": "a", "seed": -1}, "invalid_value", "seed"),
        ({"prompt": "a", "seed": 2**31}, "invalid_value", "seed"),
        ({"prompt": "a", "stop": "x"}, "invalid_value", "stop"),
        ({"prompt": "a", "stop": ["ok", ""]}, "invalid_value", "stop[1]"),
        ({"prompt": "a", "stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"prompt": "a", "priority": "urgent"}, "invalid_value", "priority"),
        ({"prompt": "a", "priority": 1}, "invalid_value", "priority"),
        ({"prompt": "a", "timeout_s": 0}, "invalid_value", "timeout_s"),
        ({"prompt": "a", "timeout_s": 86401}, "invalid_value", "timeout_s"),
        ({"prompt": "a", "timeout_s": "5"}, "invalid_value", "timeout_s"),
        ({"prompt": "a", "cache_salt": ""}, "invalid_value", "cache_salt"),
        ({"prompt": "a", "cache_salt": "s" * 65}, "invalid_value", "cache_salt"),
        ({"prompt": "a", "cache_salt": 7}, "invalid_value", "cache_salt"),
        ({"prompt": "a", "stream": "yes"}, "invalid_value", "stream"),
        ({"prompt": "a", "best_of": 5}, "unknown_field", "best_of"),
        ({"prompt": "a", "temprature": 1}, "unknown_field", "temprature"),
        ({"prompt": "a", "{brace}" * 9999: 1}, "unknown_field", ("{brace}" * 10)[:64]),
    ],
)
def test_a_wrong_field_is_named(
    client: httpx.Client, engine: StubEngine, body: dict[str, Any], code: str, param: str
) -> None:
    error = refused(generate(client, **body), 422, code)
    assert error["param"] == param
    assert param.partition("[")[0][:20] in error["message"]
    assert engine.asked == []


def test_an_unknown_field_with_a_similar_name_gets_a_hint(client: httpx.Client) -> None:
    error = refused(generate(client, prompt="a", temprature=1), 422, "unknown_field")
    assert "did you mean 'temperature'?" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": -Infinity}', 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', 400, "invalid_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', 422, "invalid_value"),
        (b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}", 422, "invalid_value"),
        (b"[]", 422, "invalid_value"),
        (b'"text"', 422, "invalid_value"),
        (b"null", 422, "invalid_value"),
        (b"", 422, "missing_field"),
    ],
)
def test_a_body_other_than_a_json_object_is_refused(client: httpx.Client, body: bytes, status: int, code: str) -> None:
    response = client.post("/v1/generate", content=body, headers={"Content-Type": "application/json"})
    refused(response, status, code)


def test_what_is_not_json_is_told_with_its_place(client: httpx.Client) -> None:
    for body, place in (
        (b'{"prompt": "a" "b"}', "at line 1, column 16"),
        ('{\n  "prompt": "世界" "a"}'.encode(), "at line 2, column 18"),
    ):
        response = client.post("/v1/generate", content=body, headers={"Content-Type": "application/json"})
        assert place in refused(response, 400, "invalid_json")["message"]
    # Its place is not known.
    response = client.post("/v1/generate", content=b'{"a": NaN}', headers={"Content-Type": "application/json"})
    assert "line" not in refused(response, 400, "invalid_json")["message"]


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "application/json; charset=latin-1",
        "application/json; charset=utf-8; charset=utf-16",
        "application/json; version=2",
        "application/json, text/plain",
        "application/json;" + '";' * 10_000,
    ],
    ids=lambda kind: str(kind)[:40],
)
def test_another_content_type_is_refused(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = client.post("/v1/generate", content=b'{"prompt": "a"}', headers=headers)
    refused(response, 415, "unsupported_media_type")


def test_a_charset_in_the_content_type_is_accepted(client: httpx.Client) -> None:
    for kind in ("Application/JSON; charset=utf-8", 'application/json;charset="UTF-8"', "application/json;"):
        headers = {"Content-Type": kind}
        assert client.post("/v1/generate", content='{"prompt": "☠"}'.encode(), headers=headers).status_code == 200


def test_query_parameters_are_refused(client: httpx.Client) -> None:
    error = refused(client.post("/v1/generate?stream=true", json={"prompt": "a"}), 422, "invalid_request")
    assert error["param"] == "stream"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        (TOO_LONG, 422, "context_length_exceeded"),
        (OVERLOADED, 503, "overloaded"),
        (FLOODING, 429, "tenant_overloaded"),
        (LATE, 504, "deadline_exceeded"),
        (CRASHES, 500, "internal_error"),
    ],
)
def test_a_refused_stream_has_the_status_of_the_refusal(
    client: httpx.Client, prompt: str, status: int, code: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    error = refused(generate(client, prompt=prompt, stream=stream), status, code)
    assert SECRET not in error["message"]
    if status == 500:
        assert SECRET in caplog.text, "the log must have the traceback"


@pytest.mark.parametrize(("prompt", "seconds"), [(OVERLOADED, "7"), (FLOODING, "9")])
def test_an_overload_has_a_retry_after_header(client: httpx.Client, prompt: str, seconds: str) -> None:
    assert generate(client, prompt=prompt).headers["retry-after"] == seconds


def test_an_unexpected_error_is_in_the_log_under_its_request_id(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    response = generate(client, prompt=CRASHES_LATER)
    error = refused(response, 500, "internal_error")
    request_id = response.headers["x-request-id"]
    assert request_id in error["message"]
    assert request_id in caplog.text
    assert SECRET in caplog.text


def test_a_stream_gives_deltas_then_the_usage_then_done(client: httpx.Client) -> None:
    response = generate(client, adapter="demo/writer", prompt="hello", stream=True)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in response.headers
    *deltas, last, done = events(response.text)
    identity = {"id": "gen-1", "adapter": "demo/writer", "version": 3}
    assert deltas == [
        identity | {"text": text, "token_ids": [index], "finish_reason": None} for index, text in enumerate(TEXTS)
    ]
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    assert last == identity | {"text": "", "token_ids": [], "finish_reason": "stop", "usage": usage}
    assert done == "[DONE]"


def test_an_error_in_mid_stream_is_the_last_event(client: httpx.Client) -> None:
    *_, delta, error = events(generate(client, prompt=FAILS_LATER, stream=True).text)
    assert delta["text"] == TEXTS[0]
    assert error["error"]["code"] == "engine_unavailable"


def test_a_deadline_in_mid_stream_has_its_code(client: httpx.Client) -> None:
    error = events(generate(client, prompt=LATE_LATER, stream=True).text)[-1]["error"]
    assert (error["code"], error["param"]) == ("deadline_exceeded", "timeout_s")
    refused(generate(client, prompt=LATE_LATER), 504, "deadline_exceeded")


def test_an_answer_that_is_refused_while_others_run_is_the_last_event(client: httpx.Client) -> None:
    first, *_, error = events(generate(client, prompt=OTHERS_SHED, n=3, stream=True).text)
    assert (first["index"], first["text"]) == (0, TEXTS[0])
    assert (error["error"]["code"], error["error"]["param"]) == ("tenant_overloaded", "adapter")
    whole = generate(client, prompt=OTHERS_SHED, n=3)
    refused(whole, 429, "tenant_overloaded")
    assert whole.headers["retry-after"] == "9"


def test_a_crash_in_mid_stream_leaks_nothing(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    response = generate(client, prompt=CRASHES_LATER, stream=True)
    error = events(response.text)[-1]["error"]
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert SECRET not in response.text
    assert SECRET in caplog.text


LOGPROBS = [
    {
        "token_id": token,
        "logprob": -0.5,
        "top": [{"token_id": 7, "logprob": -0.25}, {"token_id": token, "logprob": -0.5}],
    }
    for token in range(3)
]


def test_log_probabilities_and_the_reason_are_there_where_they_were_asked_for(client: httpx.Client) -> None:
    options = {"logprobs": 2, "prompt_logprobs": 0, "stop_token_ids": [2]}
    assert generate(client, adapter="demo/writer", prompt="hello", **options).json() == ANSWER | {
        "logprobs": LOGPROBS,
        "prompt_logprobs": [
            {"token_id": 9, "logprob": None, "top": []},
            {"token_id": 8, "logprob": -1.5, "top": []},
        ],
        "stop_reason": 2,
    }


def test_several_answers(client: httpx.Client, engine: StubEngine) -> None:
    one = {name: ANSWER[name] for name in ("text", "token_ids", "finish_reason")}
    assert generate(client, adapter="demo/writer", prompt="hello", n=3, logprobs=2).json() == {
        "id": "gen-1",
        "adapter": "demo/writer",
        "version": 3,
        "choices": [{"index": index, **one, "logprobs": LOGPROBS} for index in range(3)],
        "usage": {"prompt_tokens": 5, "completion_tokens": 9},
    }
    wait_until(lambda: engine.open_streams == 0)


def test_a_stream_of_several_answers_names_each(client: httpx.Client, engine: StubEngine) -> None:
    options = {"n": 3, "stream": True, "logprobs": 2, "stop_token_ids": [2]}
    *found, done = events(generate(client, prompt="hello", **options).text)
    assert done == "[DONE]"
    for index in range(3):
        own = [event for event in found if event["index"] == index]
        assert "".join(event["text"] for event in own) == "".join(TEXTS)
        assert [one for event in own[:-1] for one in event["logprobs"]] == LOGPROBS
        assert own[-1]["finish_reason"] == "stop" and own[-1]["stop_reason"] == 2
        assert own[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 3}
    assert len(found) == 12
    wait_until(lambda: engine.open_streams == 0)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"01": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
def test_what_adjusts_the_tokens_is_checked(
    options: dict[str, Any], param: str, client: httpx.Client, engine: StubEngine
) -> None:
    error = refused(generate(client, prompt="hello", **options), 422, "invalid_value")
    assert error["param"] == param
    assert engine.asked == []
