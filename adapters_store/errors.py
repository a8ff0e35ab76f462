"""Every refusal of the store: a typed error with an HTTP status, a stable code, the field and the remedy."""

from __future__ import annotations


class StoreError(Exception):
    """Base of the store's errors.

    Attributes:
        message: What is wrong and what to do about it, for a person.
        param: The field, tensor, archive member or option at fault, or None.
        code: Stable snake_case identifier, for programs.
        status: HTTP status that a server answers with.
    """

    code: str = "store_error"
    status: int = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidBundle(StoreError):
    """A bundle is refused; each way to be wrong is a subclass. FORMAT.md lists those of bundles."""

    code = "invalid_bundle"
    status = 422


class NotSafetensors(InvalidBundle):
    """The bytes are neither safetensors nor a tar: a pickle, a zip, a compressed archive, text."""

    code = "not_safetensors"


class HeaderTooLarge(InvalidBundle):
    """The safetensors header claims more bytes than the limit; nothing of that size was allocated."""

    code = "header_too_large"


class InvalidHeader(InvalidBundle):
    """The safetensors header is not the JSON it must be, or its offsets do not tile the data."""

    code = "invalid_header"


class Truncated(InvalidBundle):
    """The file ends before the data that its header, or its archive, announces."""

    code = "truncated"


class BundleTooLarge(InvalidBundle):
    """The bundle exceeds the size limit."""

    code = "bundle_too_large"
    status = 413


class InvalidArchive(InvalidBundle):
    """The archive holds something else than the two regular files of a bundle."""

    code = "invalid_archive"


class MissingFile(InvalidBundle):
    """One of the bundle's two files, or the configuration in the metadata of a single file, is absent."""

    code = "missing_file"


class UnexpectedFile(InvalidBundle):
    """A bundle directory or archive holds a file that nothing would read."""

    code = "unexpected_file"


class InvalidConfig(InvalidBundle):
    """The adapter configuration is not valid JSON, or a field of it has an impossible value."""

    code = "invalid_config"


class UnsupportedFormat(InvalidBundle):
    """The bundle was written in a format version that this release does not read."""

    code = "unsupported_format"


class MissingTensor(InvalidBundle):
    """A tensor that the configuration calls for is absent."""

    code = "missing_tensor"


class UnexpectedTensor(InvalidBundle):
    """A tensor that the configuration does not call for is present."""

    code = "unexpected_tensor"


class WrongShape(InvalidBundle):
    """A tensor, or an adapted layer, has another shape than the configuration or the base model."""

    code = "wrong_shape"


class WrongDtype(InvalidBundle):
    """A tensor is not float32, float16 or bfloat16."""

    code = "wrong_dtype"


class NotFinite(InvalidBundle):
    """A tensor holds NaN or an infinity."""

    code = "not_finite"


class WrongBase(InvalidBundle):
    """The bundle was made for another base model."""

    code = "wrong_base"


class WrongTask(InvalidBundle):
    """The base model does not serve the bundle's task, or reads images of another size, or shorter texts."""

    code = "wrong_task"


class UnknownModule(InvalidBundle):
    """The bundle adapts a layer that the base model does not have."""

    code = "unknown_module"


class CannotCombine(StoreError):
    """Adapters have no exact weighted sum: their tasks, heads or poolings differ, or a part has more than an update."""

    code = "cannot_combine"
    status = 422


class InvalidAdapterName(StoreError):
    """An adapter id, alias or reference is not of the allowed form."""

    code = "invalid_adapter_name"
    status = 422


class AdapterNotFound(StoreError):
    """No adapter, version, alias or bundle of that name is in the store."""

    code = "adapter_not_found"
    status = 404


class AmbiguousDigest(StoreError):
    """A digest prefix fits more than one version."""

    code = "ambiguous_digest"
    status = 422


class VersionInUse(StoreError):
    """The version cannot be deleted because an alias points to it."""

    code = "version_in_use"
    status = 409


class TooManyAliases(StoreError):
    """The adapter has as many aliases as one may have."""

    code = "too_many_aliases"
    status = 409


class StoreUnavailable(StoreError):
    """The store cannot be reached: its directory was removed or unmounted while it was in use."""

    code = "store_unavailable"
    status = 503


class NotAStore(StoreError):
    """The directory is no adapter store, or there is none."""

    code = "not_a_store"


class UnsupportedStore(StoreError):
    """The store was written by a newer release."""

    code = "unsupported_store"


class StoreCorrupted(StoreError):
    """A file of the store does not hold what was written: disk damage or an edit by hand."""

    code = "store_corrupted"


class StoreWriteFailed(StoreError):
    """The operating system refused a write; nothing was acknowledged."""

    code = "store_write_failed"
    status = 507
