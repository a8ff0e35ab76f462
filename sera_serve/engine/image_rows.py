"""The images of calls: decoded and resized on threads of their own, within limits, one image at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from adapters_store import ImageSpec
from sera_serve.base import FrozenBase, ImageInput, ModelInputs, decode_image, to_pixels
from sera_serve.config import ServeSettings
from sera_serve.engine.tenant_memory import Reservation, TenantMemory
from sera_serve.errors import ImageTooLarge, InvalidImage, TenantOverloaded, UnsupportedTask
from sera_serve.threads import BoundedExecutor

# Few, because a decoded image takes up to 7 bytes a pixel until it is resized: 110 MiB at the default limit.
_DECODING_THREADS = 2
_BYTES_A_PIXEL = 3 * 4


class PixelMemory(TenantMemory):
    """Who has reserved how much for pixels, of calls that wait or run. An image of 224 x 224 takes 0.6 MiB."""

    tenant_bytes = 512 << 20
    all_bytes = 1 << 30


class ImageRowMaker:
    """Makes rows of the images of calls to one base. Its coroutines may run on any event loop.

    The images of one tenant are decoded one at a time, and tenants take turns. When a caller leaves, its further images
    are not begun.
    """

    def __init__(self, base: FrozenBase, settings: ServeSettings) -> None:
        """Start no thread yet; at most `max_queue` images wait for one."""
        self._base = base
        self._settings = settings
        self._decoding = BoundedExecutor("decoding images", _DECODING_THREADS, settings.max_queue)
        self._memory = PixelMemory()

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
    def holding(self, tenant: str) -> Iterator[Reservation]:
        """Count the pixels of a call's images until the end of the block."""
        held = Reservation(tenant)
        try:
            yield held
        finally:
            # Frames that an error keeps may refer to it for longer.
            self._memory.release(held)

    async def rows(
        self, images: Sequence[ImageInput], specs: Sequence[ImageSpec], held: Reservation
    ) -> list[list[ModelInputs]]:
        """The row of each image under each preprocessing: one list for each of `specs`.

        An image is decoded once. Its pixels are kept once for each preprocessing that differs, and counted with `held`.

        Raises:
            InvalidImage, ImageTooLarge: An image cannot be decoded, or is too large; `param` names its place.
            TenantOverloaded: The images of the tenant's calls would take too much memory.
            TenantOverloaded, Overloaded, EngineUnavailable: As `BoundedExecutor.run_in_turn`.
        """
        distinct: list[ImageSpec] = []
        for spec in specs:
            if spec not in distinct:
                distinct.append(spec)
        self._reserve(held, len(images) * len(distinct), images[0])
        by_spec: list[list[ModelInputs]] = [[] for _ in distinct]
        for image in images:
            rows = await self._decoding.run_in_turn(held.tenant, self._decode, image, distinct)
            for found, row in zip(by_spec, rows, strict=True):
                found.append(row)
        return [by_spec[distinct.index(spec)] for spec in specs]

    def close(self) -> None:
        """Decode no more, and tell every caller so. Idempotent."""
        self._decoding.close()

    def _reserve(self, held: Reservation, count: int, first: ImageInput) -> None:
        tower = self._base.image_tower
        assert tower is not None
        needed = count * tower.height * tower.width * _BYTES_A_PIXEL
        # One call alone is never refused for it.
        if not self._memory.grow(held, needed, alone=True):
            raise TenantOverloaded(
                "the images of this tenant's requests under way take too much memory together; send the request again "
                "later, or fewer images at a time",
                param=first.place.partition("[")[0],
            )

    def _decode(self, image: ImageInput, specs: Sequence[ImageSpec]) -> list[ModelInputs]:
        tower = self._base.image_tower
        assert tower is not None
        try:
            decoded = decode_image(image.file(), self._settings.max_image_pixels)
        except (InvalidImage, ImageTooLarge) as error:
            raise type(error)(f"{image.place}: {error.message}", param=image.place) from error
        return [ModelInputs.of(pixels=to_pixels(decoded, spec), image_tokens=tower.tokens) for spec in specs]
