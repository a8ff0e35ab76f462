"""Small bundles for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, expected_shapes

BASE = {
    "name": "tiny",
    "architecture": "LlamaForCausalLM",
    "config_digest": "c" * 64,
    "weights_digest": "d" * 64,
    "hidden_size": 6,
}
Q = "model.layers.0.self_attn.q_proj"
MODULE = {"d_in": 8, "d_out": 12, "rank": 4, "split": 2, "use_mixer": True, "scaling": 0.5}


def config_fields(**changes: Any) -> dict[str, Any]:
    """The JSON object of a valid generator's configuration, changed at top level."""
    return {
        "format_version": 1,
        "task": "generate",
        "method": "sera",
        "base": dict(BASE),
        "modules": {Q: dict(MODULE)},
        "training": {"seed": 0, "metrics": {"loss": 1.25}},
        **changes,
    }


def classifier_fields(**changes: Any) -> dict[str, Any]:
    """The JSON object of a valid classifier's configuration, changed at top level."""
    return config_fields(
        **{"task": "classify", "labels": ["no", "yes"], "pooling": "last_token", "max_length": 64, **changes}
    )


TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
GAINS = {**MODULE, "has_gain": True, "has_offset": True}
HEAD = {"activation": "tanh", "width": 5}
TAGS = ["O", "B-place", "I-place"]
IMAGE = {
    "height": 8,
    "width": 6,
    "resize": "shortest_edge",
    "resample": "bicubic",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25, 0.5, 1.0],
}


def make_bundle(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> AdapterBundle:
    """A valid bundle whose content depends on `seed`."""
    config = AdapterConfig.from_json(json.dumps(config_fields(**changes)))
    return fill(config, seed, dtype)


def make_classifier(seed: int = 0, **changes: Any) -> AdapterBundle:
    """A valid classifier's bundle."""
    return fill(AdapterConfig.from_json(json.dumps(classifier_fields(**changes))), seed)


def fill(config: AdapterConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> AdapterBundle:
    """Random tensors for a configuration."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(config)
    return AdapterBundle(
        config, {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    )


def bundle_path(store: AdapterStore, digest: str) -> Path:
    return store.root / "bundles" / f"{digest}.safetensors"
