"""Adapters by reference: which versions a request means, one adapter or a weighted sum of several, and reading them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from adapters_store import (
    MAX_PARTS,
    AdapterBundle,
    AdapterStore,
    BaseInfo,
    ResolvedAdapter,
    StoreError,
    check_base,
    check_same_base,
    combination_digest,
    combination_size,
    load_combination,
    parts_of,
)
from adapters_store import Task as AdapterTask
from sera_serve.engine.adapter_uses import AdapterUses
from sera_serve.engine.named_adapters import AdapterNames
from sera_serve.engine.request import SERVED_AS, AdapterChoice, Task, WeightedAdapter
from sera_serve.errors import InvalidRequest, SeraServeError, UnsupportedTask
from sera_serve.residency import LoadSize

# The numbers of a sum, as a multiple of those of its parts. With unlike splits it may have hundreds of times as many,
# and each weight makes another sum: one tenant's small adapters would take the whole pool.
_MAX_GROWTH = 16
# What the errors of a reference call its parts.
_PARTS_OF_REFERENCES = ("adapter", "tenant", "name", "alias")


class AdapterReferences:
    """Finds adapters in a store for one base. Every method blocks, and may be called from any thread.

    A combination has the digest `combination_digest`, which names the digests of its parts. So it is an adapter like
    any other for leases, caches and the batch, and nothing is kept about it beside them.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: BaseInfo,
        module_shapes: Mapping[str, tuple[int, int]],
        max_parameters: int,
        names: AdapterNames,
        uses: AdapterUses,
        dtype: torch.dtype,
    ) -> None:
        """Prepare.

        Args:
            store: Has the adapters.
            base: The base that they must be made for.
            module_shapes: (d_in, d_out) of the base's adaptable layers.
            max_parameters: The most numbers of a combination: what fits the device pool.
            names: Told of each single reference that was resolved.
            uses: Told of the adapter and the content of each.
            dtype: Of the device pool: a combination is made in no larger one.
        """
        self._uses = uses
        self._names = names
        self._store = store
        self._base = base
        self._module_shapes = module_shapes
        self._max_parameters = max_parameters
        self._dtype = dtype

    def resolve(self, adapter: AdapterChoice, task: Task | None) -> ResolvedAdapter:
        """Find the versions that a request names, and refuse before anything is loaded what cannot serve it.

        Args:
            adapter: One reference, or several with weights.
            task: What the adapters must be for; None is any task.

        Raises:
            UnsupportedTask: An adapter is for another task.
            InvalidRequest: The parts are none or too many, a weight is not finite, or classifiers differ in their
                labels or lengths. (Other differences show when the combination is loaded: CannotCombine.)
            StoreError: An adapter does not exist, or was made for another base.
        """
        if not isinstance(adapter, str):
            return self._sum(adapter, task)
        resolved = self._one(adapter, task)
        self._uses.note(resolved.adapter, resolved.digest)
        # A chat names the version whose template it has read by the whole digest. Routers know the name before "@".
        whole = adapter == f"{resolved.adapter}@{resolved.digest}"
        self._names.add(resolved.adapter if whole else adapter, resolved.digest)
        return resolved

    @contextmanager
    def loading(self, digest: str) -> Iterator[AdapterBundle]:
        """Read an adapter, or make a combination from its parts; as of `AdapterStore.loading`.

        Raises:
            StoreError: It was deleted, is damaged, does not fit the base, or its parts cannot be combined.
        """
        parts = parts_of(digest)
        with nullcontext(self._combined(parts)) if parts else self._store.loading(digest) as bundle:
            check_base(bundle.config, self._base, self._module_shapes)
            yield bundle

    def load_size(self, digest: str) -> LoadSize:
        """The most host memory that the bundle of `loading` takes while it is read or made, and its numbers.

        Raises:
            StoreError: As `loading`.
        """
        parts = parts_of(digest)
        if not parts:
            return LoadSize.of_file(self._store.file_bytes(digest))
        return LoadSize(*combination_size(self._store, parts, self._max_parameters, _MAX_GROWTH, self._dtype))

    def _combined(self, parts: Sequence[tuple[str, float]]) -> AdapterBundle:
        return load_combination(
            self._store,
            parts,
            max_parameters=self._max_parameters,
            max_growth=_MAX_GROWTH,
            dtype=self._dtype,
        )

    def _one(self, reference: str, task: Task | None) -> ResolvedAdapter:
        resolved = self._store.resolve(reference)
        if task is not None:
            check_adapter_serves(reference, resolved.task, task)
        check_same_base(resolved.base, self._base)
        return resolved

    def _sum(self, choice: Sequence[WeightedAdapter], task: Task | None) -> ResolvedAdapter:
        if not 1 <= len(choice) <= MAX_PARTS:
            raise InvalidRequest(f"adapter has {len(choice)} entries; send 1 to {MAX_PARTS}", param="adapter")
        resolved: list[ResolvedAdapter] = []
        # One adapter named twice is one part.
        weights: dict[str, float] = {}
        for index, part in enumerate(choice):
            if not math.isfinite(part.weight):
                raise InvalidRequest(
                    f"adapter[{index}].weight is {part.weight}; send a finite number", param=f"adapter[{index}].weight"
                )
            place = f"adapter[{index}].adapter"
            with naming(place):
                found = self._one(part.adapter, task)
            if found.digest not in weights:
                resolved.append(found)
            weights[found.digest] = weights.get(found.digest, 0.0) + part.weight
            first = resolved[0]
            for field in ("task", "labels", "max_length"):
                if getattr(found, field) != getattr(first, field):
                    raise InvalidRequest(
                        f"{found.adapter} and {first.adapter} differ in {field}; combine adapters that agree in it",
                        param=place,
                    )
        if len(resolved) == 1 and weights[resolved[0].digest] == 1:
            return resolved[0]
        named = (f"{weights[part.digest]:g}*{part.adapter}@v{part.version}" for part in resolved)
        digest = combination_digest(list(weights.items()))
        return replace(first, adapter=" + ".join(named), version=0, digest=digest)


def check_adapter_serves(reference: str, adapter_task: AdapterTask, task: Task) -> None:
    """Raise UnsupportedTask where an adapter for `adapter_task` is asked for another task; the message has its route.

    Args:
        reference: The adapter, as the request names it.
        adapter_task: What the adapter was made for.
        task: What it is asked for.
    """
    if SERVED_AS[adapter_task] != task:
        route = SERVED_AS[adapter_task] or "embeddings"
        raise UnsupportedTask(f"adapter {reference!r} is for {adapter_task}; send it to /v1/{route}", param="adapter")


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Have an error of the block about a reference name the place in the request where the reference stands."""
    try:
        yield
    except (SeraServeError, StoreError) as error:
        if error.param in _PARTS_OF_REFERENCES:
            error.param = place
        raise
