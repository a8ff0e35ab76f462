"""Error messages about values of any size and shape are short, and cost little."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve.server.errors import _readable, error_content
from sera_serve.server.native.schemas import GenerateRequest


class Unprintable(str):
    """Text that must not be looked at as a whole."""

    def __repr__(self) -> str:
        raise AssertionError("the whole value was looked at")

    def encode(self, *_: object) -> bytes:
        raise AssertionError("the whole value was looked at")


UNPRINTABLE = Unprintable("x" * 10_000)


@pytest.mark.parametrize("value", [UNPRINTABLE, [UNPRINTABLE] * 3, {UNPRINTABLE: UNPRINTABLE}])
def test_a_message_shows_the_start_of_a_value(value: Any) -> None:
    error = {"type": "int_type", "loc": ("body", "top_k"), "msg": "Input should be a valid integer", "input": value}
    message, param = _readable(error)
    assert param == "top_k"
    assert message.startswith("top_k is ") and message.endswith(": it should be a valid integer")
    assert len(message) < 150
    assert error_content(422, UNPRINTABLE, "code", UNPRINTABLE)["error"]["param"].endswith("...")


@pytest.mark.parametrize("key", [UNPRINTABLE, Unprintable("max_new_tokens" * 1000)])
def test_an_unknown_field_is_named_by_its_start(key: str) -> None:
    with pytest.raises(ValueError, match="not a field of this request") as caught:
        GenerateRequest.model_validate({key: 1} | {f"field{number}": 1 for number in range(1000)})
    assert caught.value.error_count() == 1  # type: ignore[attr-defined]
    assert len(str(caught.value)) < 1000


def test_a_training_record_with_numbers_beyond_floats_is_shown(
    client: httpx.Client, store: AdapterStore, writer: AdapterBundle
) -> None:
    large = 10**400
    training: dict[str, Any] = {
        "metrics": {"accuracy": large, "loss": -large, "f1": 0.5, "top": 2**1023},
        "description": large,
        "rows": {"train": large},
        "epochs": large,
        "chosen_epoch": large,
        "chosen_step": large,
        "evaluations": [{"epoch": large, "loss": large}],
        "settings": {"rank": large},
        "learning_rate": large,
    }
    store.publish(AdapterBundle(writer.config.model_copy(update={"training": training}), writer.tensors), "large/one")
    answer = client.get("/v1/adapters/large/one/versions")
    assert answer.status_code == 200
    assert answer.json()["versions"][0]["metrics"] == {"f1": 0.5, "top": 2.0**1023}
    for path in ("/v1/adapters/large/one", "/v1/adapters", "/v1/models", "/v1/models/large/one"):
        assert client.get(path).status_code == 200, path
