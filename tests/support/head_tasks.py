"""Adapters with random weights for the tasks whose heads do not choose one label of a text."""

from __future__ import annotations

import torch

from adapters_store import AdapterBundle, AdapterConfig
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from support.factories import random_adapter

TAGS = ["O", "B-name", "I-name", "B-place", "I-place"]
SHAPE = SeraConfig(8, 4, 8.0, "all-linear")


def regressor(base: FrozenBase, seed: int, max_length: int = 64) -> AdapterBundle:
    """An adapter that gives a number for a text."""
    return _changed(
        random_adapter(base, SHAPE, seed, ["a", "b"], 0.5), 1, task="regress", labels=None, max_length=max_length
    )


def labeller(base: FrozenBase, seed: int, labels: list[str], max_length: int = 64) -> AdapterBundle:
    """An adapter that gives labels for a text."""
    bundle = random_adapter(base, SHAPE, seed, labels, 0.5)
    return _changed(bundle, len(labels), multi_label=True, max_length=max_length)


def span_finder(base: FrozenBase, seed: int, max_length: int = 64) -> AdapterBundle:
    """An adapter that finds names and places in a text."""
    bundle = random_adapter(base, SHAPE, seed, TAGS, 0.5)
    return _changed(bundle, len(TAGS), task="token-classify", pooling=None, max_length=max_length)


def _changed(bundle: AdapterBundle, rows: int, **fields: object) -> AdapterBundle:
    kept = {name: value for name, value in dict(bundle.config).items() if name != "format_version"}
    tensors = dict(bundle.tensors)
    tensors["head.weight"] = torch.as_tensor(tensors["head.weight"][:rows])
    tensors["head.bias"] = torch.as_tensor(tensors["head.bias"][:rows])
    return AdapterBundle(AdapterConfig.model_validate({**kept, **fields}), tensors)
