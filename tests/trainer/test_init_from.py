"""Runs that go on from an adapter: its values come first, and its shape, labels, head and template stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_samples import save_tiny_base

from adapters_store import AdapterStore
from adapters_store.errors import AdapterNotFound
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.initial import check_initial
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings, load_options
from sera_serve.trainer.tables.faults import InvalidData
from support.factories import random_adapter
from support.training import CHATS, SORTED, jsonl

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return load_base(str(save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(SORTED))
    return path


def options(tmp_path: Path, rows: Path, **given: Any) -> TrainSettings:
    fixed = {"base": "tiny", "store": tmp_path / "store", "name": "acme/a", "train": rows, "batch_size": 4}
    return TrainSettings(**{"task": "classify", "epochs": 1, "eval_fraction": 0, **fixed, **given})


@pytest.mark.slow
def test_a_classifier_goes_on_with_its_own_values(tmp_path: Path, rows: Path, frozen: FrozenBase) -> None:
    store = AdapterStore(tmp_path / "store")
    first = train_adapter(
        options(tmp_path, rows, rank=4, split=2, target_modules="q_proj,v_proj", pooling="mean", max_length=32),
        base=frozen,
    )
    # With this rate nothing moves, so the result is what the run began with.
    still = options(tmp_path, rows, name="acme/b", init_from="acme/a", learning_rate=1e-12)
    second = train_adapter(still, base=frozen)
    before, after = store.load(first.digest), store.load(second.digest)
    for field in ("task", "method", "modules", "labels", "pooling", "max_length"):
        assert getattr(after.config, field) == getattr(before.config, field)
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        torch.testing.assert_close(after.tensors[name], tensor, rtol=0, atol=1e-6)
    record = after.config.training
    assert record["init_from"] == {"adapter": "acme/a", "digest": first.digest}
    assert "rank" not in record["settings"]  # type: ignore[operator]
    moved = train_adapter(options(tmp_path, rows, name="acme/c", init_from="acme/a@v1"), base=frozen)
    changed = store.load(moved.digest).tensors
    assert any(not torch.equal(changed[name], tensor) for name, tensor in before.tensors.items())


@pytest.mark.slow
def test_the_factors_that_trained_go_on_training(tmp_path: Path, rows: Path, frozen: FrozenBase) -> None:
    store = AdapterStore(tmp_path / "store")
    first = train_adapter(options(tmp_path, rows, rank=4, target_modules="q_proj", train_factors="b"), base=frozen)
    before = store.load(first.digest).tensors
    # The third run goes on from one that named no factors itself.
    for name, origin in (("acme/b", "acme/a"), ("acme/c", "acme/b")):
        result = train_adapter(options(tmp_path, rows, name=name, init_from=origin), base=frozen)
        assert result.parameters == first.parameters
        after = store.load(result.digest)
        assert after.config.training["settings"]["train_factors"] == ["b"]  # type: ignore[index, call-overload]
        moved = {name for name, tensor in after.tensors.items() if not torch.equal(before[name], tensor)}
        assert {name.rpartition(".")[2] for name in moved} == {"sera_b", "weight", "bias"}


@pytest.mark.slow
def test_a_record_from_elsewhere_names_no_factors(tmp_path: Path, rows: Path, frozen: FrozenBase) -> None:
    store = AdapterStore(tmp_path / "store")
    made = random_adapter(frozen, SeraConfig(4, 2, 8, ("q_proj",)), 1, labels=["fruit", "tool"])
    for i, settings in enumerate(("all", {"train_factors": "b"}, {"train_factors": [{}]}, {"train_factors": []})):
        config = made.config.model_copy(update={"training": {"settings": settings}})
        store.publish(type(made)(config, made.tensors), f"acme/from{i}")
        result = train_adapter(options(tmp_path, rows, name=f"acme/to{i}", init_from=f"acme/from{i}"), base=frozen)
        assert result.parameters == sum(spec.parameters for spec in config.modules.values())


@pytest.mark.slow
def test_options_without_meaning_for_the_kept_method_are_refused(
    tmp_path: Path, rows: Path, frozen: FrozenBase
) -> None:
    train_adapter(options(tmp_path, rows, name="acme/head", method="head-only"), base=frozen)
    train_adapter(options(tmp_path, rows, name="acme/c", method="sera-c-only", rank=4), base=frozen)
    train_adapter(options(tmp_path, rows, name="acme/a", rank=4, train_factors="a,c"), base=frozen)

    def refusal(origin: str, **given: Any) -> InvalidConfiguration:
        with pytest.raises(InvalidConfiguration) as caught:
            train_adapter(options(tmp_path, rows, name="acme/next", init_from=origin, **given), base=frozen)
        return caught.value

    for option in ("lora_plus_ratio", "budget"):
        error = refusal("acme/head", **{option: 4})
        shown = option.replace("_", "-")
        assert (error.param, error.message) == (
            option,
            f"--{shown} has no meaning for method head-only; leave it out",
        )
    error = refusal("acme/head", learning_rate=0.01, head_learning_rate=0.1)
    assert error.param == "learning_rate" and "beside --head-learning-rate; leave it out" in error.message
    for origin in ("acme/c", "acme/a"):
        assert "B does not train; leave it out" in refusal(origin, lora_plus_ratio=16).message
    config = AdapterStore(tmp_path / "store").config(AdapterStore(tmp_path / "store").resolve("acme/head").digest)
    images = options(tmp_path, rows, task="image-classify", augment=True, init_from="acme/head")
    with pytest.raises(InvalidConfiguration, match="--augment is not for method head-only"):
        check_initial("acme/head", config.model_copy(update={"task": "image-classify"}), images)


def test_parts_of_the_budget_need_the_budget_in_a_run_that_goes_on() -> None:
    fixed = {"base": "tiny", "store": "s", "name": "a/b", "task": "classify", "train": "r.csv", "init_from": "acme/a"}
    for given, fault in (
        ({"budget_warmup": 0.3}, "--budget-warmup belongs to --budget; give --budget too"),
        ({"budget": 4, "budget_warmup": 0.6}, "leave no step between them"),
    ):
        with pytest.raises(InvalidConfiguration, match=fault):
            load_options(None, {**fixed, **given})


def test_layers_of_several_shapes_stay_as_they_are(tmp_path: Path, rows: Path, frozen: FrozenBase) -> None:
    store = AdapterStore(tmp_path / "store")
    wide = random_adapter(frozen, SeraConfig(8, 4, 16, ("q_proj",)), 1, labels=["fruit", "tool"])
    narrow = random_adapter(frozen, SeraConfig(4, 2, 8, ("v_proj",)), 2, labels=["fruit", "tool"])
    config = wide.config.model_copy(update={"modules": {**wide.config.modules, **narrow.config.modules}})
    mixed = type(wide)(config, {**narrow.tensors, **wide.tensors})
    store.publish(mixed, "acme/mixed")
    result = train_adapter(options(tmp_path, rows, init_from="acme/mixed"), base=frozen)
    assert store.config(result.digest).modules == config.modules


def test_a_chat_keeps_its_template(tmp_path: Path, frozen: FrozenBase) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes(jsonl(CHATS))
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    given = {"task": "generate", "messages_column": "messages", "train": chats}
    train_adapter(options(tmp_path, chats, **given, chat_template=template, rank=4), base=frozen)
    result = train_adapter(options(tmp_path, chats, **given, name="acme/b", init_from="acme/a"), base=frozen)
    assert AdapterStore(tmp_path / "store").config(result.digest).chat_template == TEMPLATE
    other = options(tmp_path, chats, **given, name="acme/c", init_from="acme/a", chat_template=template)
    with pytest.raises(InvalidConfiguration, match="keeps the chat template of acme/a; leave --chat-template out"):
        train_adapter(other, base=frozen)


def test_rows_of_a_label_that_the_adapter_lacks_are_refused(tmp_path: Path, rows: Path, frozen: FrozenBase) -> None:
    train_adapter(options(tmp_path, rows, rank=4), base=frozen)
    rows.write_bytes(jsonl([*SORTED, {"text": "stone", "label": "rock"}]))
    with pytest.raises(InvalidData, match=r"row 13 \(line 13\): label 'rock' is not a label of acme/a"):
        train_adapter(options(tmp_path, rows, init_from="acme/a"), base=frozen)


def test_what_cannot_be_gone_on_from_is_refused(tmp_path: Path, rows: Path, frozen: FrozenBase) -> None:
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(AdapterNotFound):
        train_adapter(options(tmp_path, rows, init_from="acme/none"), base=frozen)
    store.publish(random_adapter(frozen, SeraConfig(4, 2, 8, ("q_proj",)), 1), "acme/tale")
    with pytest.raises(InvalidConfiguration, match="is for task generate"):
        train_adapter(options(tmp_path, rows, init_from="acme/tale"), base=frozen)
    fixed = {"base": "tiny", "store": "s", "name": "a/b", "task": "classify", "train": str(rows)}
    with pytest.raises(InvalidConfiguration, match="--init-from keeps what --rank says; leave --rank out"):
        load_options(None, {**fixed, "init_from": "acme/a", "rank": 4})
    with pytest.raises(InvalidConfiguration, match="adapter id"):
        load_options(None, {**fixed, "init_from": "nothing"})
