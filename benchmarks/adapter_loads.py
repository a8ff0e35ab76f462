"""How long an adapter of a large base takes from the store to the device pool, here a CPU's, with nothing else running.

Adapters on all linear layers of Llama-3-8B; the files are in the system's cache, the host cache is off. `One kind`:
all have the same layers, ranks and dtype, as adapters of one recipe have. `Own kinds`: each has other layers, so that
nothing that was read of one header serves for another. Each adapter is loaded once before, and what the pool then has
is compared with its file.

    python -m benchmarks.adapter_loads
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from adapters_store import AdapterBundle, AdapterStore
from benchmarks.gpu.capacity import large_bundle
from benchmarks.gpu.operands import Member
from benchmarks.last_line import tell
from sera_kernels.operands import ABSENT
from sera_serve.residency import AdapterResidency, DevicePool, HostCache

CASES = {
    "SeRA r = 64, bfloat16": (Member(64, 64), torch.bfloat16),
    "SeRA r = 64, float32": (Member(64, 64), torch.float32),
    "LoRA r = 16, bfloat16": (Member(16, 1, False), torch.bfloat16),
}
# More than the tables of headers that are kept.
_ADAPTERS = 20


def publish(store: AdapterStore, member: Member, dtype: torch.dtype, *, own_kinds: bool) -> tuple[list[str], int]:
    """Digests of adapters that differ in every number, and the bytes of the first."""
    shape = large_bundle(member)
    digests, nbytes = [], 0
    for i in range(_ADAPTERS):
        left_out = list(shape.config.modules)[i] if own_kinds else None
        modules = {path: spec for path, spec in shape.config.modules.items() if path != left_out}
        config = shape.config.model_copy(update={"modules": modules, "training": {"seed": i}})
        tensors = {
            name: torch.randn(tensor.shape).mul_(0.01).to(dtype)
            for name, tensor in shape.tensors.items()
            if name.rpartition(".")[0] in modules
        }
        bundle = AdapterBundle(config, tensors)
        nbytes = nbytes or bundle.nbytes
        digests.append(store.publish(bundle, f"acme/a{i}").digest)
    return digests, nbytes


@contextmanager
def empty_pool(store: AdapterStore, index: dict[str, int]) -> Iterator[tuple[AdapterResidency, DevicePool]]:
    """A pool for one adapter: each load evicts the one before."""
    pool = DevicePool(1 << 28, len(index), 1, torch.bfloat16)
    residency = AdapterResidency(store.loading, pool, HostCache(0), index)
    try:
        yield residency, pool
    finally:
        residency.close()


def loaded_as_stored(store: AdapterStore, digests: list[str], index: dict[str, int]) -> bool:
    """Load each adapter once, and say whether the pool has its factors: A, then C, then B, in the pool's dtype."""
    correct = True
    with empty_pool(store, index) as (residency, pool):
        for digest in digests:
            tensors, lease = store.load(digest).tensors, residency.acquire(digest).result()
            for path, row in index.items():
                place = int(pool.tables.offset[row, lease.slot])
                names = [name for factor in "acb" if (name := f"{path}.sera_{factor}") in tensors]
                correct &= bool(names) == (place != ABSENT)
                for want in (tensors[name].flatten().to(torch.bfloat16) for name in names):
                    correct &= torch.equal(pool.data[place : place + len(want)], want)
                    place += len(want)
            lease.release()
    return correct


def load_times(store: AdapterStore, digests: list[str], index: dict[str, int], rounds: int) -> list[float]:
    """Milliseconds from the request of a lease to the lease; no adapter is in memory before."""
    times = []
    # As a server does when it begins to serve.
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        with empty_pool(store, index) as (residency, _):
            for digest in digests:
                began = time.perf_counter()
                lease = residency.acquire(digest).result()
                times.append((time.perf_counter() - began) * 1e3)
                lease.release()
                # Until the loader thread is idle again.
                time.sleep(0.01)
    gc.unfreeze()
    return times


def main(rounds: Annotated[int, typer.Option(help="Loads of each adapter.", min=1)] = 3) -> None:
    """Print a table, and one JSON object as the last line."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    index = {path: row for row, path in enumerate(large_bundle(Member(64, 64)).config.modules)}
    found: list[dict[str, Any]] = []
    correct = True
    console = Console(stderr=True)
    with console.status("loads"):
        for case, (member, dtype) in CASES.items():
            for kinds in ("one kind", "own kinds"):
                with tempfile.TemporaryDirectory() as folder:
                    store = AdapterStore(Path(folder))
                    digests, nbytes = publish(store, member, dtype, own_kinds=kinds == "own kinds")
                    # It also brings the files into the system's cache.
                    correct &= loaded_as_stored(store, digests, index)
                    times = load_times(store, digests, index, rounds)
                ms = {"median_ms": round(statistics.median(times), 1), "most_ms": round(max(times), 1)}
                found.append({"adapter": case, "kinds": kinds, "bytes": nbytes, **ms})
    table = Table("adapter", "MB", "kinds", "median", "longest")
    for row in found:
        megabytes = f"{row['bytes'] / 1e6:.1f}"
        table.add_row(row["adapter"], megabytes, row["kinds"], f"{row['median_ms']} ms", f"{row['most_ms']} ms")
    console.print(table if correct else "wrong: an adapter on the device is not that of its file; no speed is reported")
    tell("adapter_loads", found, correct=correct)


if __name__ == "__main__":
    typer.run(main)
