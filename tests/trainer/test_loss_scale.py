"""A float16 base: gradients of adapters do not vanish, overflow is computed again, and runs resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_resume import settings, stopped_run
from torch import Tensor, nn
from trainer_samples import ending_rule, settings_for, write_csv
from transformers import TrainerCallback

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.trainer import loss_scale
from sera_serve.trainer.loss_scale import LARGEST_SCALE, LossScale
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks import TrainingTask
from sera_serve.trainer.together.jobs import train_jobs
from sera_serve.trainer.together.plan import Plan


@pytest.fixture
def half_base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base), dtype="float16")


def parameter(*gradient: float) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(len(gradient)))
    made.grad = torch.tensor(gradient)
    return made


def test_gradients_are_divided_by_the_scale_without_rounding() -> None:
    scale = LossScale()
    scale.scale = 1024.0
    one, other = parameter(1.0, 3e-30), parameter(0.1)
    assert scale.unscale([one, nn.Parameter(torch.zeros(2)), other])
    assert one.grad is not None and other.grad is not None
    assert torch.equal(one.grad, torch.tensor([1.0, 3e-30]) / 1024)
    assert torch.equal(other.grad, torch.tensor([0.1]) / 1024)


@pytest.mark.parametrize("fault", [float("inf"), float("nan")])
def test_an_overflow_halves_the_scale_and_drops_the_gradients(fault: float) -> None:
    scale = LossScale()
    scale.scale = 4.0
    good, bad = parameter(1.0), parameter(1.0, fault)
    assert not scale.unscale([good, bad])
    assert (scale.scale, good.grad, bad.grad) == (2.0, None, None)
    assert not scale.unscale([parameter(fault)])
    # Without a scale it is no overflow of the scale.
    last = parameter(fault)
    assert scale.scale == 1.0 and scale.unscale([last])
    assert last.grad is not None


def test_the_scale_doubles_after_finite_steps_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "STEPS_TO_DOUBLE", 3)
    scale = LossScale()
    scale.scale = LARGEST_SCALE / 2
    seen = []
    for _ in range(7):
        scale.unscale([parameter(1.0)])
        seen.append(scale.scale)
        state = scale.state()
        scale = LossScale()
        scale.load_state(state)
    assert seen == [LARGEST_SCALE / 2] * 2 + [LARGEST_SCALE] * 5


def cosine(one: Tensor, other: Tensor) -> float:
    """In float64, because the gradients here may be very small."""
    one, other = one.flatten().double(), other.flatten().double()
    return float(one @ other / (one.norm() * other.norm()))


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_gradients(base: FrozenBase, folder: Path, factor: float) -> dict[str, Tensor]:
    """Train a step from a head that is scaled by `factor`, which scales the gradients of the adapter."""

    def prepare(task: TrainingTask, settings: TrainSettings) -> list[TrainerCallback]:
        assert task.model.head is not None
        task.model.head.weight.data.mul_(factor)
        return []

    gradients = Gradients()
    rows = write_csv(folder / "rows.csv", ending_rule(8))
    options = settings_for(Path("tiny"), folder, rows, epochs=1, eval_fraction=0, pooling="mean")
    train_adapter(options, base=base, callbacks=[gradients], prepare=prepare)
    return gradients.found


# At 1e-6 all gradients of the states are below the least number of float16. At 1e5 they overflow at the first scale.
@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e5])
def test_gradients_of_a_float16_base_are_those_of_a_float32_base(
    tiny_base: Path, half_base: FrozenBase, tmp_path: Path, factor: float
) -> None:
    full = first_gradients(load_base(str(tiny_base)), tmp_path, factor)
    half = first_gradients(half_base, tmp_path, factor)
    assert full.keys() == half.keys()
    for name in full:
        if name.endswith("sera_b"):
            # Clipping, and a large head, leave the direction.
            assert half[name].norm() > 0
            assert cosine(full[name], half[name]) > 0.98
            if factor < 1:
                assert float(half[name].norm() / full[name].norm()) == pytest.approx(1, rel=0.2)


def test_a_run_over_a_float16_base_resumes(
    half_base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the scale has moved both ways before the stop, and moves after it.
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**30)
    monkeypatch.setattr(loss_scale, "STEPS_TO_DOUBLE", 5)
    undisturbed = train_adapter(settings(tmp_path), base=half_base)
    AdapterStore(tmp_path / "store").delete("acme/tiny")
    stopped_run(settings(tmp_path), half_base, 12)
    resumed = train_adapter(settings(tmp_path), base=half_base)
    assert (resumed.resumed_from, resumed.digest) == (11, undisturbed.digest)


def test_jobs_over_a_float16_base_compute_again_each_for_itself(
    half_base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**30)
    rows = write_csv(tmp_path / "rows.csv", ending_rule(30))
    jobs = [
        settings_for(Path("tiny"), tmp_path, rows, name=f"acme/{name}", seed=seed) for seed, name in enumerate("ab")
    ]
    results = train_jobs(Plan(jobs, 2), base=half_base)
    assert [result.error for result in results] == [None, None]
    for job in jobs:
        store = AdapterStore(job.store)
        together = store.load(store.resolve(job.name).digest).tensors
        alone = train_adapter(job.model_copy(update={"store": tmp_path / "alone"}), base=half_base)
        for name, tensor in AdapterStore(tmp_path / "alone").load(alone.digest).tensors.items():
            assert torch.isfinite(together[name]).all()
            if name.endswith("sera_b"):
                assert cosine(tensor, together[name]) > 0.9
