"""Adapters in a GiB, how long one takes from host to device, and launches with thousands of adapters in the pool."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, BaseInfo, ModuleSpec
from benchmarks.gpu.kernel_check import compared
from benchmarks.gpu.operands import Member
from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.timing import Timed, interleaved
from sera_kernels import AdapterBatch
from sera_serve.residency import DevicePool, PackedAdapter, pack

LOADS, READS = 15, 3
RESIDENT, TOKENS = 10_000, 64
# (d_in, d_out) by name in one layer of Llama-3-8B.
LINEARS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}
LAYERS = 32


def measure_capacity(setting: Setting) -> list[Row]:
    """One row for each member: size of an adapter, adapters in a GiB, times of a load's parts."""
    rows = []
    for member in (Member(64, 64), Member(16, 16), Member(64, 1, False), Member(16, 1, False)):
        bundle = large_bundle(member, small=setting.small)
        adapter, times = _read(setting, bundle)
        row = {"system": member.name, "adapter_bytes": adapter.data.nbytes}
        rows.append(row | _measure(setting, adapter) | times)
        setting.say(f"capacity: {member.name}")
    return rows


def measure_residents(setting: Setting) -> list[Row]:
    """Fill a pool with 10,000 adapters, or as many as fit, and time launches for 64 of them.

    Where a launch gives a wrong result, the row is that: no figure would mean anything.
    """
    bundle = large_bundle(Member(64, 64), small=setting.small)
    index = {path: row for row, path in enumerate(bundle.config.modules)}
    adapter = pack(bundle, index, torch.bfloat16)
    free = torch.cuda.mem_get_info()[0] if setting.on_gpu else 1 << 23
    # The rest is for what launches need.
    count = min(RESIDENT, int(0.95 * free) // adapter.data.nbytes)
    pool = DevicePool(count * adapter.data.nbytes, len(index), count, torch.bfloat16, setting.device)
    # An adapter begins 8 elements after the one before, so each has other factors.
    values = (torch.randn(len(adapter.data) + 8 * count) / 8).to(torch.bfloat16)
    start = time.perf_counter()
    for i in range(count):
        placement = pool.reserve(adapter.layout)
        assert placement is not None
        pool.fill(placement, values[8 * i : 8 * i + len(adapter.data)])
    fill_s = time.perf_counter() - start
    setting.say(f"capacity: {count} adapters are resident")
    specs = list(bundle.config.modules.values())
    layers = len(index) // len(LINEARS)
    x = torch.randn(TOKENS, specs[0].d_in, device=setting.device).to(torch.bfloat16)
    # The outputs are updates alone, beside which no error is small.
    ys = [x.new_zeros(TOKENS, spec.d_out) for spec in specs[:3]]
    cases = {}
    for name, last in (("neighbours", min(TOKENS, count) - 1), ("spread", count - 1)):
        slots = torch.linspace(0, last, TOKENS).round().to(setting.device, torch.int32)
        batch = AdapterBatch(slots)

        def launch(i: int, batch: AdapterBatch = batch) -> None:
            # Queries, keys and values of one layer after the other, so that factors come from memory.
            first = i % layers * len(LINEARS)
            setting.operation[1](x, ys, range(first, first + 3), batch, pool.data, pool.tables)

        launch(0)
        zeros = [torch.zeros_like(y) for y in ys]
        row = compared(x, ys, zeros, slots, pool.data, pool.tables)
        if not row["correct"]:
            return [{"adapters": count, "case": name} | row]
        for y in ys:
            y.zero_()
        cases[name] = Timed(launch, layers)
    times = interleaved(setting, cases)
    gib = count * adapter.data.nbytes / (1 << 30)
    return [{"adapters": count, "gib": gib, "fill_s": fill_s} | {f"{name}_us": us for name, us in times.items()}]


def large_bundle(member: Member, *, small: bool = False) -> AdapterBundle:
    """An adapter on all linear layers of Llama-3-8B; small: one decoder layer of a sixteenth of its widths."""
    scale, layers = (16, 1) if small else (1, LAYERS)
    modules: dict[str, ModuleSpec] = {}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for name, widths in LINEARS.items():
            d_in, d_out = (max(64, width // scale) for width in widths)
            path = f"model.layers.{layer}.{name}"
            modules[path] = ModuleSpec(
                d_in=d_in, d_out=d_out, rank=member.rank, split=member.split, use_mixer=member.mixer, scaling=1.0
            )
            segment_rank = member.rank // member.split
            shapes = {"sera_a": (d_in, segment_rank), "sera_b": (segment_rank, d_out)}
            if member.mixer:
                shapes["sera_c"] = (member.rank, member.rank)
            tensors |= {f"{path}.{key}": torch.ones(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    base = BaseInfo(
        name="llama-3-8b", architecture="LlamaForCausalLM", config_digest="0", weights_digest="0", hidden_size=4096
    )
    return AdapterBundle(AdapterConfig(task="generate", method="sera", base=base, modules=modules), tensors)


def _read(setting: Setting, bundle: AdapterBundle) -> tuple[PackedAdapter, Row]:
    """The adapter as a server packs it, and milliseconds of reading it from a store, checks included, and of packing.

    The file is in the system's cache.
    """
    index = {path: row for row, path in enumerate(bundle.config.modules)}
    times: dict[str, list[float]] = {"read_ms": [], "pack_ms": []}
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder))
        store.publish(bundle, "acme/a")
        for _ in range(READS):
            start = time.perf_counter()
            read = store.load(bundle.digest)
            middle = time.perf_counter()
            packed = pack(read, index, torch.bfloat16)
            times["read_ms"].append((middle - start) * 1e3)
            times["pack_ms"].append((time.perf_counter() - middle) * 1e3)
    return packed, {name: statistics.median(values) for name, values in times.items()}


def _measure(setting: Setting, adapter: PackedAdapter) -> Row:
    nbytes = (1 << 22) if setting.small else 1 << 30
    pool = DevicePool(nbytes, len(adapter.layout.modules), 4096, torch.bfloat16, setting.device)
    placement = pool.reserve(adapter.layout)
    if placement is None:
        return {"adapters_per_gib": 0}
    seconds = []
    for _ in range(2 if setting.small else LOADS):
        _wait(setting)
        start = time.perf_counter()
        pool.fill(placement, adapter.data)
        _wait(setting)
        seconds.append(time.perf_counter() - start)
    count = 1
    while pool.reserve(adapter.layout) is not None:
        count += 1
    pool.check_invariants()
    milliseconds = statistics.median(seconds) * 1e3
    return {
        "adapters_per_gib": count * (1 << 30) // nbytes,
        "load_ms": milliseconds,
        "load_gb_per_s": adapter.data.nbytes / milliseconds / 1e6,
    }


def _wait(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()
