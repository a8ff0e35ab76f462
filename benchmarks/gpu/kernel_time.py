"""One launch at Llama-3-8B shapes, beside its byte bound and beside LoRA computed by others.

Operands rotate from launch to launch over three times the second-level cache where memory allows, so that activations
and factors come from memory, as the bound counts them; a row whose operands stay in the cache says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.lora_peers import LoraFactors, adapter_loop, gathered_bmm, peers_disagree, vllm_kernels
from benchmarks.gpu.operands import (
    Activations,
    Member,
    activation_bytes,
    factor_bytes,
    sera_launch,
    spread,
    uniform_pool,
)
from benchmarks.gpu.setting import Row, SectionSkipped, Setting
from benchmarks.gpu.timing import Timed, interleaved
from benchmarks.gpu.vllm import VllmKernels, load_vllm_kernels
from sera_kernels import AdapterBatch, AdapterTables

DTYPE = torch.bfloat16
MEMBERS = (Member(64, 64), Member(16, 16), Member(64, 16), Member(16, 1, False))
LORA_RANKS = (64, 16)
MAIN = MEMBERS[0].name
# Decode first, and among its points the ones that figures are asked of.
POINTS = ((64, 64), (1, 1), (256, 256), (16, 16), (64, 1), (64, 8), (16, 1), (256, 1), (256, 16), (2048, 1), (2048, 8))
SHAPES = (
    (4096, (4096,)),
    (4096, (1024,)),
    (4096, (14336,)),
    (14336, (4096,)),
    (4096, (4096, 1024, 1024)),
    (4096, (14336, 14336)),
)
MAX_SETS = 128
# Beyond this the gathered factors of a prefill do not fit beside the rest.
GATHER_LIMIT = 12 << 30


@dataclass(frozen=True)
class Point:
    """One shape and batch."""

    d_in: int
    d_outs: tuple[int, ...]
    tokens: int
    adapters: int

    @property
    def row(self) -> Row:
        """Columns that name it."""
        shape = f"{self.d_in}->{'+'.join(map(str, self.d_outs))}"
        return {"shape": shape, "tokens": self.tokens, "adapters": self.adapters}

    def bytes(self, member: Member) -> int:
        """What a launch must move at least."""
        moved = activation_bytes(self.tokens, self.d_in, self.d_outs, DTYPE.itemsize)
        return moved + factor_bytes(member, self.adapters, self.d_in, self.d_outs, DTYPE.itemsize)


@dataclass(frozen=True)
class Peers:
    """The ways of others to compute LoRA; vLLM's kernels where there are any."""

    vllm: VllmKernels | None

    def launches(self, activations: Activations, slots: Tensor, factors: LoraFactors, count: int) -> dict[str, Timed]:
        """What is timed, by name; graphs of up to `count` launches."""
        found = {}
        if self.vllm is not None:
            found["vllm"] = Timed(vllm_kernels(self.vllm, activations, slots, factors), count)
        a, b = factors.of(0)[0]
        if len(slots) * (a[0].numel() + b[0].numel()) * a.element_size() <= GATHER_LIMIT:
            found["bmm"] = Timed(gathered_bmm(activations, slots, factors), min(count, 16))
        found["loop"] = Timed(adapter_loop(activations, slots, factors), min(count, 4))
        return found


def load_peer(setting: Setting) -> tuple[VllmKernels | None, str | None]:
    """vLLM's kernels, or why there are none."""
    if setting.peer_kernels is None:
        return None, "no --peer-kernels DIR was given"
    try:
        kernels = load_vllm_kernels(setting.peer_kernels)
    except SectionSkipped as error:
        return None, str(error)
    if not setting.on_gpu:
        return None, "it loads, and is timed on a GPU only"
    try:
        wrong = peers_disagree(kernels, setting.device)
    except Exception as error:  # noqa: BLE001 - code of any version, which nothing else here depends on
        return None, f"its kernels do not run here: {type(error).__name__}: {error}"
    return (None, f"its kernels answer differently: {wrong}") if wrong else (kernels, None)


def time_kernel(setting: Setting) -> Iterator[Row]:
    """Rows of this project's kernel at every point."""
    return _time(setting, MEMBERS, None)


def time_peers(setting: Setting) -> Iterator[Row]:
    """Rows of LoRA as others compute it, beside SeRA r=64 at the same points."""
    kernels, why_not = load_peer(setting)
    if why_not:
        yield {"system": "vllm", "status": "skipped", "reason": why_not}
    yield from _time(setting, MEMBERS[:1], Peers(kernels))


def _time(setting: Setting, members: Sequence[Member], peers: Peers | None) -> Iterator[Row]:
    """Rows by system and point; points that time did not allow are rows too, without a figure."""
    figures = setting.figure("memory_bytes_per_s"), setting.figure("empty_launch_us")
    for point in _points(setting):
        if setting.out_of_time():
            yield {**point.row, "missing": "not reached"}
            continue
        try:
            yield from _point_rows(setting, point, members, peers, *figures)
        except torch.OutOfMemoryError as error:
            yield {**point.row, "missing": str(error).splitlines()[0]}
        if setting.on_gpu:
            # The graphs' own memory, which the next point cannot use otherwise.
            torch.cuda.empty_cache()


def _points(setting: Setting) -> list[Point]:
    if setting.small:
        return [Point(64, (64,), 4, 4), Point(64, (64, 128), 4, 2)]
    return [Point(d_in, d_outs, tokens, adapters) for tokens, adapters in POINTS for d_in, d_outs in SHAPES]


def _point_rows(
    setting: Setting,
    point: Point,
    chosen: Sequence[Member],
    peers: Peers | None,
    bandwidth: float,
    empty_us: float,
) -> list[Row]:
    cases, members = _cases(setting, point, chosen, peers)
    times = interleaved(setting, cases)
    rows = []
    for name, us in times.items():
        moved = point.bytes(members[name])
        bound = moved / bandwidth * 1e6 + empty_us
        # Bytes that a graph's launches touch: below 1, launches find their operands in the cache.
        rotated = moved * min(_sets(setting, point, members[name]), cases[name].launches) / setting.l2_bytes
        row = {**point.row, "system": name, "us": us, "bound_us": bound, "over_bound": us / bound}
        rows.append(row | {"times_sera_64": us / times[MAIN], "rotated_over_l2": round(rotated, 2)})
    return rows


def _cases(
    setting: Setting, point: Point, chosen: Sequence[Member], peers: Peers | None
) -> tuple[dict[str, Timed], dict[str, Member]]:
    """What is timed at a point, and the member of the family that each computes."""
    cases: dict[str, Timed] = {}
    members: dict[str, Member] = {}
    slots = spread(point.tokens, point.adapters, setting.device)
    batch = AdapterBatch(slots)
    loras = [Member(rank, 1, False) for rank in LORA_RANKS] if peers else []
    most = max(_sets(setting, point, member) for member in (*chosen, *loras))
    activations = Activations.make(most, point.tokens, point.d_in, point.d_outs, DTYPE, setting.device)
    least_launches = 2 if setting.small else 4 if point.tokens > 256 else 16
    for member in chosen:
        sets = _sets(setting, point, member)
        shapes = [(point.d_in, d_out) for d_out in point.d_outs] * sets
        pool, tables = uniform_pool(shapes, point.adapters, member, DTYPE, setting.device)
        launch = sera_launch(setting.operation[1], activations, batch, pool, tables)
        cases[member.name], members[member.name] = Timed(launch, max(sets, least_launches)), member
        if member == MEMBERS[0] and peers is None and (point.d_in, point.d_outs) == SHAPES[0]:
            name = f"{member.name} + batch"
            cases[name], members[name] = Timed(_with_batch(setting, activations, slots, pool, tables), sets), member
    if peers is not None:
        for member in loras:
            sets = _sets(setting, point, member)
            factors = LoraFactors.make(sets, point.adapters, member.rank, point.d_in, point.d_outs, activations.x)
            made = peers.launches(activations, slots, factors, max(sets, least_launches))
            cases |= {f"lora r={member.rank} {name}": timed for name, timed in made.items()}
            members |= {f"lora r={member.rank} {name}": member for name in made}
    return cases, members


def _with_batch(
    setting: Setting, activations: Activations, slots: Tensor, pool: Tensor, tables: AdapterTables
) -> Callable[[int], None]:
    """A launch whose batch is made with it, as the first launch of a step does."""

    def launch(i: int) -> None:
        sera_launch(setting.operation[1], activations, AdapterBatch(slots), pool, tables)(i)

    return launch


def _sets(setting: Setting, point: Point, member: Member) -> int:
    """Sets of operands that launches rotate over: three times the cache, within reason."""
    return max(1, min(MAX_SETS, 3 * setting.l2_bytes // point.bytes(member)))
