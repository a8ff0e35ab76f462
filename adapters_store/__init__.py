"""The adapter format, its validation, and a store of immutable versions. See FORMAT.md."""

from adapters_store.backends.store_root import STORE_MARK, is_new_store
from adapters_store.combinations import combination_digest, combination_size, load_combination, parts_of
from adapters_store.convert.combine import MAX_PARTS, Combination, combine
from adapters_store.convert.compress import compress_bundle
from adapters_store.convert.dense import NotMergeable, dense_factors
from adapters_store.convert.import_base import ImportBase
from adapters_store.convert.peft_export import HEAD_FILE, export_peft, write_head
from adapters_store.convert.peft_files import PeftFiles, peft_from_bytes, peft_from_path
from adapters_store.convert.peft_import import PeftImport, import_peft, with_record
from adapters_store.convert.peft_layers import PeftLayer
from adapters_store.counting import RETIRED_BYTES, Held
from adapters_store.errors import (
    AdapterNotFound,
    InvalidAdapterName,
    InvalidBundle,
    StoreError,
    StoreUnavailable,
    TooManyAliases,
    VersionInUse,
    WrongTask,
)
from adapters_store.format.bundle import AdapterBundle, file_bytes, validate_bundle
from adapters_store.format.config import (
    MAX_CHAT_TEMPLATE_BYTES,
    Activation,
    AdapterConfig,
    BaseInfo,
    HeadSpec,
    ImageSpec,
    ModuleSpec,
    Pooling,
    Task,
)
from adapters_store.format.mmap_buffer import reused_memory, writable_memory
from adapters_store.format.safetensors_file import BundleLimits
from adapters_store.format.strict_json import parse_json
from adapters_store.format.validation import MOST_RANK, check_base, check_same_base, expected_shapes, rank_fault
from adapters_store.names import check_part, parse_adapter, parse_ref
from adapters_store.records import AdapterInfo, AdapterSummary, Freed, Page, Published, ResolvedAdapter, StoreState
from adapters_store.store import AdapterStore

__all__ = [
    "HEAD_FILE",
    "MAX_CHAT_TEMPLATE_BYTES",
    "MAX_PARTS",
    "MOST_RANK",
    "RETIRED_BYTES",
    "STORE_MARK",
    "Activation",
    "AdapterBundle",
    "AdapterConfig",
    "AdapterInfo",
    "AdapterNotFound",
    "AdapterStore",
    "AdapterSummary",
    "BaseInfo",
    "BundleLimits",
    "Combination",
    "Freed",
    "HeadSpec",
    "Held",
    "ImageSpec",
    "ImportBase",
    "InvalidAdapterName",
    "InvalidBundle",
    "ModuleSpec",
    "NotMergeable",
    "Page",
    "PeftFiles",
    "PeftImport",
    "PeftLayer",
    "Pooling",
    "Published",
    "ResolvedAdapter",
    "StoreError",
    "StoreState",
    "StoreUnavailable",
    "Task",
    "TooManyAliases",
    "VersionInUse",
    "WrongTask",
    "check_base",
    "check_part",
    "check_same_base",
    "combination_digest",
    "combination_size",
    "combine",
    "compress_bundle",
    "dense_factors",
    "expected_shapes",
    "export_peft",
    "file_bytes",
    "import_peft",
    "is_new_store",
    "load_combination",
    "parse_adapter",
    "parse_json",
    "parse_ref",
    "parts_of",
    "peft_from_bytes",
    "peft_from_path",
    "rank_fault",
    "reused_memory",
    "validate_bundle",
    "with_record",
    "writable_memory",
    "write_head",
]
