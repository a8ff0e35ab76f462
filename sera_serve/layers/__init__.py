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
from sera_serve.layers.config import ALL_LINEAR, SeraConfig
from sera_serve.layers.context import AdapterContext
from sera_serve.layers.sera_linear import SeraLinear
from sera_serve.layers.served_linear import (
    ServedLinear,
    SharedInputGroup,
    SideStream,
    attach_serving,
    find_shared_inputs,
)
from sera_serve.layers.targets import (
    adaptable_linears,
    find_targets,
    linear_widths,
    match_targets,
    near_names,
    pattern_matches,
)

__all__ = [
    "ALL_LINEAR",
    "AdapterContext",
    "SeraConfig",
    "SeraLinear",
    "ServedLinear",
    "SharedInputGroup",
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
    "find_targets",
    "linear_widths",
    "match_targets",
    "module_specs",
    "near_names",
    "pattern_matches",
]
