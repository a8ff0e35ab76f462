"""Packed rows have the losses that they have alone, and a packed run learns what an unpacked one learns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_samples import WORDS, settings_for, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, freeze_base, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import attach_adapter
from sera_serve.trainer.data.packing import check_packing, pack_lengths, pack_rows
from sera_serve.trainer.data.passages import load_generate_data
from sera_serve.trainer.model import IGNORED
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.tasks import GenerateTask


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    draw = random.Random(0)
    pairs = [
        {"prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 4))), "completion": draw.choice(WORDS)}
        for _ in range(40)
    ]
    return write_jsonl(tmp_path / "rows.jsonl", pairs)


def settings(rows: Path, **options: Any) -> Any:
    return settings_for(Path("tiny"), rows.parent, rows, task="generate", **options)


def test_sequences_hold_every_row_once_and_are_few() -> None:
    lengths = [random.Random(3).randint(1, 60) for _ in range(50)] + [90]
    sequences = pack_lengths(lengths, 64)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(51))
    sums = [sum(lengths[i] for i in sequence) for sequence in sequences]
    assert sums[0] == 90 and max(sums[1:]) <= 64
    assert sum(sums[1:]) > 0.9 * 64 * (len(sums) - 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_row_has_the_losses_that_it_has_alone(base: FrozenBase, rows: Path, attention: str) -> None:
    base.model.set_attn_implementation(attention)
    options = settings(rows, eval_fraction=0)
    attach_adapter(base.model, options.adapter_config())
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    task = GenerateTask(base, load_generate_data(options), max_length=64, packing=True)
    batch = [task.train_rows[i] for i in range(16)]
    packed = task.collate(batch)
    assert packed["input_ids"].shape[0] < 16
    with torch.no_grad():
        losses = task.generator.packed_losses(**packed)
    found = {}
    for place in range(len(losses)):
        starts = [i for i, position in enumerate(packed["position_ids"][place].tolist()) if position == 0]
        for start, end in zip(starts, [*starts[1:], losses.shape[1] + 1], strict=True):
            learned = packed["labels"][place, start:end] != IGNORED
            assert not learned[0]
            tokens = tuple(packed["input_ids"][place, start:end].tolist())
            found[tokens] = losses[place, start : end - 1][learned[1:]]
    for row in batch:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            alone = task.generator.token_losses(ids, torch.ones_like(ids), labels)
        expected = alone[0, -int((labels != IGNORED).sum()) :]
        torch.testing.assert_close(found[tuple(row["input_ids"])], expected, atol=1e-5, rtol=1e-5)
    padded = GenerateTask(base, load_generate_data(options), max_length=64).collate(batch)
    torch.testing.assert_close(task.model(**packed)["loss"], task.model(**padded)["loss"], atol=1e-5, rtol=1e-5)


def test_no_row_sees_another_one(base: FrozenBase, rows: Path) -> None:
    batch: list[Any] = [
        {"input_ids": [1, 5, 6, 7], "labels": [IGNORED, 5, 6, 7], "text_bytes": 3},
        {"input_ids": [1, 8, 9], "labels": [IGNORED, 8, 9], "text_bytes": 2},
    ]
    task = GenerateTask(base, load_generate_data(settings(rows)), max_length=64, packing=True)
    first = task.generator.packed_losses(**pack_rows(batch, 64, 0))
    batch[0]["input_ids"] = [1, 20, 21, 22]
    batch[0]["labels"] = [IGNORED, 20, 21, 22]
    second = task.generator.packed_losses(**pack_rows(batch, 64, 0))
    assert not torch.equal(first[0, :3], second[0, :3])
    assert torch.equal(first[0, 3:], second[0, 3:])


def test_a_packed_run_learns_the_same(base: FrozenBase, rows: Path) -> None:
    plain = train_adapter(settings(rows, name="acme/plain"), base=base)
    packed = train_adapter(settings(rows, name="acme/packed", packing=True), base=base)
    assert packed.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-3)
    assert packed.trained_tokens == plain.trained_tokens
    store = AdapterStore(rows.parent / "store")
    tensors = [store.load(result.digest).tensors for result in (plain, packed)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, atol=2e-3, rtol=2e-2)


def test_a_base_that_lets_rows_see_each_other_is_refused(base: FrozenBase) -> None:
    check_packing(base)
    shape = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    blind = freeze_base(GPT2LMHeadModel(shape), base.tokenizer, "blind")
    forward = blind.model.forward
    blind.model.forward = lambda **inputs: forward(**{k: v for k, v in inputs.items() if k != "position_ids"})
    with pytest.raises(InvalidConfiguration, match="base blind does not keep packed rows apart; leave --packing out"):
        check_packing(blind)
