"""What a store records of each version, what it keeps of that in memory, and what it reports to its callers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from adapters_store.format.config import AdapterConfig, BaseInfo, ImageSpec, Method, Task

# Whether a store takes new versions. All three states serve.
StoreState = Literal["writable", "full", "read_only"]


class Record(BaseModel):
    """A small JSON document of a store: strict types, no unknown field."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


# Facts that came later. They are written only where they are used.
_LATER = ("has_chat_template", "multi_label", "image")


class AdapterFacts(Record):
    """The part of a configuration that requests and listings need.

    Attributes:
        base: Identity of the base model.
        labels: Labels of a classifier, else None.
        max_length: Tokens that an input of a classifier is cut to, or None.
        ranks: The different ranks of the adapted layers, ascending.
        splits: The different splits of the adapted layers, ascending.
        modules: Number of adapted layers.
        has_chat_template: Whether the bundle has a chat template. Written only where it has one: an older release,
            which reads no such bundle, reads the records of all others.
        multi_label: Whether an input may have several of the labels, or none. Written only where it is true, likewise.
        image: What an image goes through, or None. Written only where it is used, likewise.
    """

    base: BaseInfo
    labels: tuple[str, ...] | None
    max_length: int | None
    ranks: tuple[int, ...]
    splits: tuple[int, ...]
    modules: int
    has_chat_template: bool = False
    multi_label: bool = False
    image: ImageSpec | None = None

    @classmethod
    def of(cls, config: AdapterConfig) -> AdapterFacts:
        """Take the facts from a configuration."""
        return cls(
            base=config.base,
            labels=None if config.labels is None else tuple(config.labels),
            max_length=config.max_length,
            ranks=tuple(sorted({spec.rank for spec in config.modules.values()})),
            splits=tuple(sorted({spec.split for spec in config.modules.values()})),
            modules=len(config.modules),
            has_chat_template=config.chat_template is not None,
            multi_label=config.multi_label,
            image=config.image,
        )

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in _LATER or value not in (False, None)}


class VersionRecord(Record):
    """One immutable version. Resolving and listing read this record and open no bundle.

    `facts` is None in records of store version 1, and where the labels are too long for a record.
    The facts are then read from the bundle.
    """

    version: Annotated[int, Field(ge=1)]
    digest: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    created_at: str
    nbytes: int
    parameters: int
    task: Task
    method: Method
    base: str
    facts: AdapterFacts | None = None


@dataclass(frozen=True)
class Published:
    """The version that `AdapterStore.publish` made, or found in the store."""

    adapter: str
    version: int
    digest: str


@dataclass(frozen=True)
class ResolvedAdapter:
    """A reference turned into one immutable version, with what a request must know before anything is loaded.

    Attributes:
        adapter: `tenant/name`; of a combination, its parts with their versions and weights.
        version: Version number; 0 for a combination, which no version number names.
        digest: Content digest, or `combination_digest`; the key of caches.
        task: As in its configuration.
        labels: Labels of a classifier in the order of the head's rows, else None.
        base: Identity of the base model.
        max_length: Tokens that an input of a classifier is cut to, or None.
        has_chat_template: Whether its configuration has a chat template; see `AdapterStore.config`.
        multi_label: Whether an input may have several of its labels, or none.
        image: What an image goes through before the base, or None for an adapter of texts.
    """

    adapter: str
    version: int
    digest: str
    task: Task
    labels: tuple[str, ...] | None
    base: BaseInfo
    max_length: int | None
    has_chat_template: bool = False
    multi_label: bool = False
    image: ImageSpec | None = None


@dataclass(frozen=True)
class AdapterSummary:
    """One version of an adapter.

    Attributes:
        adapter: `tenant/name`.
        version: The version described.
        digest: Its content digest.
        created_at: When it was published, ISO 8601, UTC.
        nbytes: Bytes of its tensors.
        parameters: Numbers in its tensors, head included.
        task: As in its configuration.
        method: As in its configuration.
        base: Name of its base model.
        labels: Labels of a classifier, else None.
        ranks: The different ranks of its layers, ascending.
        splits: The different splits of its layers, ascending.
        modules: Number of adapted layers.
        has_chat_template: Whether its configuration has a chat template.
    """

    adapter: str
    version: int
    digest: str
    created_at: str
    nbytes: int
    parameters: int
    task: Task
    method: Method
    base: str
    labels: tuple[str, ...] | None
    ranks: tuple[int, ...]
    splits: tuple[int, ...]
    modules: int
    has_chat_template: bool


@dataclass(frozen=True)
class AdapterInfo(AdapterSummary):
    """One version of an adapter, and the adapter's versions and aliases.

    Attributes:
        versions: All versions, oldest first.
        aliases: Version by alias.
    """

    versions: tuple[int, ...]
    aliases: dict[str, int]


@dataclass(frozen=True)
class Page:
    """One page of a listing.

    Attributes:
        adapters: The latest version of each adapter, in order of id.
        next: The `after` of the next page, or None on the last page.
    """

    adapters: tuple[AdapterSummary, ...]
    next: str | None


@dataclass(frozen=True)
class Freed:
    """Bundles that left a store, because no version refers to them any more.

    Attributes:
        digests: Their digests.
        nbytes: Bytes that they took.
        adapter_gone: Whether the adapter that was deleted from has no version left.
    """

    digests: tuple[str, ...] = ()
    nbytes: int = 0
    adapter_gone: bool = False

    @property
    def bundles(self) -> int:
        """Number of bundles."""
        return len(self.digests)
