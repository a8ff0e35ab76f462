"""Pre-train a small ViT, and a small CLIP, in minutes on two cores: bases to try image adapters on.

    python examples/pretrain_small_images.py vit --data ../shared/data/images --out /tmp/small-vit
    python examples/pretrain_small_images.py clip --data ../shared/data/images --out /tmp/small-clip

`vit` learns the ten classes of a part of CIFAR-10 (4,000 images). `clip` learns CIFAR-10 with captions made of the
class names, and the captions of the first 300 photographs of a part of Flickr8k. Both are saved as transformers saves
them, with a preprocessor_config.json and, for CLIP, a tokenizer. They are for plumbing: such small models know little.
"""

import csv
import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

from adapters_store import ImageSpec
from sera_serve.base import to_pixels
from sera_serve.trainer.tables.image_files import ImageStore, ZipSource
from sera_serve.trainer.tables.image_folder import read_image_folder

CLIP_PHOTOGRAPHS = 300
_HALF = [0.5, 0.5, 0.5]
_TEMPLATES = ("a photo of a {}", "a picture of a {} .", "a small {}", "there is a {} here", "one {} .", "a {}")
_BATCH = 64
app = typer.Typer(add_completion=False)


def spec(side: int) -> ImageSpec:
    return ImageSpec(height=side, width=side, resize="exact", resample="bicubic", mean=_HALF, std=_HALF)


def cifar(data: Path, side: int, split: str) -> tuple[Tensor, list[str]]:
    """Pixels float32 (images, 3, side, side), and the class of each image."""
    path = data / "cifar10.zip"
    source, store = ZipSource(path), ImageStore()
    rows = read_image_folder(source, path).splits[split]
    pixels = [to_pixels(store.image(store.add(source, name)), spec(side)) for name, _ in rows]
    return torch.from_numpy(np.stack(pixels)), [label for _, label in rows]


def shifted(pixels: Tensor, draw: torch.Generator, reach: int) -> Tensor:
    """Mirror half of the images, and move each by up to `reach` pixels in both directions."""
    mirrored = torch.rand(len(pixels), generator=draw) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    moves = torch.randint(-reach, reach + 1, (len(pixels), 2), generator=draw).tolist()
    return torch.stack(
        [image.roll((down, across), (1, 2)) for image, (down, across) in zip(pixels, moves, strict=True)]
    )


def train(model: torch.nn.Module, batches: Any, steps: int, rate: float, name: str) -> None:
    """Train with AdamW and a one-cycle schedule; `batches` yields the keyword arguments of `model`."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[t]}")
    model.train()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps, t="")
        for _, batch in zip(range(steps), batches, strict=False):
            loss = model(**batch).loss
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            bar.update(task, advance=1, t=f"loss {loss.detach():.3f}")
    model.eval()


def save_preprocessing(folder: Path, kind: str, side: int) -> None:
    """Write preprocessor_config.json as transformers' processors do, none of which is needed to write it."""
    config = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _HALF,
        "image_std": _HALF,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2))


@app.command()
def vit(
    out: Annotated[Path, typer.Option(help="Folder of the model.")],
    data: Annotated[Path, typer.Option(help="Folder with cifar10.zip.", exists=True, file_okay=False)] = Path(
        "../shared/data/images"
    ),
    epochs: Annotated[int, typer.Option(help="Passes over the 4,000 images.")] = 30,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
) -> None:
    """Pre-train a ViT of 0.6 million parameters: 32 x 32 pixels, 8 x 8 a patch, 128 wide, 4 layers."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    pixels, names = cifar(data, 32, "train")
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.1,
        num_labels=len(classes),
    )
    model = ViTForImageClassification(config)

    def batches() -> Any:
        while True:
            order = torch.randperm(len(pixels), generator=draw)
            for chosen in order.split(_BATCH):
                yield {"pixel_values": shifted(pixels[chosen], draw, 3), "labels": labels[chosen]}

    train(model, batches(), epochs * -(-len(pixels) // _BATCH), 2e-3, "ViT")
    test_pixels, test_names = cifar(data, 32, "test")
    with torch.no_grad():
        found = torch.cat([model(pixel_values=part).logits.argmax(1) for part in test_pixels.split(250)])
    right = sum(classes[i] == name for i, name in zip(found.tolist(), test_names, strict=True)) / len(test_names)
    model.base_model.save_pretrained(out)
    save_preprocessing(out, "ViTImageProcessor", 32)
    print(json.dumps({"base": str(out), "test_accuracy": right, "test_images": len(test_names)}))


def caption_tokenizer(captions: list[str], length: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of 1,024 tokens, lower case; the end token closes a text and pads it, as CLIP's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<unk>", "<mask>", "<unused>", start, end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ends = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end, model_max_length=length
    )


def photographs(data: Path) -> list[tuple[str, list[str]]]:
    """The photographs of Flickr8k by name, with their captions, in the order of captions.csv."""
    captions: dict[str, list[str]] = {}
    with (data / "flickr8k_1k" / "captions.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return list(captions.items())


@app.command()
def clip(
    out: Annotated[Path, typer.Option(help="Folder of the model.")],
    data: Annotated[
        Path, typer.Option(help="Folder with cifar10.zip and flickr8k_1k.", exists=True, file_okay=False)
    ] = Path("../shared/data/images"),
    epochs: Annotated[int, typer.Option(help="Passes over the images, one caption each.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
) -> None:
    """Pre-train a CLIP of 1.2 million parameters: 64 x 64 pixels, 16 x 16 a patch, 128 wide, 4 and 3 layers."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    draw, draw_text = torch.Generator().manual_seed(0), random.Random(0)
    pixels, names = cifar(data, 64, "train")
    texts = [[template.format(name) for template in _TEMPLATES] for name in names]
    path = data / "flickr8k_1k" / "images.zip"
    source, store, chosen = ZipSource(path), ImageStore(), photographs(data)[:CLIP_PHOTOGRAPHS]
    photos = [to_pixels(store.image(store.add(source, name)), spec(64)) for name, _ in chosen]
    # Each photograph four times an epoch, so that they are not lost among the images of CIFAR-10.
    pixels = torch.cat([pixels, *[torch.from_numpy(np.stack(photos))] * 4])
    texts += [captions for _, captions in chosen] * 4
    tokenizer = caption_tokenizer([caption for captions in texts for caption in captions], 48)
    shape = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"num_hidden_layers": 3, "max_position_embeddings": 48, "vocab_size": len(tokenizer), **shape, **ids}
    vision = {"num_hidden_layers": 4, "image_size": 64, "patch_size": 16, **shape}
    model = CLIPModel(CLIPConfig(text_config=text | {"pad_token_id": 0}, vision_config=vision, projection_dim=64))

    def batches() -> Any:
        while True:
            order = torch.randperm(len(pixels), generator=draw)
            for rows in order.split(_BATCH):
                captions = [draw_text.choice(texts[i]) for i in rows.tolist()]
                tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
                yield {
                    "pixel_values": shifted(pixels[rows], draw, 4),
                    "input_ids": tokens["input_ids"],
                    "attention_mask": tokens["attention_mask"],
                    "return_loss": True,
                }

    train(model, batches(), epochs * -(-len(pixels) // _BATCH), 1e-3, "CLIP")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_preprocessing(out, "CLIPImageProcessor", 64)
    print(json.dumps({"base": str(out), "vocabulary": len(tokenizer), "photographs": len(chosen)}))


if __name__ == "__main__":
    app()
