"""Small images with a rule to learn, as files, and small bases that read them."""

from __future__ import annotations

import csv
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sera_serve.trainer.settings import TrainSettings
from support.vision import image_file

COLOURS = {"blue": (40, 60, 200), "red": (200, 50, 40)}


def colour_image(colour: str, seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A noisy image of one colour, as a PNG file."""
    noise = np.random.default_rng(seed).normal(0, 30, (size[1], size[0], 3))
    pixels = np.clip(np.asarray(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    return image_file(Image.fromarray(pixels))


def image_folder(root: Path, per_label: int = 12, splits: tuple[str, ...] = ()) -> Path:
    """Write an image folder, label/file or split/label/file; the label is the colour."""
    for part, split in enumerate(splits or ("",)):
        for label in COLOURS:
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(per_label):
                seed = 1000 * part + 2 * i + (label == "red")
                (folder / f"{i}.png").write_bytes(colour_image(label, seed))
    return root


def zipped(folder: Path, target: Path) -> Path:
    """Zip a folder's files."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder.parent))
    return target


def captioned_images(folder: Path, count: int = 16, captions: int = 2) -> Path:
    """Write images of four colours, and a CSV file of captions that name the colour."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    shades = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for i in range(count):
            name, shade = draw.choice(list(shades.items()))
            noise = np.random.default_rng(i).normal(0, 20, (24, 24, 3))
            pixels = np.clip(np.asarray(shade) + noise, 0, 255).astype(np.uint8)
            (folder / f"{i}.png").write_bytes(image_file(Image.fromarray(pixels)))
            rows.writerows([f"{i}.png", f"a {name} wall {'by day' if k else 'at night'} {k}"] for k in range(captions))
    return folder / "captions.csv"


def image_settings(folder: Path, train: Path, **options: Any) -> TrainSettings:
    """Small settings of an image task."""
    defaults: dict[str, Any] = {
        "base": "random",
        "store": folder / "store",
        "name": "acme/eyes",
        "task": "image-classify",
        "train": train,
        "batch_size": 8,
        "epochs": 2,
    }
    if options.get("method") != "head-only":
        defaults["rank"] = 4
    return TrainSettings(**(defaults | options))
