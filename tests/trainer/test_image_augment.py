"""Crops and flips: within the image, spread as they should be, and the same for the same seed, epoch and row."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from image_samples import image_folder, image_settings
from PIL import Image

from adapters_store import ImageSpec
from sera_serve.base import to_pixels
from sera_serve.trainer.data.image_batches import ImageRows, augmented, random_box
from sera_serve.trainer.data.images import load_image_classify_data
from support.vision import picture

SPEC = ImageSpec(height=16, width=16, resize="exact", resample="bilinear", mean=[0.5] * 3, std=[0.5] * 3)


@pytest.mark.parametrize("size", [(64, 64), (500, 20), (20, 500), (1, 1), (3, 1), (1000, 1)])
def test_boxes_lie_in_the_image(size: tuple[int, int]) -> None:
    draw = random.Random(0)
    for _ in range(300):
        left, top, right, bottom = random_box(*size, draw)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_boxes_have_the_areas_and_aspects_of_the_rule() -> None:
    draw = random.Random(1)
    boxes = np.array([random_box(400, 400, draw) for _ in range(4000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, aspects = across * down / 400**2, across / down
    assert areas.min() == pytest.approx(0.08, abs=0.01)
    assert areas.max() > 0.9
    # A box of area s fits with the probability min(1, -ln(s) / ln(4/3)); those that do not are drawn again.
    s = np.linspace(0.08, 1, 100_000)
    fits = np.minimum(1, -np.log(s) / np.log(4 / 3))
    assert areas.mean() == pytest.approx((s * fits).sum() / fits.sum(), abs=0.01)
    assert (aspects.min(), aspects.max()) == (pytest.approx(0.75, abs=0.03), pytest.approx(1.333, abs=0.03))
    assert np.log(aspects).mean() == pytest.approx(0, abs=0.02)
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    assert middle.mean() == pytest.approx(200, abs=5)


def test_half_of_the_images_are_mirrored() -> None:
    slope = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1))).convert("RGB")
    mirrored = 0
    for i in range(400):
        pixels = np.asarray(augmented(slope, SPEC, random.Random(i)))[:, :, 0].astype(int)
        assert pixels.shape == (16, 16)
        mirrored += pixels[0, 0] > pixels[0, -1]
    assert mirrored == pytest.approx(200, abs=40)


def test_rows_depend_on_seed_epoch_and_place_alone(tmp_path: Path) -> None:
    settings = image_settings(tmp_path, image_folder(tmp_path / "rows", 4), eval_fraction=0)
    data = load_image_classify_data(settings)
    fields = [{"labels": 0}] * len(data.train)

    def pixels(seed: int | None, epoch: int, index: int) -> torch.Tensor:
        rows = ImageRows(data.images, [row.image for row in data.train], fields, SPEC, seed)
        rows.set_epoch(epoch)
        torch.rand(index + 1)
        found: torch.Tensor = rows[index]["pixel_values"]
        return found

    assert torch.equal(pixels(1, 2, 3), pixels(1, 2, 3))
    assert not torch.equal(pixels(1, 2, 3), pixels(1, 3, 3))
    assert not torch.equal(pixels(1, 2, 3), pixels(2, 2, 3))
    assert torch.equal(pixels(None, 0, 3), pixels(None, 1, 3))
    assert pixels(None, 0, 3).shape == (3, 16, 16)


def test_an_augmented_image_is_only_normalised_afterwards() -> None:
    image = picture(3)
    spec = SPEC.model_copy(update={"resize": "shortest_edge"})
    ready = augmented(image, spec, random.Random(0))
    expected = (np.asarray(ready, np.float32) / 255 - 0.5) / 0.5
    assert np.abs(to_pixels(ready, spec) - expected.transpose(2, 0, 1)).max() < 1e-6
