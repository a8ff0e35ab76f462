"""The adapter store at 5,000 and 100,000 adapters: a page of the listing, publishing, resolving, deleting.

    python -m benchmarks.store_scale [--quick] [--adapters N ...] [--output FILE]

Each size comes in two shapes: many tenants of five adapters, and one tenant of all adapters. The store is filled by
writing the records of store version 1 directly, without publishing, and then opened, which upgrades it; the bundles
of that filling are placeholders. The adapters that the benchmark publishes and deletes are real, of 56 layers. Pages
are read through the store and over the HTTP route, in one process, at random places. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from fastapi import FastAPI, Request, Response
from rich.console import Console
from rich.table import Table

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, BaseInfo, ModuleSpec, expected_shapes
from benchmarks.last_line import tell
from sera_serve.config import ServeSettings
from sera_serve.engine import Presence
from sera_serve.loop_turns import LoopTurns
from sera_serve.server.auth import Caller
from sera_serve.server.deps import Executors
from sera_serve.server.native.adapters import router

SIZES = (5_000, 100_000)
PER_TENANT = 5
PAGE = 100
LAYERS, WIDTH, RANK = 8, 256, 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COLUMNS = {
    "page_ms": "page",
    "page_tenant_ms": "page of a tenant",
    "page_http_ms": "page, HTTP",
    "publish_ms": "publish",
    "delete_ms": "delete",
    "resolve_us": "resolve (us)",
    "fsync_ms": "one flush",
}


def real_bundle(seed: int) -> AdapterBundle:
    """A generator of 56 layers, 460 KB."""
    spec = ModuleSpec(d_in=WIDTH, d_out=WIDTH, rank=RANK, split=1, use_mixer=True, scaling=2.0)
    config = AdapterConfig(
        task="generate",
        method="sera",
        base=BaseInfo(
            name="base", architecture="LlamaForCausalLM", config_digest="c", weights_digest="w", hidden_size=WIDTH
        ),
        modules={f"model.layers.{layer}.{name}": spec for layer in range(LAYERS) for name in PROJECTIONS},
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(config)
    return AdapterBundle(config, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def adapter_ids(count: int, one_tenant: bool) -> list[str]:
    """The ids of the filling, ascending."""
    if one_tenant:
        return [f"acme/adapter-{index:06d}" for index in range(count)]
    return [f"tenant-{index // PER_TENANT:05d}/adapter-{index % PER_TENANT}" for index in range(count)]


def fill(root: Path, ids: list[str]) -> None:
    """Write a store of version 1 with one version of each adapter, as that release wrote it, without flushes."""
    for folder in ("bundles", "adapters", "retired", "tmp", "locks"):
        (root / folder).mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="store-scale-") as folder:
        store = AdapterStore(folder)
        store.publish(real_bundle(0), "a/b")
        record = json.loads((store.root / "adapters/a/b/versions/v1.json").read_text())
    for adapter in ids:
        directory = root / "adapters" / adapter
        (directory / "versions").mkdir(parents=True)
        (directory / "aliases").mkdir()
        record["digest"] = hashlib.sha256(adapter.encode()).hexdigest()
        (root / "bundles" / f"{record['digest']}.safetensors").write_text("a placeholder")
        (directory / "versions" / "v1.json").write_text(json.dumps(record))
        (directory / "aliases" / "latest.json").write_text('{"version": 1}')
    (root / "store.json").write_text('{"format": "sera-adapter-store", "version": 1}')


def milliseconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The time of one call, and what it returns."""
    start = time.perf_counter()
    result = work()
    return (time.perf_counter() - start) * 1e3, result


@dataclass
class Times:
    """The times of one kind of call: on the clock, and of the processor, which other programs disturb less."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @contextmanager
    def taken(self, unit: float = 1e3) -> Iterator[None]:
        """Add the time of the block, in 1 / `unit` seconds."""
        start, used = time.perf_counter(), time.process_time()
        yield
        self.clock.append((time.perf_counter() - start) * unit)
        self.processor.append((time.process_time() - used) * unit)

    def figures(self) -> dict[str, float]:
        """Median and longest."""
        median, longest = statistics.median(self.clock), max(self.clock)
        processor = statistics.median(self.processor)
        return {"median": round(median, 3), "max": round(longest, 3), "processor": round(processor, 3)}


class _NothingLoaded:
    """Stands for the engine in lists: every adapter is in the store alone."""

    def __init__(self) -> None:
        self._turns = LoopTurns()

    def loop_turns(self) -> LoopTurns:
        return self._turns

    def presence(self, adapters: Sequence[tuple[str, str]]) -> list[Presence]:
        return [Presence("store", False)] * len(adapters)


def _listing_app(store: AdapterStore) -> FastAPI:
    """The routes of adapters over a store, without an engine and without keys."""
    app = FastAPI()
    app.include_router(router)
    settings = ServeSettings(base="none", store=store.root)
    # What a list does not use is None.
    for name in ("publisher", "training", "holdings", "quotas", "metrics", "accounting", "audit"):
        setattr(app.state, name, None)
    app.state.engine, app.state.store, app.state.settings = _NothingLoaded(), store, settings
    app.state.executors = Executors.of(settings)

    @app.middleware("http")
    async def without_keys(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        request.state.caller = Caller(None, None, "")  # type: ignore[arg-type]
        return await answer(request)

    return app


class Scale:
    """One store of one size and shape, and what was wrong with it."""

    def __init__(self, root: Path, count: int, one_tenant: bool, samples: int) -> None:
        self.wrong: list[str] = []
        self._root = root
        self._ids = adapter_ids(count, one_tenant)
        self._one_tenant = one_tenant
        self._samples = samples
        self._random = random.Random(0)
        self._times = {column: Times() for column in COLUMNS}

    def run(self) -> dict[str, Any]:
        """Fill the store and measure; one row."""
        fill_ms, _ = milliseconds(lambda: fill(self._root, self._ids))
        upgrade_ms, store = milliseconds(lambda: AdapterStore(self._root, create=False))
        # A handle of its own: no process has read anything yet.
        open_ms, store = milliseconds(lambda: AdapterStore(self._root, create=False))
        first_ms, _ = milliseconds(lambda: store.list_page(limit=PAGE))
        self._pages(store)
        asyncio.run(self._http_pages(store))
        self._resolves(store)
        self._writes(store)
        collect_ms, freed = milliseconds(store.collect_garbage)
        self._check(freed.bundles == 0, f"a collection freed {freed.bundles} bundles")
        self._check(store.count_adapters() == len(self._ids), "an adapter is missing or too many")
        figures = {name: times.figures() for name, times in self._times.items()}
        return {
            "adapters": len(self._ids),
            "shape": "one tenant" if self._one_tenant else f"tenants of {PER_TENANT}",
            **figures,
            "first_page_ms": round(first_ms, 3),
            "open_ms": round(open_ms, 3),
            "fill_s": round(fill_ms / 1e3, 1),
            "upgrade_s": round(upgrade_ms / 1e3, 1),
            "collect_s": round(collect_ms / 1e3, 1),
        }

    def _pages(self, store: AdapterStore) -> None:
        for _ in range(self._samples):
            after = self._random.choice(self._ids)
            page = self._timed("page_ms", partial(store.list_page, after=after, limit=PAGE))
            self._check([info.adapter for info in page.adapters] == self._expected(None, after), f"page after {after}")
            tenant = after.split("/")[0]
            start = after if self._one_tenant else None
            page = self._timed("page_tenant_ms", partial(store.list_page, tenant, start, PAGE))
            expected = self._expected(tenant, start or "")
            self._check([info.adapter for info in page.adapters] == expected, f"page of {tenant}")

    async def _http_pages(self, store: AdapterStore) -> None:
        app = _listing_app(store)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://store") as client:
            await client.get("/v1/adapters")
            for _ in range(self._samples):
                after = self._random.choice(self._ids)
                with self._times["page_http_ms"].taken():
                    answer = await client.get("/v1/adapters", params={"after": after, "limit": PAGE})
                listed = [adapter["adapter"] for adapter in answer.json()["adapters"]]
                self._check(listed == self._expected(None, after), f"HTTP page after {after}")

    def _resolves(self, store: AdapterStore) -> None:
        for _ in range(self._samples * 10):
            adapter = self._random.choice(self._ids)
            with self._times["resolve_us"].taken(unit=1e6):
                resolved = store.resolve(adapter)
            self._check(resolved.digest == hashlib.sha256(adapter.encode()).hexdigest(), f"digest of {adapter}")

    def _writes(self, store: AdapterStore) -> None:
        """Publish new adapters between those that are there, and delete them in another order."""
        names = [f"{adapter}-new" for adapter in self._random.sample(self._ids, self._samples)]
        digests = {}
        for seed, name in enumerate(names, start=1):
            bundle = real_bundle(seed)
            digests[name] = bundle.digest
            published = self._timed("publish_ms", partial(store.publish, bundle, name))
            self._check(store.resolve(name).digest == published.digest == bundle.digest, f"publishing {name}")
            listed = store.list_page(name.split("/")[0], after=name[:-1], limit=1).adapters
            self._check([info.adapter for info in listed] == [name], f"{name} is not listed")
        self._random.shuffle(names)
        for name in names:
            self._flush()
            freed = self._timed("delete_ms", partial(store.delete, name))
            self._check(freed.digests == (digests[name],), f"deleting {name} freed {freed.digests}")

    def _flush(self) -> None:
        """Time one new file and the flush of its directory: what the disk makes a publish and a delete wait for."""
        folder = self._root / "tmp"
        (folder / "flushed").touch()
        descriptor = os.open(folder, os.O_RDONLY)
        self._timed("fsync_ms", partial(os.fsync, descriptor))
        os.close(descriptor)
        (folder / "flushed").unlink()

    def _timed(self, column: str, work: Callable[[], Any]) -> Any:
        with self._times[column].taken():
            return work()

    def _expected(self, tenant: str | None, after: str) -> list[str]:
        page = self._ids[bisect_right(self._ids, max(after, f"{tenant}/" if tenant else "")) :][:PAGE]
        return [adapter for adapter in page if tenant is None or adapter.startswith(f"{tenant}/")]

    def _check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """A table for people: median, the longest, and the median of processor time."""
    table = Table("adapters", "shape", *COLUMNS.values(), "first page", "open", "upgrade (s)", "collect (s)")
    for row in rows:
        figures = [
            f"{row[column]['median']:.2f} {row[column]['max']:.1f} {row[column]['processor']:.2f}" for column in COLUMNS
        ]
        once = [f"{row['first_page_ms']:.2f}", f"{row['open_ms']:.2f}", str(row["upgrade_s"]), str(row["collect_s"])]
        table.add_row(f"{row['adapters']:,}", row["shape"], *figures, *once)
    console.print(table)
    console.print("milliseconds where nothing else is said: median, longest, median of processor time")


def main(
    quick: Annotated[bool, typer.Option(help="500 adapters, few samples: seconds, and figures of no worth.")] = False,
    adapters: Annotated[list[int] | None, typer.Option(min=2 * PAGE, help="Sizes; may be given again.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the stores are made; their disk is measured.")] = None,
) -> None:
    """Measure, print a table, then one JSON line."""
    sizes = adapters or ([500] if quick else list(SIZES))
    samples = 10 if quick else 200
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    # Creating a thread pool of torch beside the measurement would disturb it.
    torch.set_num_threads(1)
    for size in sizes:
        for one_tenant in (False, True):
            root = Path(tempfile.mkdtemp(prefix="store-scale-", dir=folder))
            try:
                scale = Scale(root, size, one_tenant, samples)
                rows.append(scale.run())
                wrong += scale.wrong
            finally:
                shutil.rmtree(root)
    console = Console(stderr=True, width=180)
    for line in wrong[:20]:
        console.print(f"wrong: {line}", markup=False)
    facts = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": _machine(), "page": PAGE, "samples": samples}
    facts |= {"folder": str(folder or tempfile.gettempdir()), "load_average": round(os.getloadavg()[0], 1)}
    if not wrong:
        report(rows, console)
    tell("store_scale", rows, correct=not wrong, output=output, **facts)


def _machine() -> dict[str, Any]:
    return {"system": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}


if __name__ == "__main__":
    typer.run(main)
