"""A run that stopped goes on to the very tensors of one that did not."""

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from trainer_samples import ending_rule, settings_for, write_csv, write_jsonl
from transformers import TrainerState

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.trainer import loop
from sera_serve.trainer.checkpoint import CheckpointNotWritten, RunInProgress, last_checkpoint, run_folder
from sera_serve.trainer.order import LengthGroupedOrder
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings


class Stopped(RuntimeError):
    """Stands in for a kill."""


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


def settings(folder: Path, **options: Any) -> TrainSettings:
    rows = write_csv(folder / "rows.csv", ending_rule(60))
    defaults = {"epochs": 3, "dropout": 0.2, "checkpoint_seconds": 0, "learning_rate": 1e-2}
    return settings_for(Path("tiny"), folder, rows, **(defaults | options))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, moment: str) -> None:
    original = getattr(loop.SaveByTheClock, moment)

    def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == step:
            raise Stopped
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(loop.SaveByTheClock, moment, stopping)


def stopped_run(settings: TrainSettings, base: FrozenBase, step: int, moment: str = "on_step_end") -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, moment)
        with pytest.raises(Stopped):
            train_adapter(settings, base=base)


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run that every other of the default settings must come out as."""
    return train_adapter(settings(tmp_path_factory.mktemp("undisturbed")), base=load_base(str(tiny_base)))


# 54 rows by 8: 7 steps an epoch. Within an epoch, at its first and last step, after its evaluation's save.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "moment", "resumed_from"),
    [
        (1, "on_step_end", None),
        (10, "on_step_end", 9),
        (7, "on_step_end", 6),
        (14, "on_save", 14),
        (21, "on_save", 21),
    ],
)
def test_a_stopped_run_ends_as_an_undisturbed_one(
    base: FrozenBase,
    undisturbed: TrainResult,
    tmp_path: Path,
    step: int,
    moment: str,
    resumed_from: int | None,
) -> None:
    stopped_run(settings(tmp_path), base, step, moment)
    torch.manual_seed(12345)
    resumed = train_adapter(settings(tmp_path), base=base)
    assert resumed.resumed_from == resumed_from
    assert resumed.digest == undisturbed.digest
    assert resumed.metrics == undisturbed.metrics
    assert not (tmp_path / "store.training").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "head-only"},
        {"head_learning_rate": 1e-3, "eval_fraction": 0},
        {"lora_plus_ratio": 4.0},
        {"rank_pattern": "q_proj=8", "alpha_pattern": "q_proj=3"},
        {"method": "sera-c-only"},
        # Step 12 of 21 is where the ranks still fall.
        {"rank": 8, "budget": 4.0, "budget_final": 0.3},
    ],
)
def test_every_kind_of_run_resumes(base: FrozenBase, tmp_path: Path, options: dict[str, Any]) -> None:
    undisturbed = train_adapter(settings(tmp_path, **options), base=base)
    AdapterStore(tmp_path / "store").delete("acme/tiny")
    stopped_run(settings(tmp_path, **options), base, 12)
    resumed = train_adapter(settings(tmp_path, **options), base=base)
    assert resumed.resumed_from == 11
    assert resumed.digest == undisturbed.digest


def test_a_generator_resumes(base: FrozenBase, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p{i}" * (i % 5), "completion": "abc"} for i in range(60)])
    options = settings_for(Path("tiny"), tmp_path, rows, task="generate", dropout=0.1, checkpoint_seconds=0, epochs=2)
    undisturbed = train_adapter(options, base=base)
    stopped_run(options, base, 9)
    resumed = train_adapter(options, base=base)
    assert (resumed.resumed_from, resumed.digest, resumed.version) == (8, undisturbed.digest, 1)


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "store.training").glob("acme/tiny/*/checkpoint-*"), key=lambda p: int(p.name[11:]))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [("tensors.safetensors", _truncate), ("extra.json", _truncate), ("trainer_state.json", Path.unlink)],
)
def test_a_damaged_checkpoint_is_passed_over(
    base: FrozenBase, undisturbed: TrainResult, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    stopped_run(settings(tmp_path), base, 10)
    older, newest = checkpoints(tmp_path)
    assert (older.name, newest.name) == ("checkpoint-7", "checkpoint-9")
    damage(newest / name)
    (newest.parent / "partial-checkpoint").mkdir()
    resumed = train_adapter(settings(tmp_path), base=base)
    assert (resumed.resumed_from, resumed.digest) == (7, undisturbed.digest)


# At the rate 1 the first epoch is the best one. After step 21 only its tensors are loaded, by Trainer or without it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "step", "moment", "resumed_from"),
    [
        ({}, 10, "on_step_end", 9),
        ({"learning_rate": 1.0}, 21, "on_save", 21),
        ({"learning_rate": 1.0, "patience": 2}, 21, "on_save", 21),
    ],
)
@pytest.mark.parametrize("home", ["here", "moved"])
def test_a_run_goes_on_from_a_folder_with_another_path(
    base: FrozenBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    home: str,
    options: dict[str, Any],
    step: int,
    moment: str,
    resumed_from: int,
) -> None:
    for folder in ("undisturbed", "here"):
        (tmp_path / folder).mkdir()
    undisturbed = train_adapter(settings(tmp_path / "undisturbed", **options), base=base)
    monkeypatch.chdir(tmp_path / "here")
    stopped_run(settings(Path(), **options), base, step, moment)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").rename(tmp_path / home)
    resumed = train_adapter(settings(tmp_path / home, **options), base=base)
    assert (resumed.resumed_from, resumed.digest) == (resumed_from, undisturbed.digest)
    assert resumed.metrics == undisturbed.metrics


def test_checkpoints_that_are_deleted_are_told(base: FrozenBase, tmp_path: Path) -> None:
    stopped_run(settings(tmp_path), base, 10)
    older, newest = checkpoints(tmp_path)
    _truncate(older / "tensors.safetensors")
    told = StringIO()
    assert train_adapter(settings(tmp_path), base=base, console=Console(file=told)).resumed_from is None
    assert f"note: {newest} is deleted, because {older.name}, which it needs for its best epoch, can" in told.getvalue()
    assert f"note: {older} is deleted, because it cannot be read (Error while deserializing" in told.getvalue()


@contextlib.contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    """Let no file grow beyond some bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# 10 KiB: the tensors do not fit. The state is written last, and it is the smallest file of all.
@pytest.mark.parametrize("fault", ["tensors", "state"])
def test_a_full_disk_is_told_and_the_run_goes_on_after_it(
    base: FrozenBase, undisturbed: TrainResult, tmp_path: Path, fault: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for remedy in (
        "and start the same command again, or give --work-dir",
        "and the same command goes on from checkpoint-9; with --work-dir on another disk it begins anew",
    ):
        with contextlib.ExitStack() as stack:
            if fault == "tensors":
                stack.enter_context(small_files(10 << 10))
            else:
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(TrainerState, "save_to_json", full)
            with pytest.raises(CheckpointNotWritten) as caught:
                train_adapter(settings(tmp_path), base=base)
        assert f"; free space there {remedy}" in caught.value.message
        (folder,) = (tmp_path / "store.training").glob("acme/tiny/*")
        assert f" cannot be written to {folder} (" in caught.value.message
        assert not (folder / "partial-checkpoint").exists()
        if not checkpoints(tmp_path):
            stopped_run(settings(tmp_path), base, 10)
    resumed = train_adapter(settings(tmp_path), base=base)
    assert (resumed.resumed_from, resumed.digest) == (9, undisturbed.digest)


def test_without_its_best_epoch_a_checkpoint_is_no_use(
    base: FrozenBase, undisturbed: TrainResult, tmp_path: Path
) -> None:
    stopped_run(settings(tmp_path), base, 10)
    (checkpoints(tmp_path)[0] / "tensors.safetensors").unlink()
    resumed = train_adapter(settings(tmp_path), base=base)
    assert (resumed.resumed_from, resumed.digest) == (None, undisturbed.digest)


def test_checkpoints_hold_the_adapter_and_no_pickle(base: FrozenBase, tmp_path: Path) -> None:
    stopped_run(settings(tmp_path), base, 10)
    newest = checkpoints(tmp_path)[-1]
    assert {path.name for path in newest.iterdir()} == {"tensors.safetensors", "extra.json", "trainer_state.json"}
    adapter = sum(p.numel() for p in base.model.parameters())
    assert (newest / "tensors.safetensors").stat().st_size < 4 * adapter
    json.loads((newest / "extra.json").read_text())
    assert last_checkpoint(newest.parent, {"other": torch.zeros(3)}) is None


def test_folders_that_the_user_has_made_stay(base: FrozenBase, tmp_path: Path) -> None:
    work = tmp_path / "scratch" / "mine"
    work.mkdir(parents=True)
    train_adapter(settings(tmp_path, work_dir=work), base=base)
    assert not list(work.iterdir())


def test_no_resume_begins_anew(base: FrozenBase, tmp_path: Path) -> None:
    stopped_run(settings(tmp_path), base, 10)
    assert train_adapter(settings(tmp_path, resume=False), base=base).resumed_from is None


def test_other_settings_or_data_do_not_resume(base: FrozenBase, tmp_path: Path) -> None:
    first = settings(tmp_path)
    stopped_run(first, base, 10)
    other = first.model_copy(update={"epochs": 1})
    assert train_adapter(other, base=base).resumed_from is None
    write_csv(tmp_path / "other.csv", ending_rule(60, seed=9))
    stopped_run(first.model_copy(update={"train": tmp_path / "other.csv"}), base, 1)
    # The first run's checkpoints are still there for it.
    assert train_adapter(first, base=base).resumed_from == 9


def test_one_run_at_a_time(base: FrozenBase, tmp_path: Path) -> None:
    stopped_run(settings(tmp_path), base, 10)
    (folder,) = (tmp_path / "store.training").glob("acme/tiny/*")
    with (
        run_folder(folder.parent, folder.name, resume=True),
        pytest.raises(RunInProgress, match="another process is training this adapter in"),
    ):
        train_adapter(settings(tmp_path), base=base)


def test_the_order_of_rows_is_a_function_of_seed_and_epoch() -> None:
    lengths = [5 + i % 17 for i in range(103)]
    epoch = 0

    def order(seed: int) -> list[int]:
        return list(LengthGroupedOrder(lengths, 8, seed, lambda: epoch))

    first = order(1)
    assert sorted(first) == list(range(103))
    assert first == order(1) != order(2)
    epoch = 1
    assert first != order(1)
    spread = [max(chunk) - min(chunk) for i in range(0, 96, 8) if (chunk := [lengths[j] for j in first[i : i + 8]])]
    assert max(spread) <= 2
