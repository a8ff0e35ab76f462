"""What adapters of images cost: 1 and 16 in one batch against the base alone, transformers, and PEFT's ways.

    python -m benchmarks.images [--quick]

A random ViT, 192 wide as DeiT-tiny is, reads 16 JPEG files; every case gives one vector a file. Decoding, resizing and
the forward pass are measured together, on a CPU in float32. Adapters have rank 16 on query and value. Systems run in
processes of their own, one case at a time, interleaved in rounds. The figure is the median, and each ratio the median
of the rounds' ratios. Vectors are compared with the base that has the adapter merged first; no speed is reported where
one is wrong. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import copy
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import ViTConfig, ViTModel

from adapters_store import AdapterBundle, AdapterStore
from benchmarks.last_line import tell
from benchmarks.random_classifiers import RANK, random_classifier
from benchmarks.system_process import System, SystemProcess
from sera_serve.base import FrozenBase, ImageInput, decode_image, freeze_base, merge_adapter, to_pixels
from sera_serve.config import ServeSettings
from sera_serve.engine import Principal, ServingEngine

IMAGES = 16
TARGETS = ("q_proj", "v_proj")
TOLERANCE = 1e-3
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class ViTSetting:
    """What all systems share: the shape of the ViT."""

    layers: int
    image_size: int
    width: int = 192

    def base(self) -> FrozenBase:
        """A ViT with random weights."""
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=3,
            intermediate_size=4 * self.width,
            image_size=self.image_size,
            patch_size=16,
            initializer_range=0.05,
        )
        return freeze_base(ViTModel(config, add_pooling_layer=False), None, "random-vit", "vision")

    def files(self) -> list[bytes]:
        """JPEG files of smooth noise, one and a half times as large as the base's images."""
        side, generator = self.image_size * 3 // 2, np.random.default_rng(0)
        files = []
        for _ in range(IMAGES):
            small = Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((side, side)).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        return files


def adapter(base: FrozenBase, seed: int) -> AdapterBundle:
    """A classifier of images with factors large enough to be seen in the vectors."""
    return random_classifier(base, seed, ["no", "yes"], TARGETS, "cls", deviation=1 / 8)


def pixels(base: FrozenBase, files: list[bytes]) -> torch.Tensor:
    """The files, decoded as the server does it."""
    assert base.image_spec is not None
    return torch.from_numpy(np.stack([to_pixels(decode_image(data), base.image_spec) for data in files]))


def timed(cases: dict[str, Callable[[], Vectors]], close: Callable[[], None] = lambda: None) -> System:
    """A system whose cases give their vectors, and their seconds."""

    def run(case: Callable[[], Vectors]) -> tuple[Vectors, float]:
        start = time.perf_counter()
        vectors = case()
        return vectors, time.perf_counter() - start

    return System({name: partial(run, case) for name, case in cases.items()}, close)


def served(setting: ViTSetting) -> System:
    """The engine: 16 requests of one image each, to the base, to one adapter, and to 16."""
    base = setting.base()
    tower = base.image_tower
    assert tower is not None
    folder = TemporaryDirectory()
    store = AdapterStore(Path(folder.name) / "store")
    names = [f"bench/a{seed}" for seed in range(IMAGES)]
    for seed, name in enumerate(names):
        store.publish(adapter(base, seed), name)
    settings = ServeSettings(
        store=store.root, pool_mib=64, max_batch_tokens=IMAGES * tower.tokens, classify_max_batch=IMAGES
    )
    engine = ServingEngine(base, store, settings)
    engine.start()
    images = [ImageInput(data) for data in setting.files()]

    def run(adapters: list[str | None]) -> Vectors:
        async def all_of_them() -> Vectors:
            # Each request is of a tenant of its own, so that both decoding threads work.
            calls = (
                engine.embed(adapter, [image], Principal(f"t{index}"), normalize=False)
                for index, (adapter, image) in enumerate(zip(adapters, images, strict=True))
            )
            return np.stack([result.vectors[0] for result in await asyncio.gather(*calls)])

        return asyncio.run(all_of_them())

    def close() -> None:
        engine.stop()
        folder.cleanup()

    cases: dict[str, list[str | None]] = {"base": [None], "sera_1": [names[0]], "sera_16": [*names]}
    return timed({name: partial(run, used * (IMAGES // len(used))) for name, used in cases.items()}, close)


def plain(setting: ViTSetting) -> System:
    """transformers' own model on one batch, and what it gives with one adapter merged."""
    base = setting.base()
    files = setting.files()

    @torch.inference_mode()
    def run(model: FrozenBase) -> Vectors:
        vectors: Vectors = model.model(pixel_values=pixels(base, files)).last_hidden_state[:, 0].numpy()
        return vectors

    def merged(seed: int) -> Vectors:
        one = replace(base, model=copy.deepcopy(base.model))
        merge_adapter(one, adapter(base, seed))
        return run(one)

    return timed(
        {"transformers": partial(run, base), **{f"merged_{seed}": partial(merged, seed) for seed in (0, 7, 15)}}
    )


def peft(setting: ViTSetting) -> System:
    """16 LoRA adapters of the same rank and targets: PEFT's mixed batch, and one adapter at a time."""
    base = setting.base()
    files = setting.files()
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[*TARGETS], init_lora_weights=False)
    names = [f"a{index}" for index in range(IMAGES)]
    model = get_peft_model(base.share_weights().model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()

    @torch.inference_mode()
    def mixed() -> Vectors:
        states = model(pixel_values=pixels(base, files), adapter_names=names).last_hidden_state
        vectors: Vectors = states[:, 0].numpy()
        return vectors

    @torch.inference_mode()
    def swap() -> Vectors:
        rows = []
        for name, data in zip(names, files, strict=True):
            model.set_adapter(name)
            rows.append(model(pixel_values=pixels(base, [data])).last_hidden_state[0, 0].numpy())
        return np.stack(rows)

    return timed({"peft_mixed_16": mixed, "peft_swap_16": swap})


SYSTEM_OF: dict[str, Callable[[ViTSetting], System]] = {
    "base": served,
    "sera_1": served,
    "sera_16": served,
    "transformers": plain,
    "peft_mixed_16": peft,
    "peft_swap_16": peft,
}


def check(run: Callable[[str], tuple[Vectors, float]]) -> list[str]:
    """Cases whose vectors are not those of the base, or of the base with the adapter merged."""
    got = {case: run(case)[0] for case in SYSTEM_OF}
    wrong = [] if np.allclose(got["base"], got["transformers"], atol=TOLERANCE) else ["base"]
    for seed in (0, 7, 15):
        want = run(f"merged_{seed}")[0]
        if not np.allclose(got["sera_16"][seed], want[seed], atol=TOLERANCE):
            wrong.append(f"sera_16, adapter {seed}")
        if seed == 0 and not np.allclose(got["sera_1"], want, atol=TOLERANCE):
            wrong.append("sera_1")
    if np.allclose(got["sera_16"], got["base"], atol=10 * TOLERANCE):
        wrong.append("the adapters change nothing")
    return wrong


def main(
    quick: Annotated[bool, typer.Option(help="Two layers, images of 64 x 64, two rounds: half a minute.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 9,
) -> None:
    """Measure, print a table, then one JSON line."""
    console = Console(stderr=True)
    setting = ViTSetting(2, 64) if quick else ViTSetting(12, 224)
    systems = {system: SystemProcess(system, setting) for system in dict.fromkeys(SYSTEM_OF.values())}

    def run(case: str) -> tuple[Vectors, float]:
        vectors, seconds = systems[SYSTEM_OF.get(case, plain)].run(case)
        return vectors, seconds

    try:
        # Also the warm-up.
        wrong = check(run)
        seconds: dict[str, list[float]] = {case: [] for case in SYSTEM_OF}
        for _ in track(range(0 if wrong else 2 if quick else rounds), "rounds", console=console):
            for case, times in seconds.items():
                times.append(run(case)[1])
    finally:
        for system in systems.values():
            system.close()
    rows: list[dict[str, Any]] = []
    table = Table("case", "images/s", "ratio to base")
    for case, times in seconds.items() if not wrong else ():
        ratio = statistics.median(base / own for own, base in zip(times, seconds["base"], strict=True))
        rows.append(
            {
                "case": case,
                "images_per_s": round(IMAGES / statistics.median(times), 1),
                "ratio_to_base": round(ratio, 3),
            }
        )
        table.add_row(case, f"{rows[-1]['images_per_s']}", f"{ratio:.3f}")
    console.print(f"wrong: {', '.join(wrong)}; no speed is reported" if wrong else table)
    shape = {"width": setting.width, "layers": setting.layers, "image_size": setting.image_size}
    tell("images", rows, correct=not wrong, **shape)


if __name__ == "__main__":
    typer.run(main)
