"""Jobs whose adapter could never be served or stored are refused when they are made, not after their training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from adapters_store import AdapterBundle, AdapterStore
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.errors import AdapterTooLarge
from sera_serve.server import build_app
from sera_serve.trainer import packages
from support.factories import random_adapter, with_hidden_layer, with_vectors
from support.live_server import live_server
from support.stub_engine import StubEngine
from support.training import SORTED, STORIES, upload

POOL_BYTES = 1 << 20


@pytest.fixture(scope="module")
def store(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore(tmp_path_factory.mktemp("sizes") / "store")
    query = SeraConfig(4, 2, 8.0, ("q_proj",))
    store.publish(random_adapter(base, query, 1), "acme/small")
    # As a server with a larger pool has published it.
    store.publish(full(base, 250), "acme/large")
    sorter = random_adapter(base, query, 1, ["fruit", "tool"])
    store.publish(with_hidden_layer(sorter, "relu", 4), "acme/deep")
    store.publish(with_vectors(random_adapter(base, query, 1), ["q_proj"]), "acme/vectors")
    store.publish(of_another_base(random_adapter(base, query, 2)), "acme/foreign")
    return store


def full(base: FrozenBase, rank: int) -> AdapterBundle:
    return random_adapter(base, SeraConfig(rank, 1, 8.0, ("q_proj", "o_proj")), 1)


def of_another_base(bundle: AdapterBundle) -> AdapterBundle:
    info = bundle.config.base.model_copy(update={"weights_digest": "0" * 64})
    return AdapterBundle(bundle.config.model_copy(update={"base": info}), dict(bundle.tensors))


@pytest.fixture(scope="module")
def engine(base: FrozenBase, store: AdapterStore) -> ServingEngine:
    return ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=POOL_BYTES >> 20, kv_cache_tokens=1024))


@pytest.fixture(scope="module")
def client(engine: ServingEngine, store: AdapterStore) -> Iterator[openai.OpenAI]:
    # The jobs wait: no process is started.
    settings = engine.settings.model_copy(
        update={
            "max_training_jobs": 0,
            "max_upload_mib": 1,
            "quotas": {"thrifty": {"bytes": 1000}, "full": {"adapters": 0}},
        }
    )
    with (
        live_server(build_app(engine, store, settings)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as made,
    ):
        yield made


def refusal(client: openai.OpenAI, rows: Any, model: str, **adapter: Any) -> openai.APIStatusError:
    """The refusal of a job; nothing is left of the job."""
    before = len(client.fine_tuning.jobs.list(limit=100).data)
    with pytest.raises(openai.APIStatusError) as caught:
        client.fine_tuning.jobs.create(
            model=model, training_file=upload(client, rows), extra_body={"adapter": adapter} if adapter else None
        )
    assert len(client.fine_tuning.jobs.list(limit=100).data) == before
    return caught.value


def served(engine: ServingEngine, bundle: AdapterBundle) -> bool:
    try:
        engine.check_bundle(bundle)
    except AdapterTooLarge:
        return False
    return True


def test_a_rank_is_refused_exactly_when_its_adapter_would_be(
    client: openai.OpenAI, engine: ServingEngine, base: FrozenBase
) -> None:
    low, high = 128, 250
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if served(engine, full(base, middle)) else (low, middle)
    shape = {"method": "moslora", "target_modules": ["q_proj", "o_proj"]}
    made = client.fine_tuning.jobs.create(
        model=base.name, training_file=upload(client, STORIES), extra_body={"adapter": shape | {"rank": low}}
    )
    assert made.status == "validating_files"
    error = refusal(client, STORIES, base.name, **shape, rank=high)
    assert (error.status_code, error.code, error.param) == (400, "adapter_too_large", "adapter.rank")
    assert f"the device pool has {POOL_BYTES}" in error.message and "send a smaller adapter.rank" in error.message


def test_more_labels_than_the_pool_has_room_for(client: openai.OpenAI, base: FrozenBase) -> None:
    rows = [{"text": "a stone", "label": number} for number in range(POOL_BYTES // 4 // 64)]
    error = refusal(client, rows, base.name, method="head-only")
    assert (error.code, error.param) == ("adapter_too_large", "training_file")
    client.fine_tuning.jobs.create(
        model=base.name, training_file=upload(client, rows[:1000]), extra_body={"adapter": {"method": "head-only"}}
    )


@pytest.mark.parametrize(
    ("model", "rows", "code", "words"),
    [
        ("acme/large", STORIES, "adapter_too_large", "send a smaller adapter as model"),
        ("acme/deep", SORTED, "invalid_configuration", "a hidden layer in its head, which cannot be trained further"),
        ("acme/vectors", STORIES, "invalid_configuration", "gains or offsets"),
        ("acme/foreign", STORIES, "wrong_base", ""),
        ("acme/small", SORTED, "invalid_request", "is for task generate"),
    ],
)
def test_an_adapter_that_no_job_can_go_on_from(
    client: openai.OpenAI, model: str, rows: Any, code: str, words: str
) -> None:
    error = refusal(client, rows, model)
    assert (error.status_code, error.code, error.param) == (400, code, "model")
    assert words in error.message


def test_quotas_are_asked_for_the_size_that_the_adapter_will_have(client: openai.OpenAI, base: FrozenBase) -> None:
    error = refusal(client, STORIES, base.name, tenant="thrifty", rank=8)
    assert (error.status_code, error.code, error.param) == (403, "quota_exceeded", "adapter.rank")
    assert "bytes" in error.message
    error = refusal(client, STORIES, base.name, tenant="full")
    assert (error.status_code, error.code, error.param) == (403, "quota_exceeded", None)
    made = client.fine_tuning.jobs.create(model="acme/small", training_file=upload(client, STORIES))
    assert made.status == "validating_files"


def test_a_server_without_the_trainers_packages_makes_no_job(
    client: openai.OpenAI, base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda module: None if module == "sklearn" else module)
    error = refusal(client, STORIES, base.name)
    assert (error.status_code, error.code) == (400, "invalid_configuration")
    assert "scikit-learn is missing" in error.message and "'sera-serve[train]'" in error.message


def test_layers_by_pattern(client: openai.OpenAI, base: FrozenBase) -> None:
    error = refusal(client, STORIES, base.name, target_modules=["layers.7.*"])
    assert (error.code, error.param) == ("invalid_configuration", "adapter.target_modules")
    client.fine_tuning.jobs.create(
        model=base.name,
        training_file=upload(client, STORIES),
        extra_body={"adapter": {"target_modules": ["layers.0.*.q_proj"]}},
    )


def test_a_bundle_that_the_store_takes_no_more(base: FrozenBase, store: AdapterStore) -> None:
    # Here no pool refuses it: one of 16-bit numbers may have room for what is too large as a bundle of float32.
    settings = ServeSettings(store=store.root, max_training_jobs=0, max_upload_mib=1)
    with (
        live_server(build_app(StubEngine(base), store, settings)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
    ):
        error = refusal(client, STORIES, base.name, method="lora", rank=256, target_modules="all-linear")
    assert (error.code, error.param) == ("adapter_too_large", "adapter.rank")
    assert "a bundle may have 1048576; raise max_upload_mib, or send a smaller" in error.message
