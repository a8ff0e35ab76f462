"""Combinations by digest: the name that a weighted sum of stored bundles has in caches, and how the sum is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import JsonValue

from adapters_store.convert.combine import Combination
from adapters_store.errors import CannotCombine
from adapters_store.format.bundle import AdapterBundle
from adapters_store.store import AdapterStore

# Neither sign is part of a digest, of a weight in hexadecimal, or of an adapter's name.
_MARK, _BETWEEN, _TIMES = "sum:", ",", "*"


def combination_digest(parts: Sequence[tuple[str, float]]) -> str:
    """The digest of the sum of parts (digest, weight). It names the parts, so nothing else must be kept of the sum.

    The order of the parts does not matter to it: a sum is the same in any order.
    """
    return _MARK + _BETWEEN.join(f"{digest}{_TIMES}{float(weight).hex()}" for digest, weight in sorted(parts))


def parts_of(digest: str) -> list[tuple[str, float]]:
    """The parts (digest, weight) of a combination's digest; none for the digest of a bundle."""
    if not digest.startswith(_MARK):
        return []
    parts = (part.split(_TIMES) for part in digest.removeprefix(_MARK).split(_BETWEEN))
    return [(part, float.fromhex(weight)) for part, weight in parts]


def load_combination(
    store: AdapterStore,
    parts: Sequence[tuple[str, float]],
    names: Sequence[str] | None = None,
    training: Mapping[str, JsonValue] | None = None,
    max_parameters: int | None = None,
    max_growth: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterBundle:
    """Read the weighted sum of stored bundles as one adapter; one of them at a time is in memory beside the sum.

    Args:
        store: Has the parts.
        parts: Digest and weight of each.
        names: What messages call the parts; their places if None.
        training: The training record of the sum.
        max_parameters: The most numbers that the sum may have; None is without limit.
        max_growth: The same, as a multiple of the numbers of all parts together.
        dtype: Of the sum's factors, as of `Combination`.

    Raises:
        CannotCombine, WrongBase: As `Combination` says; or the sum has too many numbers.
        AdapterNotFound, StoreCorrupted: As `AdapterStore.load` says.
    """
    combination = _combination(store, parts, names, training, max_parameters, max_growth, dtype)
    for digest, _ in parts:
        combination.add(store.load(digest))
    return combination.bundle()


def combination_size(
    store: AdapterStore,
    parts: Sequence[tuple[str, float]],
    max_parameters: int | None = None,
    max_growth: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """The most memory that `load_combination` takes, in bytes, and the numbers of the sum. Reads no tensors.

    The memory is that of the sum and of its largest part.

    Raises:
        CannotCombine, WrongBase, AdapterNotFound, StoreCorrupted: As `load_combination`.
    """
    config = _combination(store, parts, None, None, max_parameters, max_growth, dtype).config
    head = config.head_parameters
    of_sum = dtype.itemsize * (config.parameters - head) + torch.float32.itemsize * head
    return of_sum + max(store.file_bytes(digest) for digest, _ in parts), config.parameters


def _combination(
    store: AdapterStore,
    parts: Sequence[tuple[str, float]],
    names: Sequence[str] | None,
    training: Mapping[str, JsonValue] | None,
    max_parameters: int | None,
    max_growth: int | None,
    dtype: torch.dtype,
) -> Combination:
    """The sum before any part is added, if it is not too large; arguments and errors as of `load_combination`."""
    configs = [store.config(digest) for digest, _ in parts]
    combination = Combination(configs, [weight for _, weight in parts], names, training, dtype)
    numbers, of_parts = combination.config.parameters, sum(config.parameters for config in configs)
    if max_parameters is not None and numbers > max_parameters:
        raise CannotCombine(
            f"the combination has {numbers} numbers, its parts together {of_parts}, and {max_parameters} fit; combine "
            "adapters whose splits have a greater common divisor, or raise pool_mib",
            param="adapter",
        )
    if max_growth is not None and numbers > max_growth * of_parts:
        raise CannotCombine(
            f"the combination has {numbers} numbers, more than {max_growth} times those of its parts together "
            f"({of_parts}); combine adapters whose splits have a greater common divisor, or publish the sum as an "
            "adapter of its own",
            param="adapter",
        )
    return combination
