"""Training on a quantized base, and with checkpointed activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_samples import ending_rule, settings_for, write_csv

from adapters_store import AdapterStore
from sera_serve.base import load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.heads import HeadModel
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.together.jobs import train_jobs
from sera_serve.trainer.together.plan import Plan

pytestmark = pytest.mark.slow


def settings(base: Path, folder: Path, **options: Any) -> TrainSettings:
    rows = write_csv(folder / "rows.csv", ending_rule(40))
    return settings_for(base, folder, rows, **({"epochs": 2, "learning_rate": 1e-2} | options))


def tensors(result: TrainResult) -> dict[str, Tensor]:
    return AdapterStore(Path(result.store)).load(result.digest).tensors


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_an_adapter_learns_on_a_quantized_base(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    result = train_adapter(settings(tiny_base, tmp_path, quantize=kind, epochs=8))
    assert result.metrics["loss"] < 0.2
    config = AdapterStore(tmp_path / "store").config(result.digest)
    # Of the base itself, so that the adapter runs on it too.
    assert config.base == load_base(str(tiny_base)).info
    assert config.training["settings"]["quantize"] == kind


def test_jobs_on_a_quantized_base(tiny_base: Path, tmp_path: Path) -> None:
    shared = {"quantize": "int8", "checkpoint_activations": True}
    jobs = [settings(tiny_base, tmp_path, name=f"acme/{i}", seed=i, **shared) for i in range(2)]
    results = train_jobs(Plan(jobs, 8))
    for job, result in zip(jobs, results, strict=True):
        alone = train_adapter(job.model_copy(update={"store": tmp_path / "alone"}))
        assert result.error is None
        assert (result.result or {})["metrics"] == pytest.approx(alone.metrics, rel=1e-3, abs=1e-4)


def test_the_loaded_base_must_be_what_the_settings_say(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="quantize is nf4, and the loaded base is quantized to none"):
        train_adapter(settings(tiny_base, tmp_path, quantize="nf4"), base=load_base(str(tiny_base)))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_checkpointed_activations_change_nothing_but_memory(
    kind: str, tiny_base: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_base if kind == "decoder" else tiny_encoder
    base = load_base(str(folder))
    kept: list[int] = []
    original = HeadModel.forward

    def counting(self: HeadModel, *arguments: Any, **options: Any) -> Any:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        # A checkpointed block has hooks of its own, and keeps its input.
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = original(self, *arguments, **options)
        kept[-1] = max(kept[-1], sum(sizes.values()))
        return result

    monkeypatch.setattr(HeadModel, "forward", counting)
    found = []
    for chosen in (False, True):
        kept.append(0)
        options = settings(folder, tmp_path, dropout=0.2, checkpoint_activations=chosen)
        found.append(tensors(train_adapter(options, base=base)))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])
    assert kept[1] < 0.5 * kept[0]
