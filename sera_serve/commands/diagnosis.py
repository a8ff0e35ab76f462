"""What `sera-serve doctor` looks at: this machine, a base's memory, and a store. Nothing is changed or kept."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import psutil
import torch

from adapters_store import AdapterStore, StoreError, is_new_store
from sera_kernels import path_name
from sera_serve import __version__
from sera_serve.access import AccessDatabase, AccessDatabaseError
from sera_serve.base import DTYPES, base_outline, planned_bytes
from sera_serve.config import ServeSettings
from sera_serve.engine.loop.attention_backend import choose_backend
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.memory import MEBIBYTE, DecoderSizes, DeviceMemory
from sera_serve.errors import SeraServeError
from sera_serve.jobs import JobPaths, missing_files
from sera_serve.layers.targets import adaptable_linears, linear_widths
from sera_serve.server.connections import RESERVED_DESCRIPTORS
from sera_serve.trainer.packages import missing_packages

Status = Literal["ok", "warning", "problem"]
# Of the disk that holds the store.
_FEW_FREE = 1 << 30
# Kernels of `sera_kernels` are made for tensor cores of this generation on.
_LEAST_CAPABILITY = (8, 0)
_INTEGRITY_ADAPTERS = 200
_MOST_FAULTS = 20


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        name: What was looked at.
        status: `problem`: a server would not start, or would fail. `warning`: it would serve worse than it could.
        detail: What was found.
        remedy: What to do; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def diagnose(settings: ServeSettings, full: bool = False) -> Iterator[Finding]:
    """Look at everything, quickest first.

    Args:
        settings: What a server would be started with: its base, store, device, dtype, and memory.
        full: Read every bundle of the store, however many there are.
    """
    yield from _python()
    for look in (_device, _kernels, _attention, _files, _training, _memory):
        yield from look(settings)
    yield from _store(settings.store, full)


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "fastapi", "uvicorn")}
    # It may run from a folder, without being installed.
    versions = {"sera-serve": __version__, **versions}
    yield Finding("libraries", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _device(settings: ServeSettings) -> Iterator[Finding]:
    has_gpu = torch.cuda.is_available()
    if settings.device == "cpu":
        cores, threads = os.cpu_count() or 1, settings.cpu_threads or torch.get_num_threads()
        memory = psutil.virtual_memory()
        detail = (
            f"cpu, {cores} cores, {threads} threads a pass, {_size(memory.available)} of {_size(memory.total)} free"
        )
        if has_gpu:
            remedy = "serve on it with --device cuda"
            yield Finding("device", "warning", f"{detail}; {torch.cuda.get_device_name(0)} is idle", remedy)
        elif threads > cores:
            yield Finding("device", "warning", detail, "lower cpu_threads: more threads than cores wait for each other")
        else:
            yield Finding("device", "ok", detail)
        return
    if not has_gpu:
        remedy = "install a CUDA build of torch and a driver, or use --device cpu"
        yield Finding("device", "problem", f"{settings.device}: torch sees no GPU", remedy)
        return
    try:
        device = torch.device(settings.device)
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        remedy = f"choose one of {torch.cuda.device_count()} GPUs, such as cuda:0"
        yield Finding("device", "problem", f"{settings.device}: {str(error).splitlines()[0]}", remedy)
        return
    capability = (properties.major, properties.minor)
    detail = f"{settings.device}, {properties.name}, capability {capability[0]}.{capability[1]}"
    detail += f", {_size(free)} of {_size(total)} free"
    if capability < _LEAST_CAPABILITY:
        yield Finding("device", "warning", detail, "the kernels were measured from capability 8.0 on")
    elif free < total * settings.gpu_memory_fraction:
        remedy = "another process has a part of what gpu_memory_fraction grants; end it, or lower the setting"
        yield Finding("device", "warning", detail, remedy)
    else:
        yield Finding("device", "ok", detail)


def _kernels(settings: ServeSettings) -> Iterator[Finding]:
    device = torch.device("cpu" if settings.device == "cpu" else "cuda")
    path = path_name(device, DTYPES.get(settings.dtype, torch.float32))
    remedy = ""
    if path != "torch":
        why = "float32 on a CPU" if path == "numba" else "the device is a GPU"
    elif device.type == "cuda":
        why, remedy = "Triton is not installed", "pip install triton"
    elif settings.dtype not in ("auto", "float32"):
        why, remedy = f"the path of numba computes float32, not {settings.dtype}", "leave dtype out on a CPU"
    else:
        why, remedy = "numba is not installed", "pip install 'sera-serve[cpu]'"
    version = importlib.metadata.version(path)
    yield Finding("kernels", "warning" if remedy else "ok", f"{path} {version}: {why}", remedy)


def _attention(settings: ServeSettings) -> Iterator[Finding]:
    try:
        backend = choose_backend(settings.attention, torch.device(settings.device))
    except (SeraServeError, RuntimeError) as error:
        yield _problem("attention", str(error), "choose attention auto")
    else:
        yield Finding("attention", "ok", f"{type(backend).__name__}, from attention {settings.attention}")


def _files(settings: ServeSettings) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + RESERVED_DESCRIPTORS
    detail = f"{_limit(soft)} (at most {_limit(hard)}); {needed} are needed for {settings.max_connections} connections"
    if hard != resource.RLIM_INFINITY and hard < needed:
        remedy = "raise the hard limit (ulimit -Hn, LimitNOFILE), or lower max_connections"
        yield Finding("open files", "warning", detail, remedy)
    else:
        yield Finding("open files", "ok", detail)


def _training(settings: ServeSettings) -> Iterator[Finding]:
    if not settings.max_training_jobs:
        yield Finding("training", "ok", "no jobs run here: max_training_jobs is 0")
    elif missing := missing_packages():
        detail = f"no jobs run here: {', '.join(missing)} missing"
        yield Finding("training", "warning", detail, "pip install 'sera-serve[train]', or set max_training_jobs to 0")
    else:
        yield Finding("training", "ok", f"most jobs at once: {settings.max_training_jobs}")


def _memory(settings: ServeSettings) -> Iterator[Finding]:
    try:
        model = base_outline(settings.base, settings.device, settings.dtype)
    except SeraServeError as error:
        yield Finding("base", "problem", error.message, "name embedded, a folder in Hugging Face format, or a hub id")
        return
    weights = planned_bytes(model, settings.quantize)
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = type(model).__name__
    kept = str(model.dtype) if settings.quantize == "none" else f"{model.dtype}, linear layers as {settings.quantize}"
    yield Finding("base", "ok", f"{settings.base}: {kind}, {count:,} parameters, {_size(weights)} as {kept}")
    if settings.device != "cpu" and not torch.cuda.is_available():
        return
    try:
        memory = DeviceMemory(settings, torch.device(settings.device))
        memory.hold(weights)
        pool = memory.pool_bytes()
        memory.hold(pool)
        parts = {"weights": weights, "adapters": pool}
        tokens = 0
        if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
            # The cache's shapes are those of any dtype. torch knows a mixture's products on "meta" in bfloat16 alone.
            paged = PagedModel(base_outline(settings.base, settings.device, "bfloat16"))
            token_bytes, layer_bytes = (
                size * model.dtype.itemsize // torch.bfloat16.itemsize
                for size in (sum(paged.layer_bytes), max(paged.layer_bytes))
            )
            widths = [max(linear_widths(module)) for module in adaptable_linears(model).values()]
            text = model.config.get_text_config()
            widest = max(widths, default=text.hidden_size)
            context = getattr(text, "max_position_embeddings", None) or 0
            tokens = memory.cache_tokens(DecoderSizes(token_bytes, layer_bytes, widest, text.vocab_size, context))
            parts["KV cache"] = tokens * token_bytes
    except SeraServeError as error:
        yield _problem("memory", error.message)
        return
    detail = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    if tokens:
        detail += f" ({tokens:,} tokens)"
    if settings.device == "cpu":
        needed = sum(parts.values()) + settings.host_cache_mib * MEBIBYTE
        free = psutil.virtual_memory().available
        detail += f", host cache {settings.host_cache_mib} MiB; {_size(free)} are free"
        if needed > free:
            yield Finding("memory", "warning", detail, "lower pool_mib, kv_cache_tokens or host_cache_mib")
            return
    yield Finding("memory", "ok", detail)


def _store(folder: Path, full: bool) -> Iterator[Finding]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    space = f"{_size(usage.free)} of {_size(usage.total)} free at {existing}"
    if usage.free < _FEW_FREE:
        yield Finding("disk", "warning", space, "delete adapters, or give the store another disk: uploads will fail")
    else:
        yield Finding("disk", "ok", space)
    if is_new_store(folder):
        if os.access(existing, os.W_OK):
            yield Finding("store", "ok", f"there is no store at {folder} yet; serve makes it")
        else:
            yield Finding("store", "problem", f"{folder} is no store yet, and cannot be", f"allow writing {existing}")
        return
    try:
        store = AdapterStore(folder, create=False)
        state = store.check()
        adapters = store.count_adapters()
    except StoreError as error:
        yield Finding("store", "problem", error.message, "check the folder, and the user that the server runs as")
        return
    detail = f"{folder}, {adapters:,} adapters, {state.replace('_', ' ')}"
    if state == "writable":
        yield Finding("store", "ok", detail)
    else:
        yield Finding(
            "store", "warning", detail, "adapters are served, and uploads refused; free space, or allow writing"
        )
    yield from _integrity(store, full)
    yield from _database(store)


def _integrity(store: AdapterStore, full: bool) -> Iterator[Finding]:
    """A finding for each fault, up to `_MOST_FAULTS`, and one with their number."""
    checked = count = 0
    try:
        for faults in islice(store.faults(latest_only=not full), None if full else _INTEGRITY_ADAPTERS):
            checked += 1
            for fault in faults:
                count += 1
                if count <= _MOST_FAULTS:
                    yield _problem("bundles", fault.message, "restore a backup")
    except StoreError as error:
        yield _problem("bundles", error.message, "restore a backup")
        return
    if count > _MOST_FAULTS:
        detail = f"{count:,} faults in {checked:,} adapters; the first {_MOST_FAULTS} are above"
        yield Finding("bundles", "problem", detail, "mend these, or restore the store from a backup")
    elif not count:
        words = "every bundle has its digest, and every alias its version"
        sample = f"the latest versions of {checked} adapters were read; --full reads everything"
        yield Finding("bundles", "ok", words if full else sample)


def _problem(name: str, message: str, remedy: str = "") -> Finding:
    """A problem whose message ends with its remedy; else it has `remedy`."""
    # The message of a damaged bundle has others inside.
    detail, separator, told = message.rpartition("; ")
    return Finding(name, "problem", detail, told) if separator else Finding(name, "problem", message, remedy)


def _database(store: AdapterStore) -> Iterator[Finding]:
    """A server refuses to start where it cannot read who may do what. It starts without a file of training rows."""
    database = AccessDatabase(store.root)
    try:
        is_there = database.check()
        missing = missing_files(database, JobPaths(store.root))
    except AccessDatabaseError as error:
        yield _problem("database", error.message)
        return
    finally:
        database.close()
    words = "keys, shares, quotas and jobs can be read" if is_there else "no key, share, quota or job was made yet"
    yield Finding("database", "ok", words)
    if missing:
        shown = ", ".join(missing[:_MOST_FAULTS])
        more = f" and {len(missing) - _MOST_FAULTS:,} more" if len(missing) > _MOST_FAULTS else ""
        detail = f"{len(missing):,} files are missing from {JobPaths(store.root).files}, or not whole: {shown}{more}"
        remedy = (
            "restore jobs/files from a backup, or have the tenants upload them again; jobs that need them will fail"
        )
        yield Finding("training files", "problem", detail, remedy)


def _size(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else f"{value:,}"
