"""The adapter layers: a trainable layer for one adapter, and a serving layer for many adapters in one batch."""

from sera_serve.layers.attach import (
    adapter_tensors,
    attach_adapter,
    attach_layers,
    attached_layers,
    count_adapter_parameters,
    detach_adapter,
    module_specs,
)
from sera_serve.layers.context import AdapterContext
from sera_serve.layers.sera_linear import SeraLinear
from sera_serve.layers.served_linear import (
    ServedLinear,
    SideStream,
    attach_serving,
    find_shared_inputs,
)
from sera_serve.layers.targets import (
    adaptable_linears,
    linear_widths,
)
from sera_serve.sera_config import SeraConfig

__all__ = [
    "AdapterContext",
    "SeraConfig",
    "SeraLinear",
    "ServedLinear",
    "SideStream",
    "adaptable_linears",
    "adapter_tensors",
    "attach_adapter",
    "attach_layers",
    "attach_serving",
    "attached_layers",
    "count_adapter_parameters",
    "detach_adapter",
    "find_shared_inputs",
    "linear_widths",
    "module_specs",
]
