"""Classifiers of random factors, for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapters_store import AdapterBundle, AdapterConfig, ModuleSpec, expected_shapes
from sera_serve.base import FrozenBase, Pooling


def random_classifier(
    base: FrozenBase, seed: int, labels: Sequence[str], targets: tuple[str, str], pooling: Pooling
) -> AdapterBundle:
    """A classifier of rank 16 and random factors on two projections of each layer."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: ModuleSpec(d_in=d_in, d_out=d_out, rank=16, split=16, use_mixer=True, scaling=1.0)
        for path, (d_in, d_out) in base.module_shapes().items()
        if path.endswith(targets)
    }
    config = AdapterConfig(
        task="classify",
        method="sera",
        base=base.info,
        modules=modules,
        labels=list(labels),
        pooling=pooling,
        max_length=128,
    )
    shapes = expected_shapes(config).items()
    return AdapterBundle(config, {name: torch.randn(size, generator=generator) / 16 for name, size in shapes})
