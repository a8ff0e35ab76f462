"""The adapter format, its validation, and a store of immutable versions. See FORMAT.md."""

from adapters_store.convert.dense import dense_factors
from adapters_store.convert.peft_export import HEAD_FILE, export_peft, write_head
from adapters_store.errors import (
    AdapterNotFound,
    InvalidAdapterName,
    InvalidBundle,
    StoreError,
    StoreUnavailable,
    VersionInUse,
)
from adapters_store.format.bundle import AdapterBundle, validate_bundle
from adapters_store.format.config import FORMAT_VERSION, AdapterConfig, BaseInfo, ModuleSpec
from adapters_store.format.mmap_buffer import writable_memory
from adapters_store.format.safetensors_file import BundleLimits
from adapters_store.format.strict_json import parse_json
from adapters_store.format.validation import check_base, check_same_base, expected_shapes
from adapters_store.names import parse_adapter, parse_ref
from adapters_store.records import AdapterInfo, AdapterSummary, Freed, Page, Published, ResolvedAdapter, StoreState
from adapters_store.store import AdapterStore

__all__ = [
    "FORMAT_VERSION",
    "HEAD_FILE",
    "AdapterBundle",
    "AdapterConfig",
    "AdapterInfo",
    "AdapterNotFound",
    "AdapterStore",
    "AdapterSummary",
    "BaseInfo",
    "BundleLimits",
    "Freed",
    "InvalidAdapterName",
    "InvalidBundle",
    "ModuleSpec",
    "Page",
    "Published",
    "ResolvedAdapter",
    "StoreError",
    "StoreState",
    "StoreUnavailable",
    "VersionInUse",
    "check_base",
    "check_same_base",
    "dense_factors",
    "expected_shapes",
    "export_peft",
    "parse_adapter",
    "parse_json",
    "parse_ref",
    "validate_bundle",
    "writable_memory",
    "write_head",
]
