"""One run on two processes: the result of one process, published once, and an error that ends both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from image_samples import image_folder, image_settings
from trainer_samples import ending_rule, settings_for, write_csv, write_jsonl

from adapters_store import AdapterStore
from sera_serve.base import load_base
from sera_serve.trainer.loop import AdapterTrainer
from sera_serve.trainer.parallel import Processes, ShareOfBatches, may_leave_out
from sera_serve.trainer.run import TrainingRun, build_task, with_run
from support.vision import random_clip

# gloo on the CPU. accelerate starts several processes only with --multi_gpu; the trainer's --device decides the rest.
LAUNCH = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.parametrize(("rows", "size"), [(17, 8), (9, 8), (16, 4), (3, 8)])
def test_the_shares_of_a_batch_are_the_batch(rows: int, size: int) -> None:
    order: Any = list(range(100, 100 + rows))
    shares = [list(ShareOfBatches(order, size, Processes(index, 3))) for index in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == len(ShareOfBatches(order, size, Processes(0, 3)))
    for step, parts in enumerate(zip(*shares, strict=True)):
        assert all(parts)
        counted = sorted(row for part in parts for row, counts in part if counts)
        assert counted == order[step * size : (step + 1) * size]


def test_a_share_has_other_crops_in_each_epoch_as_one_process_has(tmp_path: Path) -> None:
    settings = image_settings(tmp_path, image_folder(tmp_path / "rows", 12), augment=True, eval_fraction=0)

    def pixels(run: TrainingRun, count: int, epoch: int, skipped: int) -> list[torch.Tensor]:
        trainer = AdapterTrainer(build_task(run), settings, tmp_path / "run", [], Processes(0, count))
        # What transformers' loop calls, in a run that goes on within an epoch too.
        batches = skip_first_batches(trainer.get_train_dataloader(), skipped)
        batches.set_epoch(epoch)
        return [batch["pixel_values"] for batch in batches]

    def check(run: TrainingRun) -> None:
        for epoch, skipped in ((0, 0), (1, 0), (1, 2)):
            alone, share = (pixels(run, count, epoch, skipped) for count in (1, 2))
            assert len(alone) == len(share) == 3 - skipped
            assert all(torch.equal(one[::2], two) for one, two in zip(alone, share, strict=True))

    with_run(settings, check, base=random_clip())


@pytest.mark.parametrize(
    ("kind", "targets", "leaves_out"),
    [("decoder", "all-linear", False), ("encoder", "query,value", False), ("encoder", "all-linear", True)],
)
def test_parameters_without_a_part_are_looked_for_where_there_may_be_some(
    tiny_base: Path, tiny_encoder: Path, tmp_path: Path, kind: str, targets: str, leaves_out: bool
) -> None:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(20))
    settings = settings_for(Path("tiny"), tmp_path, rows, target_modules=targets, dropout=0.1)
    looked = []

    def look(run: TrainingRun) -> None:
        task = build_task(run)
        for count in (1, 2):
            args = AdapterTrainer(task, settings, tmp_path / "run", [], Processes(0, count)).args
            looked.append(args.ddp_find_unused_parameters)
        assert all(parameter.grad is None for parameter in task.model.parameters())

    # The encoder has a pooler, whose output nothing reads.
    with_run(settings, look, base=load_base(str(tiny_base if kind == "decoder" else tiny_encoder)))
    assert looked == [None, leaves_out]


def test_experts_may_be_left_out_in_another_batch() -> None:
    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(2, 1) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": sum(expert(x).sum() for expert in self.experts)}

    assert may_leave_out(Mixture(), {"x": torch.ones(1, 2)})


def launch(words: list[str], script: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = [str(script)] if script is not None else ["-m", "sera_serve.trainer"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, *program, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def words(base: Path, store: Path, rows: Path, task: str) -> list[str]:
    options = {"base": base, "store": store, "train": rows, "task": task, "name": "acme/tiny"}
    options |= {"rank": 4, "epochs": 2, "batch-size": 8, "learning-rate": 1e-3}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--json"]


def written(folder: Path, task: str) -> Path:
    # 41 training rows in batches of 8: the last batch has one row, so one process has none of its own.
    if task == "classify":
        return write_csv(folder / "rows.csv", ending_rule(46))
    rows = [{"prompt": f"p{i}" * (i % 5), "completion": "abcdef"[: 1 + i % 6]} for i in range(46)]
    return write_jsonl(folder / "rows.jsonl", rows)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "generate"])
def test_two_processes_train_what_one_does(tiny_base: Path, tmp_path: Path, task: str) -> None:
    rows = written(tmp_path, task)
    alone = subprocess.run(
        [sys.executable, "-m", "sera_serve.trainer", *words(tiny_base, tmp_path / "one", rows, task)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    both = launch(words(tiny_base, tmp_path / "two", rows, task))
    assert alone.returncode == 0, alone.stderr
    assert both.returncode == 0, both.stderr
    assert "Warning" not in both.stderr
    # The main process alone prints and publishes.
    (line,) = both.stdout.splitlines()
    results = [json.loads(alone.stdout), json.loads(line)]
    assert results[1]["version"] == 1
    # The same sums in another order: they are near, and not to the last bit.
    assert results[0]["digest"] != results[1]["digest"]
    stores = AdapterStore(tmp_path / "one"), AdapterStore(tmp_path / "two")
    tensors = [store.load(result["digest"]).tensors for store, result in zip(stores, results, strict=True)]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert results[1]["metrics"]["loss"] == pytest.approx(results[0]["metrics"]["loss"], rel=1e-4)
    assert not (tmp_path / "two.training").exists()


FAILING = """
import sys
from transformers import TrainerCallback
from sera_serve.trainer.parallel import join_processes
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings

class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            raise RuntimeError("this process fails")

base, store, train = sys.argv[1:]
settings = TrainSettings(base=base, store=store, train=train, task="classify", name="acme/tiny", rank=4)
train_adapter(settings, callbacks=[Fails()])
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_both(tiny_base: Path, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = launch([str(tiny_base), str(tmp_path / "store"), str(written(tmp_path, "classify"))], script)
    assert done.returncode != 0
    assert "this process fails" in done.stderr
    assert AdapterStore(tmp_path / "store").count_adapters() == 0
