"""LiteLLM and LangChain talk to the server as they talk to OpenAI."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.server import build_app
from support.factories import random_decoder
from support.live_server import live_server
from support.stub_engine import FLOODING, TEXTS, StubEngine

pytestmark = pytest.mark.slow

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
TEXT = "".join(TEXTS)


@pytest.fixture(scope="session")
def base() -> FrozenBase:
    base = random_decoder()
    base.tokenizer.chat_template = (
        "{{ tools|length if tools else '' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    return base


@pytest.fixture(scope="module")
def address(base: FrozenBase, store: AdapterStore) -> Iterator[str]:
    with live_server(build_app(StubEngine(base), store, ServeSettings(store=store.root))) as url:
        yield f"{url}/v1"


# Their own imports warn, and ask a site for prices of models unless told otherwise.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_litellm(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import litellm
    monkeypatch.setattr(litellm, "telemetry", False)
    named = {"model": "openai/demo/writer", "api_base": address, "api_key": "any", "max_retries": 0}
    answer = litellm.completion(messages=CHAT, max_tokens=5, temperature=0, **named)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage.total_tokens == 8
    pieces = list(litellm.completion(messages=CHAT, stream=True, stream_options={"include_usage": True}, **named))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == TEXT
    with pytest.raises(litellm.RateLimitError):
        litellm.completion(messages=[{"role": "user", "content": FLOODING}], **named)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=CHAT, temperature=3, **named)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_langchain(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGCHAIN_TRACING_V2", "false")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_openai import ChatOpenAI
    chat = ChatOpenAI(model="demo/writer", base_url=address, api_key="any", max_retries=0, temperature=0, max_tokens=5)
    answer = chat.invoke([("system", "Be brief."), ("human", "hi")])
    assert answer.content == TEXT
    assert answer.usage_metadata["input_tokens"] == 5
    assert answer.response_metadata["system_fingerprint"] == "demo/writer@v3"
    assert "".join(str(piece.content) for piece in chat.stream("hi")) == TEXT

    def look(at: str) -> str:
        """Look at something."""
        return at

    assert chat.bind_tools([look]).invoke("hi").content == TEXT
