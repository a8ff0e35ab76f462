"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters by path, with vLLM's bodies, for its controllers.

Body fields: https://docs.vllm.ai/en/latest/features/lora.html (dynamically serving LoRA adapters).
"""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import APIRouter

from adapters_store import AdapterBundle, AdapterStore, BundleLimits, parse_adapter
from adapters_store.errors import AdapterNotFound, MissingFile
from sera_serve.errors import InvalidRequest, SeraServeError
from sera_serve.server.deps import ContextOf, RequestContext
from sera_serve.server.errors import renamed_fields
from sera_serve.server.native.schemas import DeletedAdapter, LoadLoraRequest, PublishedAdapter, UnloadLoraRequest
from sera_serve.server.publishing import read_source
from sera_serve.server.strict import StrictRoute

# Fields of the shared code by their names in these routes.
_NAMES = {"adapter": "lora_name", "name": "lora_name", "bundle": "lora_path"}
# Characters of a client's path in an error.
_SHOWN = 512

router = APIRouter(route_class=StrictRoute, tags=["adapters"])


class LoadingByPathDisabled(SeraServeError):
    """The operator has not allowed any directory for loading by path."""

    code = "loading_by_path_disabled"
    status = 403


class PathNotAllowed(SeraServeError):
    """The path leads out of the directory that the operator allowed."""

    code = "path_not_allowed"
    status = 403


class AdapterExists(InvalidRequest):
    """An adapter of this name has another content, and `load_inplace` is not true."""

    code = "adapter_exists"
    status = 400


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadLoraRequest, context: ContextOf) -> PublishedAdapter:
    """Publish the adapter at a path below `lora_path_root`: a PEFT checkpoint, or a bundle.

    With keys, a tenant loads from the directory of its own name there, and an admin from all of them.
    """
    root = _root(context.settings.lora_path_root)
    with renamed_fields(_NAMES):
        context.caller.check_publish(body.lora_name)
        return await context.run(context.executors.publishing, _load, body, root, context)


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLoraRequest, context: ContextOf) -> DeletedAdapter:
    """Delete an adapter with all of its versions; requests under way keep the version they began with."""
    _root(context.settings.lora_path_root)
    with renamed_fields(_NAMES):
        # A name has no `@`: unloading takes every version.
        parse_adapter(body.lora_name)
        context.caller.check_change(body.lora_name)
        await context.run(context.executors.changing, context.publisher.remove, body.lora_name, context.caller.actor)
    return DeletedAdapter(adapter=body.lora_name)


def _root(root: Path | None) -> Path:
    if root is None:
        raise LoadingByPathDisabled(
            "this server loads no adapters by path; upload them to /v1/adapters, or start the server with "
            "--lora-path-root DIRECTORY"
        )
    return root


def _load(body: LoadLoraRequest, root: Path, context: RequestContext) -> PublishedAdapter:
    # No pathlib for the client's text: it would intern the names that clients choose.
    allowed = os.path.realpath(root)
    if "\0" in body.lora_path:
        raise InvalidRequest("lora_path has a zero byte; send a path", param="lora_path")
    absolute = body.lora_path.startswith(os.sep)
    path = os.path.realpath(body.lora_path if absolute else f"{allowed}/{body.lora_path}")
    within = allowed
    if (own := context.caller.seen_tenant) is not None:
        # The name of a tenant has no slash, and does not begin with a dot.
        within = f"{allowed.rstrip(os.sep)}{os.sep}{own}"
    elif not _is_below(path, allowed):
        raise PathNotAllowed("lora_path leads out of the server's lora_path_root", param="lora_path")
    # A path of another tenant answers as one that does not exist. Nobody is told where the root is.
    if not _is_below(path, within) or not os.access(path, os.F_OK):
        raise MissingFile(f"{body.lora_path[:_SHOWN]} is not there; check the path", param="lora_path")
    limits = BundleLimits(max_bytes=context.settings.max_upload_mib << 20)
    bundle, warnings = context.publisher.checked(read_source(path, limits, Path(within)))
    _check_new(body, bundle, context.store)
    published = context.publisher.publish(bundle, body.lora_name, context.caller.actor)
    return PublishedAdapter.of(published, warnings)


def _is_below(path: str, top: str) -> bool:
    """Whether a path without links is `top`, or lies in it."""
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)


def _check_new(body: LoadLoraRequest, bundle: AdapterBundle, store: AdapterStore) -> None:
    """Refuse other content under a known name, unless the client asks for it."""
    if body.load_inplace:
        return
    try:
        known = store.resolve(body.lora_name)
    except AdapterNotFound:
        return
    if known.digest != bundle.digest:
        raise AdapterExists(
            f"adapter {body.lora_name!r} is loaded with another content; send load_inplace true for a new version",
            param="lora_name",
        )
