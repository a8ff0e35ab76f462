"""Image files: what is read, what is refused, and pixels against transformers' own processors."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from adapters_store import ImageSpec
from sera_serve.base.images import decode_image, to_pixels
from sera_serve.errors import ImageTooLarge, InvalidImage
from support.vision import image_file, picture


def spec(resize: str = "exact", size: tuple[int, int] = (32, 32), resample: str = "bicubic") -> ImageSpec:
    return ImageSpec(
        height=size[0],
        width=size[1],
        resize=resize,  # type: ignore[arg-type]
        resample=resample,  # type: ignore[arg-type]
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.4],
    )


@pytest.mark.parametrize("shape", [(48, 40), (40, 48), (32, 32), (20, 9), (300, 33)])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_those_of_transformers_processors(shape: tuple[int, int], file_format: str) -> None:
    data = image_file(picture(3, *shape), file_format)
    image = decode_image(data)
    reference = Image.open(io.BytesIO(data)).convert("RGB")
    common = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}
    vit = ViTImageProcessorPil(size={"height": 32, "width": 32}, **common)
    expected = vit(reference, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(to_pixels(image, spec()), expected, atol=2e-6)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **common)
    expected = clip(reference, return_tensors="np")["pixel_values"][0]
    pixels = to_pixels(image, spec("shortest_edge"))
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, atol=2e-6)


def test_a_long_image_costs_no_more_than_its_middle() -> None:
    # Resized whole, it would have 32 x 3,200,000 pixels.
    long = Image.new("RGB", (100_000, 1), (10, 20, 30))
    pixels = to_pixels(long, spec("shortest_edge"))
    assert pixels.shape == (3, 32, 32)
    assert np.ptp(pixels[0]) < 1e-6


def test_the_orientation_of_a_photograph_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(image_file(picture(1, 48, 40), "JPEG", exif=exif, quality=95))
    assert turned.size == (40, 48)
    plain = decode_image(image_file(picture(1, 48, 40), "JPEG", quality=95))
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(plain.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_kind_of_colour_becomes_rgb(mode: str) -> None:
    original = picture(2).convert(mode)
    data = image_file(original, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 95} if mode == "CMYK" else {}))
    image = decode_image(data)
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(original.convert("RGB")).astype(int))
    assert difference.mean() < 3


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    original = picture(2).quantize(16)
    data = image_file(original, transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(original.convert("RGB")))


def test_grey_of_16_bits_is_scaled_and_not_cut() -> None:
    wide = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    image = decode_image(image_file(Image.fromarray(wide)))
    expected = np.round(wide / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image)[..., 1], expected)
    assert 100 < np.asarray(image).mean() < 150


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header promises width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [3000, 12_000, 100_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    with pytest.raises(ImageTooLarge, match="the limit is 4000000") as refusal:
        decode_image(bomb(side, side), max_pixels=4_000_000)
    assert refusal.value.code == "image_too_large"


def test_the_limit_is_the_most_that_is_read() -> None:
    data = image_file(picture(0, 50, 40))
    assert decode_image(data, max_pixels=2000).size == (50, 40)
    with pytest.raises(ImageTooLarge, match="50 x 40 pixels; the limit is 1999"):
        decode_image(data, max_pixels=1999)


def with_scans(repeats: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more: some 250 KiB cost seconds at 4096 x 4096 pixels."""
    data = image_file(picture(0), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (1 + repeats) + data[-2:]


def with_metadata(segments: int) -> bytes:
    """A JPEG with so many segments of EXIF data."""
    data = image_file(picture(0), "JPEG")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0"
    return data[:2] + (b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif) * segments + data[2:]


@pytest.mark.parametrize(("make", "name"), [(with_scans, "scans"), (with_metadata, "APP1 segments")])
def test_a_jpeg_that_costs_more_than_its_bytes_is_refused(make: Callable[[int], bytes], name: str) -> None:
    size = decode_image(image_file(picture(0), "JPEG")).size
    assert decode_image(make(100)).size == size
    with pytest.raises(InvalidImage, match=f"has [0-9]+ {name}; at most 500 are read: save it as a baseline JPEG"):
        decode_image(make(600))


def animation(file_format: str) -> bytes:
    return image_file(picture(0), file_format, save_all=True, append_images=[picture(1), picture(2)])


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_animations_are_refused(file_format: str) -> None:
    with pytest.raises(InvalidImage, match="animated"):
        decode_image(animation(file_format))


def test_of_a_camera_file_with_several_images_the_first_is_taken() -> None:
    image = decode_image(animation("MPO"))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(decode_image(image_file(0, "JPEG"))))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_truncated_files_are_refused(file_format: str, share: float) -> None:
    data = image_file(picture(0, 200, 150), file_format)
    with pytest.raises(InvalidImage):
        decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", b"%PDF-1.4", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 ", b"\0" * 4096],
)
def test_what_is_no_image_is_refused_with_a_remedy(data: bytes) -> None:
    with pytest.raises(InvalidImage, match=r"send|convert") as refusal:
        decode_image(data)
    assert refusal.value.code == "invalid_image"


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(file_format: str) -> None:
    with pytest.raises(InvalidImage, match="no JPEG, PNG or WebP"):
        decode_image(image_file(0, file_format))


def test_damaged_bytes_give_typed_errors_or_an_image() -> None:
    generator = np.random.default_rng(0)
    for file_format in ("PNG", "JPEG", "WEBP"):
        whole = np.frombuffer(image_file(0, file_format), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = generator.integers(0, len(damaged), 4)
            damaged[places] = generator.integers(0, 256, 4)
            with contextlib.suppress(InvalidImage, ImageTooLarge):
                assert decode_image(damaged.tobytes(), 1_000_000).mode == "RGB"
