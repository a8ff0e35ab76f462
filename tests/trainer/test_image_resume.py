"""A run on images with augmentation that stopped, goes on to the very tensors of one that did not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from image_samples import captioned_images, image_folder, image_settings

from adapters_store import AdapterStore
from sera_serve.trainer import loop
from sera_serve.trainer.data.image_batches import ImageRows
from sera_serve.trainer.run import train_adapter
from support.vision import random_clip

pytestmark = pytest.mark.slow

set_epoch = ImageRows.set_epoch


class Stopped(RuntimeError):
    """Stands in for a kill."""


# 26 or 28 rows by 8: 4 steps an epoch.
@pytest.mark.parametrize(("task", "step"), [("image-classify", 6), ("retrieve", 2)])
def test_a_stopped_run_with_augmentation_ends_as_an_unbroken_one(task: str, step: int, tmp_path: Path) -> None:
    base = random_clip()
    train = image_folder(tmp_path / "rows", 14) if task == "image-classify" else captioned_images(tmp_path / "p", 14)
    options = {"task": task, "augment": True, "dropout": 0.1, "eval_fraction": 0}

    def run(folder: str, **more: Any) -> dict[str, torch.Tensor]:
        settings = image_settings(tmp_path / folder, train, **options, **more)
        tensors: dict[str, torch.Tensor] = (
            AdapterStore(settings.store).load(train_adapter(settings, base=base).digest).tensors
        )
        return tensors

    seen: set[int] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageRows, "set_epoch", lambda rows, epoch: (seen.add(epoch), set_epoch(rows, epoch)))
        expected = run("unbroken")
    assert seen == {0, 1}
    original = loop.SaveByTheClock.on_step_end
    with pytest.MonkeyPatch.context() as patch:

        def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == step:
                raise Stopped
            return original(self, args, state, control, **kwargs)

        patch.setattr(loop.SaveByTheClock, "on_step_end", stopping)
        with pytest.raises(Stopped):
            run("stopped", checkpoint_seconds=0)
    torch.manual_seed(99)
    found = run("stopped")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
