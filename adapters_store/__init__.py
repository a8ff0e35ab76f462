"""The adapter format, its validation, and a store of immutable versions. See FORMAT.md."""

from adapters_store.bundle import AdapterBundle, validate_bundle
from adapters_store.config import FORMAT_VERSION, AdapterConfig, BaseInfo, ModuleSpec
from adapters_store.errors import (
    AdapterNotFound,
    InvalidAdapterName,
    InvalidBundle,
    StoreError,
    VersionInUse,
)
from adapters_store.names import parse_adapter, parse_ref
from adapters_store.records import AdapterInfo, Collected, Published, ResolvedAdapter
from adapters_store.safetensors_file import BundleLimits
from adapters_store.store import AdapterStore
from adapters_store.validation import check_base, expected_shapes

__all__ = [
    "FORMAT_VERSION",
    "AdapterBundle",
    "AdapterConfig",
    "AdapterInfo",
    "AdapterNotFound",
    "AdapterStore",
    "BaseInfo",
    "BundleLimits",
    "Collected",
    "InvalidAdapterName",
    "InvalidBundle",
    "ModuleSpec",
    "Published",
    "ResolvedAdapter",
    "StoreError",
    "VersionInUse",
    "check_base",
    "expected_shapes",
    "parse_adapter",
    "parse_ref",
    "validate_bundle",
]
