"""The images of calls: decoded and resized on threads of their own, within limits, one image at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adapters_store import ImageSpec
from sera_serve.base import FrozenBase, ImageInput, ModelInputs, decode_image, to_pixels
from sera_serve.config import ServeSettings
from sera_serve.errors import ImageTooLarge, InvalidImage, InvalidRequest, Overloaded, UnsupportedTask
from sera_serve.threads import BoundedExecutor

# Few, because a decoded image takes up to 7 bytes a pixel until it is resized: 110 MiB at the default limit.
_DECODING_THREADS = 2
# Pixels of all calls that wait or run. An image of 224 x 224 takes 0.6 MiB.
_MAX_HELD_BYTES = 1 << 30
_BYTES_A_PIXEL = 3 * 4


@dataclass
class HeldImages:
    """What the images of one call take.

    Attributes:
        nbytes: Bytes of their pixels.
    """

    nbytes: int = 0


class ImageRowMaker:
    """Makes rows of the images of calls to one base. Its coroutines may run on any event loop.

    The images of one tenant are decoded one at a time, and tenants take turns. When a caller leaves, its further images
    are not begun.

    Locking: `_lock` guards `_held`.
    """

    def __init__(self, base: FrozenBase, settings: ServeSettings) -> None:
        """Start no thread yet; at most `max_queue` images wait for one."""
        self._base = base
        self._settings = settings
        self._decoding = BoundedExecutor("decoding images", _DECODING_THREADS, settings.max_queue)
        self._lock = threading.Lock()
        self._held = 0

    def check(self, inputs: Sequence[object]) -> list[ImageInput]:
        """Check the images among the inputs of a call before anything is done with them, and return them.

        Raises:
            UnsupportedTask: The base takes no images.
            ImageTooLarge: They are too many, or a file has too many bytes.
        """
        images = [value for value in inputs if isinstance(value, ImageInput)]
        if not images:
            return []
        if self._base.image_tower is None:
            raise UnsupportedTask(
                f"base {self._base.name!r} takes texts and no images; send texts, or ask a server of a ViT, DeiT or "
                "CLIP base",
                param=images[0].place,
            )
        if len(images) > self._settings.max_images:
            raise ImageTooLarge(
                f"the request has {len(images)} images; send at most {self._settings.max_images} in one request",
                param=images[0].place.partition("[")[0],
            )
        most = self._settings.max_image_bytes
        for image in images:
            if image.nbytes > most:
                raise ImageTooLarge(
                    f"{image.place} has {image.nbytes} bytes; the limit is {most}: send a smaller image",
                    param=image.place,
                )
        return images

    @contextmanager
    def holding(self) -> Iterator[HeldImages]:
        """Count the pixels of a call's images until the end of the block."""
        held = HeldImages()
        try:
            yield held
        finally:
            with self._lock:
                self._held -= held.nbytes

    async def rows(
        self, images: Sequence[ImageInput], specs: Sequence[ImageSpec], tenant: str, held: HeldImages
    ) -> list[list[ModelInputs]]:
        """The row of each image under each preprocessing: one list for each of `specs`.

        An image is decoded once. Its pixels are kept once for each preprocessing that differs, and counted with `held`.

        Raises:
            InvalidImage, ImageTooLarge: An image cannot be decoded, or is too large; `param` names its place.
            Overloaded: The images of all calls would take too much memory.
            Overloaded, EngineUnavailable: As `BoundedExecutor.run`.
        """
        distinct: list[ImageSpec] = []
        for spec in specs:
            if spec not in distinct:
                distinct.append(spec)
        self._hold(len(images) * len(distinct), held)
        by_spec: list[list[ModelInputs]] = [[] for _ in distinct]
        for image in images:
            rows = await self._decoding.run_in_turn(tenant, self._decode, image, distinct)
            for found, row in zip(by_spec, rows, strict=True):
                found.append(row)
        return [by_spec[distinct.index(spec)] for spec in specs]

    def close(self) -> None:
        """Decode no more, and tell every caller so. Idempotent."""
        self._decoding.close()

    def _hold(self, count: int, held: HeldImages) -> None:
        tower = self._base.image_tower
        assert tower is not None
        needed = count * tower.height * tower.width * _BYTES_A_PIXEL
        with self._lock:
            # One call alone is never refused.
            if self._held > held.nbytes and self._held + needed > _MAX_HELD_BYTES:
                raise Overloaded("the images of too many requests are under way; send the request again later")
            self._held += needed
            held.nbytes += needed

    def _decode(self, image: ImageInput, specs: Sequence[ImageSpec]) -> list[ModelInputs]:
        tower = self._base.image_tower
        assert tower is not None
        try:
            decoded = decode_image(image.file(), self._settings.max_image_pixels)
        except (InvalidImage, ImageTooLarge) as error:
            raise type(error)(f"{image.place}: {error.message}", param=image.place) from error
        return [ModelInputs.of(pixels=to_pixels(decoded, spec), image_tokens=tower.tokens) for spec in specs]


def check_spec(spec: ImageSpec, base: FrozenBase, param: str) -> None:
    """Check that pixels made by `spec` fit the base.

    Raises:
        InvalidRequest: The base reads images of another size.
    """
    tower = base.image_tower
    if tower is not None and (spec.height, spec.width) != (tower.height, tower.width):
        raise InvalidRequest(
            f"the adapter's images have {spec.height} x {spec.width} pixels, and the base reads {tower.height} x "
            f"{tower.width}; train the adapter on this base again",
            param=param,
        )
