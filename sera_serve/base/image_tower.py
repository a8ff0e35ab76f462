"""The image tower of a base: how large its images are, and which tokens it makes of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sera_serve.errors import InvalidConfiguration, InvalidRequest

BaseKind = Literal["decoder", "encoder", "vision", "dual"]
"""What a base is: a decoder generates and classifies; an encoder classifies; vision is an image tower, such as ViT's;
dual has an image and a text tower that embed into one space, such as CLIP's."""
VISION_FAMILIES = ("vit", "deit")
DUAL_FAMILIES = ("clip",)
# Tokens before those of the patches: the class token, and DeiT's token of distillation.
_PREFIX_TOKENS = {"vit": 1, "deit": 2, "clip": 1}


@dataclass(frozen=True)
class ImageTower:
    """The shape of a vision transformer.

    Attributes:
        height, width: Pixels of its images.
        tokens: Tokens of one image.
        prefix_tokens: Those of them that come before the patches.
        hidden_size: Width of its states.
    """

    height: int
    width: int
    tokens: int
    prefix_tokens: int
    hidden_size: int


def image_tower(config: Any) -> ImageTower | None:
    """Read the image tower of a model's configuration; None for a base that takes no images.

    Raises:
        InvalidConfiguration: Its images do not have three channels. Every image is read as RGB.
    """
    family = config.model_type
    if family not in _PREFIX_TOKENS:
        return None
    vision = config.vision_config if family in DUAL_FAMILIES else config
    channels = getattr(vision, "num_channels", 3)
    if channels != 3:
        raise InvalidConfiguration(
            f"the base reads images of {channels} channels (num_channels), and images are read as red, green and blue; "
            "take a base of three channels",
            param="base",
        )
    height, width = _pair(vision.image_size)
    patch_height, patch_width = _pair(vision.patch_size)
    prefix = _PREFIX_TOKENS[family]
    return ImageTower(
        height=height,
        width=width,
        tokens=(height // patch_height) * (width // patch_width) + prefix,
        prefix_tokens=prefix,
        hidden_size=int(vision.hidden_size),
    )


def hidden_size_of(config: Any) -> int:
    """Width of the states that a classifier's head reads: of a dual base, those of its image tower."""
    tower = image_tower(config)
    return int(config.get_text_config().hidden_size) if tower is None else tower.hidden_size


def pool_image_states(states: Tensor, pooling: str, prefix_tokens: int) -> Tensor:
    """Reduce an image tower's states (rows, tokens, hidden) to (rows, hidden).

    Args:
        states: The states of all tokens.
        pooling: "cls" is the first token, "mean" the mean over the tokens of patches.
        prefix_tokens: Tokens before those of the patches.

    Raises:
        InvalidRequest: Another pooling.
    """
    if pooling == "cls":
        return states[:, 0]
    if pooling == "mean":
        return states[:, prefix_tokens:].mean(1)
    raise InvalidRequest(f"pooling {pooling!r} is not for images; use cls or mean", param="pooling")


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
