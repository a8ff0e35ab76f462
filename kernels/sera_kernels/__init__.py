"""The grouped SeRA operation over a pool of adapters, and its reference."""

from sera_kernels.grouped import add_updates, grouped_sera, path_name, warm_up
from sera_kernels.operands import ABSENT, NO_ADAPTER, AdapterBatch, AdapterTables, Entry
from sera_kernels.reference import grouped_sera_reference
from sera_kernels.shape_classes import MOST_RANK, ShapeClasses, workspace_bytes

__all__ = [
    "ABSENT",
    "MOST_RANK",
    "NO_ADAPTER",
    "AdapterBatch",
    "AdapterTables",
    "Entry",
    "ShapeClasses",
    "add_updates",
    "grouped_sera",
    "grouped_sera_reference",
    "path_name",
    "warm_up",
    "workspace_bytes",
]
