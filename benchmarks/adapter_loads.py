"""How long an adapter of a large base takes from the store to the device pool, here a CPU's, with nothing else running.

Adapters on all linear layers of Llama-3-8B; the files are in the system's cache, the host cache is off. `One kind`:
all have the same layers, ranks and dtype, as adapters of one recipe have. `Own kinds`: each has other layers, so that
nothing that was read of one header serves for another.

    python -m benchmarks.adapter_loads
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from adapters_store import AdapterBundle, AdapterStore
from benchmarks.gpu.capacity import large_bundle
from benchmarks.gpu.operands import Member
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


def load_times(store: AdapterStore, digests: list[str], rounds: int) -> list[float]:
    """Milliseconds from the request of a lease to the lease; no adapter is in memory before."""
    index = {path: row for row, path in enumerate(large_bundle(Member(64, 64)).config.modules)}
    times = []
    # As a server does when it begins to serve.
    gc.collect()
    gc.freeze()
    for _ in range(rounds + 1):
        # A pool for one adapter: each load evicts the one before.
        pool = DevicePool(1 << 28, len(index), 1, torch.bfloat16)
        residency = AdapterResidency(store.loading, pool, HostCache(0), index)
        for digest in digests:
            began = time.perf_counter()
            lease = residency.acquire(digest).result()
            times.append((time.perf_counter() - began) * 1e3)
            lease.release()
            # Until the loader thread is idle again.
            time.sleep(0.01)
        residency.close()
    # The first round warms the system's cache.
    return times[len(digests) :]


def main(rounds: Annotated[int, typer.Option(help="Loads of each adapter.", min=1)] = 3) -> None:
    """Print a table, and one JSON object as the last line."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    console = Console(stderr=True)
    with console.status("loads"):
        for case, (member, dtype) in CASES.items():
            for kinds in ("one kind", "own kinds"):
                with tempfile.TemporaryDirectory() as folder:
                    store = AdapterStore(Path(folder))
                    digests, nbytes = publish(store, member, dtype, own_kinds=kinds == "own kinds")
                    times = load_times(store, digests, rounds)
                ms = {"median_ms": round(statistics.median(times), 1), "most_ms": round(max(times), 1)}
                found.append({"adapter": case, "kinds": kinds, "bytes": nbytes, **ms})
    table = Table("adapter", "MB", "kinds", "median", "longest")
    for row in found:
        megabytes = f"{row['bytes'] / 1e6:.1f}"
        table.add_row(row["adapter"], megabytes, row["kinds"], f"{row['median_ms']} ms", f"{row['most_ms']} ms")
    console.print(table)
    typer.echo(json.dumps({"benchmark": "adapter_loads", "rows": found}))


if __name__ == "__main__":
    typer.run(main)
