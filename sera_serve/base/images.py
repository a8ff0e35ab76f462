"""Images: from the bytes of a file to the pixels that a vision model reads. Training and serving use the same code."""

from __future__ import annotations

import binascii
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file

from adapters_store import ImageSpec
from sera_serve.base.image_tower import ImageTower
from sera_serve.errors import ImageTooLarge, InvalidConfiguration, InvalidImage

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
"""File formats that are read. Other decoders of Pillow are never called."""
MAX_PIXELS = 89_000_000
"""The most pixels that any limit may allow: Pillow's own limit against decompression bombs begins above it."""

# Markers of JPEG files that cost more than their bytes: each scan of a progressive image goes over all its blocks, and
# Pillow copies all EXIF data before it for each further segment. A camera's file has some ten of either. The codes of
# pixels have no marker, and in 65,536 bytes of anything else about one pair looks like one.
_COSTLY_MARKERS = {b"\xff\xda": "scans", b"\xff\xe1": "APP1 segments"}
_MAX_MARKERS = 500
# Of images up to so many times longer than their crop, the whole is resized and then cropped, as transformers does it.
_MAX_ASPECT = 16
# Pillow's numbers: 0 is nearest, 3 bicubic.
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic")
_PROCESSORS = {"vit": "ViTImageProcessor", "deit": "DeiTImageProcessor", "clip": "CLIPImageProcessor"}
_MEAN_OF_CLIP = [0.48145466, 0.4578275, 0.40821073]
_STD_OF_CLIP = [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class ImageInput:
    """One image of a request, not decoded.

    Attributes:
        data: The file's bytes, or their base64 text.
        place: What the request calls it, such as `inputs[0].image`.
    """

    data: bytes | str = field(repr=False)
    place: str = "image"

    @property
    def nbytes(self) -> int:
        """Bytes of the file; of base64 text with padding, up to 2 more."""
        return len(self.data) if isinstance(self.data, bytes) else len(self.data) // 4 * 3

    def file(self) -> bytes:
        """The file's bytes. Blocks: 10 MiB of base64 take some 15 ms.

        Raises:
            InvalidImage: The text is no base64.
        """
        if isinstance(self.data, bytes):
            return self.data
        try:
            return binascii.a2b_base64(self.data, strict_mode=True)
        except ValueError as error:
            raise InvalidImage(
                "the image is no base64; send the file's bytes in the standard alphabet, padded, without line breaks"
            ) from error


def check_pillow() -> None:
    """Check that Pillow is installed.

    Raises:
        InvalidConfiguration: It is not.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise InvalidConfiguration(
            "this base takes images, and Pillow is not installed; pip install 'sera-serve[images]'", param="base"
        ) from error


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image file to RGB, 8 bits a channel. Blocks: some 10 ms a megapixel.

    The size is read from the file's header, and checked before any pixel is decoded. An EXIF orientation is applied.
    Alpha is dropped, as Pillow's `convert("RGB")` does. Grey of 16 bits is scaled to 8 bits. Of a JPEG file with
    several images, as some cameras write them, the first is taken.

    Args:
        data: A JPEG, PNG or WebP file.
        max_pixels: The most pixels, width times height.

    Raises:
        InvalidImage: The file is empty, of another format, truncated, damaged, or animated, or it is a JPEG of more
            than 500 scans or APP1 segments (EXIF, XMP).
        ImageTooLarge: It has more pixels than `max_pixels`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise InvalidImage("the image is empty; send a JPEG, PNG or WebP file")
    _check_markers(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_size(opened.size, max_pixels)
            if opened.format != "MPO" and getattr(opened, "is_animated", False):
                raise InvalidImage("the image is animated; send one frame as a JPEG, PNG or WebP file")
            opened.load()
            return _to_rgb(ImageOps.exif_transpose(opened))
    except (InvalidImage, ImageTooLarge):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(f"more than {MAX_PIXELS}", max_pixels) from error
    except UnidentifiedImageError as error:
        raise InvalidImage(
            "the file is no JPEG, PNG or WebP image, or its header is damaged; convert it to one of these formats"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders meet damaged bytes with errors of many types: struct.error, ValueError, SyntaxError, ...
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise InvalidImage(f"the image cannot be decoded: {reason}; send the whole file, undamaged") from error


def to_pixels(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """Resize an RGB image and normalise it: (x / 255 - mean) / std for each channel.

    With `resize` "exact" the image is resized to (height, width), whatever its shape. With "shortest_edge" it is
    resized so that it just covers (height, width), and cropped at the center. The image is resized in 8 bits, as Pillow
    and transformers' image processors do it.

    Args:
        image: RGB, from `decode_image`.
        spec: The size, the filter, and the mean and deviation of each channel.

    Returns:
        float32 (3, height, width).
    """
    from PIL import Image

    resample = Image.Resampling[spec.resample.upper()]
    if spec.resize == "exact":
        resized = image.resize((spec.width, spec.height), resample)
    else:
        resized = _cover(image, spec.height, spec.width, resample)
    scaled = np.asarray(resized, dtype=np.float32) * np.float32(1 / 255)
    normal = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


def base_image_spec(source: str | None, model_type: str, tower: ImageTower) -> ImageSpec:
    """The base's own preprocessing: that of its `preprocessor_config.json`, or else its family's, at the tower's size.

    transformers' processors may resize to one size and crop to a smaller one, as DeiT's does (256, then 224). An
    `ImageSpec` has one size: such a base's own preprocessing becomes "shortest_edge" at the tower's size. A file that
    the hub does not give is taken for one that is not there.

    Args:
        source: A folder or a hub id; None is a model without such a file.
        model_type: As transformers calls the family: vit, deit or clip.
        tower: The image tower.

    Raises:
        InvalidConfiguration: The file is no JSON object, or asks for what no `ImageSpec` has: a filter, a factor, a
            mean, a deviation, or images that are not resized.
    """
    return _spec({} if source is None else _processor_fields(source), model_type, tower)


def save_image_spec(spec: ImageSpec, model_type: str, folder: Path) -> None:
    """Write `preprocessor_config.json`, from which transformers' processors and `base_image_spec` give these pixels.

    transformers resizes the shorter edge to one length. Of an input that is not square, "shortest_edge" has no exact
    form there: its processors then resize the image further, and crop more of it.

    Args:
        spec: The preprocessing.
        model_type: As in `base_image_spec`.
        folder: The folder of the model.
    """
    crops = spec.resize == "shortest_edge"
    sides = {"height": spec.height, "width": spec.width}
    fields = {
        "image_processor_type": _PROCESSORS[model_type],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": max(spec.height, spec.width)} if crops else sides,
        "resample": _RESAMPLING.index(spec.resample),
        "do_center_crop": crops,
        "crop_size": sides,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec.mean,
        "image_std": spec.std,
    }
    (folder / IMAGE_PROCESSOR_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _processor_fields(source: str) -> dict[str, Any]:
    """The fields of the base's image processor, from where transformers reads them; none where it has no such file.

    transformers' own reader has one error for a missing file and for a damaged one.

    Raises:
        InvalidConfiguration: A file is no JSON object.
    """
    # The file of a whole processor comes first, where it has a part for images.
    if isinstance(nested := _json_fields(source, PROCESSOR_NAME).get("image_processor"), dict):
        return nested
    if nested is not None:
        raise _unusable("image_processor is no JSON object; save the processor again", PROCESSOR_NAME)
    return _json_fields(source, IMAGE_PROCESSOR_NAME)


def _json_fields(source: str, name: str) -> dict[str, Any]:
    try:
        path = cached_file(source, name)
    except OSError:
        return {}
    if path is None:
        return {}
    try:
        fields = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise _unusable(
            f"it cannot be read as JSON ({reason}); save the processor again, or remove the file", name
        ) from error
    if not isinstance(fields, dict):
        raise _unusable("it is no JSON object; save the processor again, or remove the file", name)
    return fields


def _spec(found: dict[str, Any], model_type: str, tower: ImageTower) -> ImageSpec:
    is_clip = model_type == "clip"
    # transformers takes null for its default.
    given = {name: value for name, value in found.items() if value is not None}
    if not given.get("do_resize", True):
        raise _unusable("do_resize is false, and images are always resized to the base's size here; make it true")
    size = given.get("size")
    crops = given.get("do_center_crop", is_clip or model_type == "deit")
    by_edge = (isinstance(size, dict) and "shortest_edge" in size) or bool(crops)
    resample = given.get("resample", 2 if model_type == "vit" else 3)
    if type(resample) is not int or resample not in range(len(_RESAMPLING)):
        raise _unusable(f"resample is {resample!r}; take 0 to {len(_RESAMPLING) - 1}, {', '.join(_RESAMPLING)}")
    mean, std = _normalisation(given, is_clip)
    return ImageSpec(
        height=tower.height,
        width=tower.width,
        resize="shortest_edge" if by_edge else "exact",
        resample=cast(Any, _RESAMPLING[resample]),
        mean=mean,
        std=std,
    )


def _normalisation(given: dict[str, Any], is_clip: bool) -> tuple[list[float], list[float]]:
    """The mean and deviation that stand for rescaling and normalising together.

    transformers computes (x * f - mean) / std with the factor f, or the part of it that is switched on. An `ImageSpec`
    has (x / 255 - mean') / std', which is the same with mean' = mean / (255 f) and std' = std / (255 f).

    Raises:
        InvalidConfiguration: A number is missing, not finite, or no divisor.
    """
    mean = _channels(given, "image_mean", _MEAN_OF_CLIP if is_clip else [0.5] * 3)
    std = _channels(given, "image_std", _STD_OF_CLIP if is_clip else [0.5] * 3)
    if not given.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    if not _is_finite(factor) or factor <= 0:
        raise _unusable(f"rescale_factor is {factor!r}; give a number above 0")
    if min(std) <= 0:
        raise _unusable(f"image_std is {std}; give numbers above 0")
    # 255 / 255 is 1 to the last bit, so the usual factor leaves both as they are.
    levels = 255 * factor
    mean, std = ([value / levels if levels else math.inf for value in values] for values in (mean, std))
    if not all(map(_is_finite, mean + std)) or min(std) <= 0:
        raise _unusable(f"rescale_factor is {factor!r}, too small or too large for image_mean and image_std")
    return mean, std


def _channels(given: dict[str, Any], name: str, default: list[float]) -> list[float]:
    """Three numbers of the configuration. transformers takes one number for every channel."""
    value = given.get(name, default)
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(map(_is_finite, values)):
        raise _unusable(f"{name} is {value!r}; give three finite numbers, of red, green and blue")
    return [float(number) for number in values]


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        # An integer that no floating-point number is near.
        return False


def _unusable(reason: str, name: str = IMAGE_PROCESSOR_NAME) -> InvalidConfiguration:
    return InvalidConfiguration(f"{name} of the base: {reason}", param="base")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InvalidImage(f"the image has {width} x {height} pixels; send at least one")
    if width * height > max_pixels:
        raise _too_large(f"{width} x {height}", max_pixels)


def _check_markers(data: bytes) -> None:
    if not data.startswith(b"\xff\xd8"):
        return
    for marker, name in _COSTLY_MARKERS.items():
        count = data.count(marker)
        if count > _MAX_MARKERS:
            raise InvalidImage(
                f"the JPEG file has {count} {name}; at most {_MAX_MARKERS} are read: save it as a baseline JPEG "
                "without metadata"
            )


def _too_large(pixels: str, max_pixels: int) -> ImageTooLarge:
    return ImageTooLarge(f"the image has {pixels} pixels; the limit is {max_pixels} in all: send a smaller one")


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion of 16 bits to 8 cuts every value at 255.
        grey = np.asarray(image).astype(np.int64)
        narrow = np.clip((grey + 128) // 257, 0, 255).astype(np.uint8)
        return Image.fromarray(narrow).convert("RGB")
    if image.mode in ("P", "PA"):
        # Pillow warns of a palette with transparency that is not converted in two steps.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _cover(image: Image.Image, height: int, width: int, resample: Any) -> Image.Image:
    """Resize so that the image just covers (height, width), and crop at the center."""
    if image.height * width <= image.width * height:
        # The height decides. The other side is cut to a whole number, as transformers does it.
        full_height, full_width = height, max(width, int(height * image.width / image.height))
    else:
        full_height, full_width = max(height, int(width * image.height / image.width)), width
    left, top = (full_width - width) // 2, (full_height - height) // 2
    if full_height * full_width <= _MAX_ASPECT * height * width:
        return image.resize((full_width, full_height), resample).crop((left, top, left + width, top + height))
    # The whole of a very long image would be larger than any limit: only the part that remains is resized. A few values
    # differ by 1 of 255 from those of the whole.
    across, down = image.width / full_width, image.height / full_height
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    return image.resize((width, height), resample, box=(left * across, top * down, right, bottom))
