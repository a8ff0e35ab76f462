"""Classifiers of random factors, for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapters_store import AdapterBundle, AdapterConfig, ModuleSpec, expected_shapes
from sera_serve.base import FrozenBase, Pooling

RANK = 16


def random_classifier(
    base: FrozenBase,
    seed: int,
    labels: Sequence[str],
    targets: tuple[str, str],
    pooling: Pooling,
    deviation: float = 1 / 16,
) -> AdapterBundle:
    """A classifier, of images where the base takes images, with random factors on two projections of each layer."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: ModuleSpec(d_in=d_in, d_out=d_out, rank=RANK, split=RANK, use_mixer=True, scaling=1.0)
        for path, (d_in, d_out) in base.module_shapes().items()
        if path.endswith(targets)
    }
    config = AdapterConfig(
        task="classify" if base.reads_text else "image-classify",
        method="sera",
        base=base.info,
        modules=modules,
        labels=list(labels),
        pooling=pooling,
        max_length=128 if base.reads_text else None,
        image=base.image_spec,
    )
    shapes = expected_shapes(config).items()
    return AdapterBundle(config, {name: torch.randn(size, generator=generator) * deviation for name, size in shapes})
