"""Serve thousands of small SeRA adapters on one frozen base model."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sera_serve.layers import SeraConfig, attach_adapter, count_adapter_parameters

__all__ = ["SeraConfig", "attach_adapter", "count_adapter_parameters"]
__version__ = "0.1.0"

# Where torchao is installed, transformers imports it. Without a GPU, torchao then warns of each of its own kernels.
# Where PEFT is, transformers imports it, and it bitsandbytes, which warns of a kernel of another package.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import the layers when they are first used: they need torch, and `sera_serve.client` does not."""
    if name in __all__:
        return getattr(importlib.import_module("sera_serve.layers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
