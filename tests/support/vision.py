"""Bases that take images, with random weights, and image files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import processors
from transformers import CLIPConfig, CLIPModel, DeiTConfig, DeiTModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

from adapters_store import AdapterBundle, AdapterConfig, ImageSpec
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, decode_image, freeze_base, to_pixels
from support.factories import byte_tokenizer, random_adapter

IMAGE_SIZE = 32
_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}


def random_vit(seed: int = 0) -> FrozenBase:
    """Make a ViT with random weights: 17 tokens an image."""
    torch.manual_seed(seed)
    model = ViTModel(ViTConfig(**_TOWER, initializer_range=0.2), add_pooling_layer=False)
    return freeze_base(model, None, "random-vit", "vision")


def random_deit(seed: int = 0) -> FrozenBase:
    """Make a DeiT with random weights: 18 tokens an image."""
    torch.manual_seed(seed)
    model = DeiTModel(DeiTConfig(**_TOWER, initializer_range=0.2), add_pooling_layer=False)
    return freeze_base(model, None, "random-deit", "vision")


def random_clip(seed: int = 0) -> FrozenBase:
    """Make a CLIP with random weights: an image tower 64 wide, a text tower 48 wide, a space of 32 dimensions."""
    torch.manual_seed(seed)
    text = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 259,
        "max_position_embeddings": 40,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=_TOWER, projection_dim=32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return freeze_base(model, clip_tokenizer(), "random-clip", "dual")


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer of one token a byte, which puts <bos> before a text and <eos> after it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    tokenizer.model_max_length = 40
    return tokenizer


def picture(seed: int = 0, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Make a picture of a few smooth random colours."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def image_file(image: Image.Image | int = 0, file_format: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of a file with the image; an integer is the seed of a random picture."""
    buffer = io.BytesIO()
    (picture(image) if isinstance(image, int) else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def image_classifier(
    base: FrozenBase, config: SeraConfig, seed: int, labels: list[str], pooling: str = "cls", **spec: Any
) -> AdapterBundle:
    """Make a classifier of images with random weights; `spec` are fields of its `ImageSpec` other than the base's."""
    update = random_adapter(base, config, seed, strength=0.5)
    generator = torch.Generator().manual_seed(seed)
    head = {
        "head.weight": torch.randn(len(labels), base.hidden_size, generator=generator) / 4,
        "head.bias": torch.randn(len(labels), generator=generator),
    }
    fields: dict[str, Any] = {
        "task": "image-classify",
        "method": "sera",
        "base": base.info,
        # An adapter of a dual base's image tower alone.
        "modules": {path: part for path, part in update.config.modules.items() if not path.startswith("text_")},
        "labels": labels,
        "pooling": pooling,
        "image": ImageSpec(**{**dict(spec_of(base)), **spec}),
    }
    adapter = AdapterConfig(**fields)
    tensors = {name: update.tensors[name] for name in update.tensors if name.rpartition(".")[0] in adapter.modules}
    return AdapterBundle(adapter, tensors | head)


def retriever(base: FrozenBase, config: SeraConfig, seed: int, max_length: int = 24) -> AdapterBundle:
    """Make an adapter of retrieval for both towers, with random weights."""
    update = random_adapter(base, config, seed, strength=0.5)
    adapter = AdapterConfig(
        task="retrieve",
        method="sera",
        base=base.info,
        modules=update.config.modules,
        max_length=max_length,
        image=spec_of(base),
    )
    return AdapterBundle(adapter, update.tensors)


def spec_of(base: FrozenBase) -> ImageSpec:
    """The base's own preprocessing."""
    assert base.image_spec is not None
    return base.image_spec


def pixels_of(data: bytes, spec: ImageSpec) -> torch.Tensor:
    """The pixels (1, 3, height, width) of one image file."""
    return torch.from_numpy(to_pixels(decode_image(data), spec))[None]
