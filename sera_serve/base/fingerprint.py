"""The fingerprint of a base model: an adapter carries it, so that it never runs on another base."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters_store import BaseInfo
from sera_serve.base.image_tower import hidden_size_of

_SAMPLES_PER_TENSOR = 64
# Keys of a config that say how it was saved or is run. They do not describe the model.
_VOLATILE_CONFIG_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def fingerprint(model: PreTrainedModel, name: str) -> BaseInfo:
    """Compute the identity of a base: architecture, config digest, digest of evenly spaced samples of every weight."""
    config: dict[str, Any] = model.config.to_diff_dict()
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    weights = hashlib.sha256()
    for path, parameter in sorted(model.named_parameters()):
        weights.update(path.encode() + str(tuple(parameter.shape)).encode())
        weights.update(_sample(parameter).numpy().tobytes())
    return BaseInfo(
        name=name,
        architecture=type(model).__name__,
        config_digest=hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest(),
        weights_digest=weights.hexdigest(),
        hidden_size=hidden_size_of(model.config),
    )


def _sample(parameter: nn.Parameter) -> Tensor:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
    # bfloat16 bits: a float32 copy of a bfloat16 checkpoint has the same ones.
    return flat[::step].to("cpu", torch.bfloat16).contiguous().view(torch.int16)
