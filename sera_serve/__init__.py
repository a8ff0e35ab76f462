"""Serve thousands of small SeRA adapters on one frozen base model."""

from sera_serve.layers import SeraConfig, attach_adapter, count_adapter_parameters

__all__ = ["SeraConfig", "attach_adapter", "count_adapter_parameters"]
__version__ = "0.1.0"
