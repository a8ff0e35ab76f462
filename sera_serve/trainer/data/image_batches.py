"""Rows of image tasks as the training loop takes them: pixels made when a row is used, with or without augmentation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from adapters_store import ImageSpec
from sera_serve.base import to_pixels
from sera_serve.trainer.tables.image_files import ImageStore

# The defaults of torchvision's RandomResizedCrop. Its transforms draw from torch's global generator, whose state at a
# row depends on all that was drawn before; so a resumed run would see other crops. Pillow does the work here.
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10


class ImageRows(Sequence[Any]):
    """The rows of an image task. A row is a mapping: `pixel_values` float32 (3, height, width), and the task's fields.

    With augmentation, a row's crop and flip depend on the seed, the epoch and the row alone.
    """

    def __init__(
        self,
        images: ImageStore,
        digests: Sequence[str],
        fields: Sequence[dict[str, Any]],
        spec: ImageSpec,
        augment_seed: int | None = None,
    ) -> None:
        """Describe rows.

        Args:
            images: Has every image.
            digests: The image of each row.
            fields: What a row has beside its pixels.
            spec: The preprocessing.
            augment_seed: Seed of crops and flips; None for rows without them.
        """
        self._images = images
        self._digests = digests
        self.fields = fields
        self._spec = spec
        self._seed = augment_seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.fields)

    def set_epoch(self, epoch: int) -> None:
        """Choose the crops and flips. The training loop calls this at the start of each epoch, from 0."""
        self._epoch = int(epoch)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = self._images.image(self._digests[index])
        if self._seed is not None:
            draw = random.Random(f"augment {self._seed} {self._epoch} {index}")
            image = augmented(image, self._spec, draw)
        return {"pixel_values": torch.from_numpy(to_pixels(image, self._spec)), **self.fields[index]}

    def take(self, indices: Sequence[int]) -> ImageRows:
        """Return some rows as rows of their own, without crops and flips."""
        digests, fields = [self._digests[i] for i in indices], [self.fields[i] for i in indices]
        return ImageRows(self._images, digests, fields, self._spec)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return the pixels of some rows: float32 (rows, 3, height, width)."""
        return torch.stack([self[i]["pixel_values"] for i in indices])


def take_rows(rows: Sequence[Any], indices: Sequence[int]) -> Sequence[Any]:
    """Return some rows of any task, images without crops and flips."""
    return rows.take(indices) if isinstance(rows, ImageRows) else [rows[i] for i in indices]


def augmented(image: Image.Image, spec: ImageSpec, draw: random.Random) -> Image.Image:
    """Cut out a random part, resize it to the size of `spec`, and mirror it every second time.

    The part has 8 to 100 % of the area and an aspect of 3:4 to 4:3 (Szegedy et al. 2014, section 6; the defaults of
    torchvision's RandomResizedCrop).
    """
    resample = Image.Resampling[spec.resample.upper()]
    result = image.resize((spec.width, spec.height), resample, box=random_box(image.width, image.height, draw))
    return ImageOps.mirror(result) if draw.random() < 0.5 else result


def random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """Draw the part of an image that is cut out: (left, top, right, bottom) in pixels."""
    for _ in range(_TRIES):
        area = width * height * draw.uniform(*_AREA)
        aspect = math.exp(draw.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = draw.randint(0, width - across), draw.randint(0, height - down)
            return left, top, left + across, top + down
    # A very long image has no such part: take the middle, as wide or as high as the aspect allows.
    across = min(width, max(1, round(height * _ASPECT[1])))
    down = min(height, max(1, round(width / _ASPECT[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
