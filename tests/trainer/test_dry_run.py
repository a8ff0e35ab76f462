"""A dry run: what it counts and estimates, and that it leaves nothing behind."""

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from image_samples import captioned_images, image_folder, image_settings
from pydantic import ValidationError
from rich.console import Console
from trainer_samples import ending_rule, settings_for, write_csv, write_jsonl

from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import attached_layers
from sera_serve.trainer import dry_run as measured
from sera_serve.trainer.cli import main
from sera_serve.trainer.dry_run import Lengths, dry_run
from sera_serve.trainer.dry_run_report import _show_lengths
from sera_serve.trainer.run import TrainingRun, build_task, train_adapter, with_run
from sera_serve.trainer.tables.faults import InvalidData
from support.vision import random_clip


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


def test_it_counts_what_the_run_will_train(base: FrozenBase, tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "rows.csv", [*ending_rule(60), ["a" * 80, "other"]])
    settings = settings_for(Path("tiny"), tmp_path, rows, max_length=32, epochs=1, eval_fraction=0.2)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    found = dry_run(settings, base=base)
    assert sorted(tmp_path.iterdir()) == [rows], "neither a store nor checkpoints"
    assert not attached_layers(base.model)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    trained = train_adapter(settings, base=base)
    assert found.trained == trained.parameters + trained.head_parameters
    assert found.head == trained.head_parameters
    assert sum(kind.parameters for kind in found.kinds.values()) == trained.parameters
    assert {name: kind.layers for name, kind in found.kinds.items()} == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2
    )
    assert found.base == sum(p.numel() for p in base.model.parameters())
    assert found.rows == {"train": 49, "eval": 12, "test": 0}
    assert found.notes == trained.notes != []
    assert found.steps == 7
    lengths = found.lengths
    assert lengths is not None
    assert lengths.tokens == trained.trained_tokens
    assert sum(lengths.counts) == 49 and lengths.percentiles["100"] <= 32
    assert lengths.padded_tokens >= lengths.tokens
    assert found.time is not None
    assert found.time.total >= found.time.epoch + 2 * found.time.evaluation
    memory = found.memory
    assert memory.optimiser == 12 * found.trained
    assert memory.peak >= memory.weights + memory.optimiser + memory.activations
    assert memory.measured is not None and memory.peak >= memory.measured > 0


def test_lengths_begin_at_the_shortest_row(base: FrozenBase, tmp_path: Path) -> None:
    def shown(rows: list[list[str]]) -> tuple[Lengths, list[str]]:
        train = write_csv(tmp_path / "rows.csv", rows)
        found = dry_run(settings_for(Path("tiny"), tmp_path, train, epochs=1, eval_fraction=0), base=base)
        assert found.lengths is not None
        out = StringIO()
        _show_lengths(found.lengths, Console(file=out, width=200))
        return found.lengths, out.getvalue().splitlines()[2:]

    # With the token that begins a text: 21 and 22 tokens, and 21 alone.
    lengths, lines = shown([["a" * (20 + i % 2), "xy"[i % 2]] for i in range(12)])
    assert (lengths.edges, lengths.counts) == ([21, 22], [12])
    assert [line.split()[0] for line in lines] == ["21-22"]
    lengths, lines = shown([["a" * 20, "xy"[i % 2]] for i in range(12)])
    assert (lengths.edges, lengths.counts) == ([21, 21], [12])
    assert [line.split()[0] for line in lines] == ["21"]
    lengths, lines = shown([["a" * (20 + i % 12), "xy"[i % 2]] for i in range(24)])
    assert (lengths.edges[0], lengths.edges[-1], sum(lengths.counts)) == (21, 32, 24)
    assert all(lengths.counts)


def test_activations_are_those_of_the_largest_batch(base: FrozenBase, tmp_path: Path) -> None:
    """Two and four rows tell what the whole batch keeps."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p{i % 7}", "completion": "abc" * 6} for i in range(40)])
    settings = settings_for(Path("tiny"), tmp_path, rows, task="generate", batch_size=16)
    kept: list[int] = []
    original = measured._kept

    def watched(task: Any, rows: Any) -> tuple[int, int]:
        if not kept:
            kept.append(original(task, range(16))[0])
        return original(task, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_kept", watched)
        found = dry_run(settings, base=base)
    assert found.memory.activations == pytest.approx(kept[0], rel=0.02)


@pytest.mark.parametrize("packing", [False, True])
def test_padding_and_activations_are_those_of_the_batches_that_train(
    base: FrozenBase, tmp_path: Path, packing: bool
) -> None:
    pairs = [{"prompt": "q" * (40 if i % 4 == 0 else i % 5), "completion": "yes"} for i in range(32)]
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs)
    settings = settings_for(
        Path("tiny"), tmp_path, rows, task="generate", packing=packing, batch_size=32, eval_fraction=0
    )

    def trained(run: TrainingRun) -> tuple[int, int]:
        task = build_task(run)
        batches = list(measured._batches(task, settings))
        sizes = [task.collate([task.train_rows[i] for i in batch])["input_ids"].numel() for batch in batches]
        return sum(sizes), max(measured._kept(task, batch)[0] for batch in batches)

    padded, kept = with_run(settings, trained, base=base)
    found = dry_run(settings, base=base)
    assert found.lengths is not None
    assert found.lengths.padded_tokens == padded
    # A batch of several lengths keeps its mask too.
    assert found.memory.activations == pytest.approx(kept, rel=0.2)


def test_head_only_has_no_lengths(base: FrozenBase, tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(30))
    found = dry_run(settings_for(Path("tiny"), tmp_path, rows, method="head-only", eval_fraction=0), base=base)
    assert found.lengths is None and found.kinds == {}
    assert found.trained == found.head == 66
    assert found.time is not None and found.time.evaluation == 0


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("task", ["image-classify", "retrieve"])
def test_tasks_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, augment: bool) -> None:
    # Fewer evaluation rows than there are, so that some of them are taken.
    monkeypatch.setattr(measured, "_TIMED_ROWS", 5)
    if task == "retrieve":
        train = captioned_images(tmp_path / "photos", 32)
        options: dict[str, Any] = {"target_modules": "all-linear"}
    else:
        train, options = image_folder(tmp_path / "rows", 16), {}
    settings = image_settings(tmp_path, train, task=task, eval_fraction=0.4, augment=augment, **options)
    found = dry_run(settings, base=random_clip())
    trained = train_adapter(settings, base=random_clip())
    assert found.rows["eval"] > 5
    assert found.trained == trained.parameters + trained.head_parameters
    assert found.time is not None and found.time.evaluation > 0
    assert (found.lengths is None) == (task == "image-classify")


def test_notes_are_of_the_data_and_not_of_the_timed_evaluation(tmp_path: Path) -> None:
    base = random_clip()
    # All images are one point, of which training warns.
    norm = base.model.get_submodule("vision_model.post_layernorm")
    torch.nn.init.zeros_(norm.weight)
    torch.nn.init.ones_(norm.bias)
    rows = captioned_images(tmp_path / "photos", 16)
    settings = image_settings(tmp_path, rows, task="retrieve", target_modules="all-linear", eval_fraction=0.4)
    assert dry_run(settings, base=base).notes == []


def test_what_does_not_fit_is_not_run(base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(30))
    monkeypatch.setattr(measured.psutil, "virtual_memory", lambda: type("Free", (), {"available": 1000})())
    monkeypatch.setattr(measured, "_past_peak", lambda base: 0)
    found = dry_run(settings_for(Path("tiny"), tmp_path, rows), base=base)
    assert found.time is None and found.memory.measured is None


def test_its_errors_are_those_of_the_run(base: FrozenBase, tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "rows.csv", [*ending_rule(10), ["text", ""]])
    with pytest.raises(InvalidData, match="row 11"):
        dry_run(settings_for(Path("tiny"), tmp_path, rows), base=base)
    good = write_csv(tmp_path / "good.csv", ending_rule(10))
    with pytest.raises(InvalidConfiguration, match="--max-length 9999"):
        dry_run(settings_for(Path("tiny"), tmp_path, good, max_length=9999), base=base)
    with pytest.raises(InvalidConfiguration, match="--budget 4 is not below the mean rank 4"):
        dry_run(settings_for(Path("tiny"), tmp_path, good, budget=4), base=base)
    with pytest.raises(ValidationError, match="paged-adamw pages to and from a GPU"):
        settings_for(Path("tiny"), tmp_path, good, optimizer="paged-adamw")


def test_sizes_between_and_beyond_the_timed_ones() -> None:
    found = measured._by_size(torch.tensor([5, 10, 15, 20, 40]).numpy(), [10, 20], [1.0, 3.0])
    assert found.tolist() == [0.5, 1.0, 2.0, 3.0, 6.0]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_base: Path,
    tmp_path: Path,
    as_json: bool,
) -> None:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(40))
    arguments = ["--base", str(tiny_base), "--store", str(tmp_path / "store"), "--name", "acme/tiny", "--rank", "4"]
    arguments += ["--task", "classify", "--train", str(rows), "--dry-run", *(["--json"] if as_json else [])]
    monkeypatch.setattr(sys, "argv", ["train_adapter", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    out = capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    if as_json:
        assert json.loads(out)["rows"] == {"train": 36, "eval": 4, "test": 0}
    else:
        for text in (
            "36 train, 4 eval; every row was read",
            "median",
            "note     none: nothing is cut",
            "q_proj",
            "of the base",
            "MiB",
            "steps",
            "nothing",
        ):
            assert text in out


@pytest.mark.parametrize(
    ("option", "said"), [([], "continues from the last checkpoint"), (["--dry-run"], "stopped; nothing was written")]
)
def test_what_is_left_after_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, option: list[str], said: str
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for name in ("run.train_adapter", "dry_run.dry_run"):
        monkeypatch.setattr(f"sera_serve.trainer.{name}", interrupted)
    arguments = ["--base", "embedded", "--store", str(tmp_path), "--name", "acme/tiny", "--task", "classify"]
    monkeypatch.setattr(sys, "argv", ["train_adapter", *arguments, "--train", "rows.csv", *option])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert said in capsys.readouterr().err
