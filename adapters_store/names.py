"""Adapter ids and references, checked before any path is made from them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapters_store.errors import InvalidAdapterName

LATEST = "latest"
MIN_DIGEST_PREFIX = 8
_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_LIKE_VERSION = re.compile(r"v[0-9]+")
_DIGEST_PREFIX = re.compile(rf"[0-9a-f]{{{MIN_DIGEST_PREFIX},64}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FORM = "1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit, without '..'"


@dataclass(frozen=True)
class AdapterRef:
    """A parsed reference: an adapter, and which of its versions.

    Attributes:
        adapter: `tenant/name`.
        selector: A version number, a digest prefix (`by_digest`), or an alias.
        by_digest: Whether a string selector is a digest prefix.
    """

    adapter: str
    selector: int | str
    by_digest: bool = False

    @property
    def parts(self) -> tuple[str, str]:
        """(tenant, name)."""
        tenant, _, name = self.adapter.partition("/")
        return tenant, name


def is_part(text: str) -> bool:
    """Whether `text` may be a tenant, a name or an alias."""
    return _PART.fullmatch(text) is not None and ".." not in text


def check_part(text: object, param: str) -> str:
    """Check a tenant, a name or an alias and return it; else `InvalidAdapterName`."""
    if not isinstance(text, str) or not is_part(text):
        raise InvalidAdapterName(f"{param} is {text!r}; it must be {_FORM}", param=param)
    return text


def parse_adapter(text: object) -> tuple[str, str]:
    """Split an adapter id `tenant/name`.

    Raises:
        InvalidAdapterName: Not two parts of the allowed form.
    """
    if not isinstance(text, str) or text.count("/") != 1:
        raise InvalidAdapterName(f"adapter id is {text!r}; write tenant/name, each part {_FORM}", param="adapter")
    tenant, _, name = text.partition("/")
    return check_part(tenant, "tenant"), check_part(name, "name")


def check_alias(text: object) -> str:
    """Check an alias: allowed form, and neither a version nor a digest; else `InvalidAdapterName`."""
    alias = check_part(text, "alias")
    if _LIKE_VERSION.fullmatch(alias) or _DIGEST_PREFIX.fullmatch(alias):
        raise InvalidAdapterName(
            f"alias {alias!r} reads as a version or a digest; choose a word such as 'stable'", param="alias"
        )
    return alias


def check_digest(text: object) -> str:
    """Check a whole digest, 64 lower-case hexadecimal digits, and return it; else `InvalidAdapterName`."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise InvalidAdapterName(f"digest is {text!r}; it must be 64 hexadecimal digits", param="digest")
    return text


def parse_ref(text: object) -> AdapterRef:
    """Parse `tenant/name`, `tenant/name@alias`, `tenant/name@v3` or `tenant/name@<digest prefix>`.

    Raises:
        InvalidAdapterName: Anything else.
    """
    if not isinstance(text, str):
        raise InvalidAdapterName(f"adapter is {text!r}; write tenant/name", param="adapter")
    adapter, at, selector = text.partition("@")
    parse_adapter(adapter)
    if not at:
        return AdapterRef(adapter, LATEST)
    if version := _VERSION.fullmatch(selector):
        return AdapterRef(adapter, int(version[1]))
    if _DIGEST_PREFIX.fullmatch(selector):
        return AdapterRef(adapter, selector, by_digest=True)
    return AdapterRef(adapter, check_alias(selector))
