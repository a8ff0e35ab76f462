"""Recording a step's operations on a CPU and running them again on the same memory, as a CUDA graph would.

A graph keeps kernels and addresses: what Python did between two kernels is not run again. So a step whose recording,
replayed over new contents of its buffers, gives what the step itself gives, may be captured. The recorder also names
what a capture would refuse: operations that read the device or have a shape that depends on data, and reads by Python.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sera_kernels import AdapterBatch, AdapterTables
from sera_serve.engine import ServingEngine
from sera_serve.engine.loop.attention import KeyValuePool
from sera_serve.engine.loop.captures import Static
from sera_serve.engine.loop.row_tables import DeviceRows
from sera_serve.engine.loop.static_step import StaticBatch, StaticKey, StaticLaunch, StaticStep
from sera_serve.engine.request import classes_of

# Sizes of a recorded step: a batch runs in the smallest that holds it. The last one is for prompts.
SIZES = (4, 16, 96)
# Known readers of the device that older releases of torch do not mark by a tag.
_READERS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::allclose",
    "aten::argwhere",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# How Python looks into a tensor; on a CPU most of these reach no dispatch mode.
_HOST_READS = ("__bool__", "__contains__", "__float__", "__index__", "__int__", "cpu", "item", "numpy", "tolist")


K = TypeVar("K")
S = TypeVar("S", bound=Static)


class Recording(TorchDispatchMode):
    """Operations with the very tensors that they read and made.

    Attributes:
        operations: Names of the operations, in order.
        data_dependent: Those that read the device, or whose result's shape depends on data.
        host_reads: Methods by which Python looked into a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.data_dependent: list[str] = []
        self.host_reads: list[str] = []
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @property
    def operations(self) -> list[str]:
        return [str(function) for function, _, _, _ in self._calls]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block, note every operation and every read."""
        with pytest.MonkeyPatch.context() as patch, self:
            for name in _HOST_READS:
                patch.setattr(Tensor, name, self._noted(name, getattr(Tensor, name)))
            yield

    def replay(self) -> None:
        """Run the operations again, each on the memory of its first run."""
        for function, args, kwargs, results in self._calls:
            if function._schema.is_mutable:
                function(*args, **kwargs)
                continue
            read = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            made = [tensor for tensor in _tensors(results) if tensor.untyped_storage().data_ptr() not in read]
            if made:
                # A view needs no work: its memory is written by what it is a view of.
                for old, new in zip(_tensors(results), _tensors(function(*args, **kwargs)), strict=True):
                    old.copy_(new)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _is_data_dependent(function, args):
            self.data_dependent.append(str(function))
        results = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, results))
        return results

    def _noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        recording = threading.get_ident()

        def read(*args: Any, **kwargs: Any) -> Any:
            # Threads that load adapters read host memory meanwhile.
            if threading.get_ident() == recording:
                self.host_reads.append(name)
            return method(*args, **kwargs)

        return read


class RecordedCaptures(Generic[K, S]):
    """Stands for `Captures`: the first run of each key is recorded, all later ones are its replay."""

    def __init__(self, make: Callable[[K], S], what: str) -> None:
        self.recordings: dict[K, Recording] = {}
        self.replays = 0
        self._make = make
        self._works: dict[K, S] = {}

    def __len__(self) -> int:
        return len(self._works)

    def __contains__(self, key: object) -> bool:
        return key in self._works

    def can_run(self, key: Callable[[], K]) -> bool:
        return True

    def get(self, key: K) -> tuple[S, Any]:
        if key not in self._works:
            work = self._works[key] = self._make(key)
            recording = self.recordings[key] = Recording()
            with pytest.MonkeyPatch.context() as patch:
                # Models ask, and do not look at their masks then.
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                with recording.recording():
                    work.run()
        return self._works[key], SimpleNamespace(replay=lambda: self._replay(key))

    def check(self) -> None:
        """What was recorded can be captured."""
        for key, recording in self.recordings.items():
            assert len(recording.operations) > 20, key
            assert recording.data_dependent == [] and recording.host_reads == [], key

    def _replay(self, key: K) -> None:
        self.recordings[key].replay()
        self.replays += 1


class Replayed:
    """Static steps of an engine: the first of each key is recorded, all later ones are its replay.

    With `late`, the device does nothing until the host waits for it, and then no more than it must. What the host
    changes too early, because it believes that a step has run, changes the step's outcome.

    Attributes:
        recordings: By key.
        replays: How many steps were replays.
        ahead: How many steps were launched before the step before them had been waited for.
        batches: The requests' names and rows, of each step.
        prompts: How many prompts ran in such steps.
        chosen: How many of their tokens were not chosen by the step itself.
        joined: How many of them in steps that were launched ahead.
    """

    most_tokens = SIZES[-1]

    def __init__(self, engine: ServingEngine, late: bool = False) -> None:
        self.recordings: dict[StaticKey, Recording] = {}
        self.replays = self.ahead = self.prompts = self.joined = self.chosen = 0
        self.batches: list[tuple[tuple[str, int], ...]] = []
        self._steps: dict[StaticKey, StaticStep] = {}
        self._late = late
        self._queue: deque[Callable[[], None]] = deque()
        self.runner = engine.runners["generate"].runner
        model = self.runner.decoder.model
        self._rows = DeviceRows(self.runner.tables, model.device, model.vocabulary, model.logits_dtype)
        self.runner.static = self
        if late:
            self._keep_in_order(self.runner.decoder.pool)

    def can_run(self, batch: StaticBatch) -> bool:
        return True

    def launch(self, batch: StaticBatch, ahead: int) -> StaticLaunch:
        requests = batch.requests
        tokens = next(size for size in SIZES if size >= batch.tokens)
        key = StaticKey(
            tokens=tokens,
            requests=min(tokens, len(self.runner.tables.pages)),
            classes=classes_of(requests),
            sampled=any(request.params.temperature > 0 for request in requests),
            truncated=any(request.has_truncation for request in requests),
        )
        self.batches.append(tuple((request.id, request.row) for request in requests))
        self.ahead += ahead
        self.prompts += len(batch.prompts)
        self.chosen += sum(request.needs_logits for request in requests)
        self.joined += ahead * len(batch.prompts)
        runner = self.runner
        if key not in self._steps:
            with torch.inference_mode(False):
                self._steps[key] = StaticStep(runner.decoder, self._rows, key)
        step = self._steps[key]
        if self._late:
            self._enqueue(partial(self._rows.upload, self._rows.stage(runner.tables)))
        else:
            self._rows.bring(runner.tables)
        turn = step.stage(batch, runner.tables, ahead)
        for work in (partial(step.upload, turn), partial(self._run, key), partial(step.download, turn)):
            self._enqueue(work)
        done = [False]
        self._enqueue(lambda: done.__setitem__(0, True))

        def wait() -> list[int]:
            while not done[0]:
                self._queue.popleft()()
            return step.tokens(turn, len(requests))

        return StaticLaunch(wait, self._rows.logits[: len(requests)])

    def check(self) -> None:
        """What was recorded can be captured."""
        for key, recording in self.recordings.items():
            assert len(recording.operations) > 20, key
            assert recording.data_dependent == [] and recording.host_reads == [], key

    def _enqueue(self, work: Callable[[], None]) -> None:
        if self._late:
            self._queue.append(work)
        else:
            work()

    def _run(self, key: StaticKey) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if key in self.recordings:
                self.recordings[key].replay()
                self.replays += 1
            else:
                recording = Recording()
                with recording.recording():
                    self._steps[key].run()
                self.recordings[key] = recording

    def _keep_in_order(self, pool: KeyValuePool) -> None:
        """Have the rest of the loop's work on the device come after what was launched before it."""
        clear, runner = pool.clear, self.runner

        def in_order(work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                while self._queue:
                    self._queue.popleft()()
                return work(*args)

            return run

        pool.clear = lambda pages: self._enqueue(partial(clear, pages))  # type: ignore[method-assign]
        runner._run_packed = in_order(runner._run_packed)  # type: ignore[method-assign]
        runner._choose = in_order(runner._choose)  # type: ignore[method-assign]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_data_dependent(function: Any, args: tuple[Any, ...]) -> bool:
    name = function._schema.name
    if name in _READERS or str(function) == "aten.repeat_interleave.Tensor":
        return True
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        # By a mask: a nonzero in disguise.
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags


def static_add_updates(max_rank: int) -> Callable[..., None]:
    """Make a stand-in for the Triton kernels: the grouped operation as torch operations whose shapes are static.

    Semantics: y[t] += scaling * ((x[t] A) C) B of the adapter in slot s of token t, for s >= 0. In batches that may
    have vectors, then y[t] = gain * y[t] + offset.

    Args:
        max_rank: The largest rank of any adapter; smaller ones are masked.
    """

    def add_updates(
        x: Tensor,
        outputs: Sequence[Tensor],
        modules: Sequence[int],
        batch: AdapterBatch,
        pool: Tensor,
        tables: AdapterTables,
    ) -> None:
        rows = x.reshape(-1, x.shape[-1])
        slot = batch.token_slots.long().clamp(min=0)
        for y, module in zip(outputs, modules, strict=True):
            target = y.view(-1, y.shape[-1])
            offset = tables.offset[module, slot].long()
            used = (batch.token_slots >= 0) & (offset >= 0)
            shape = (tables.rank[module, slot].long(), tables.split[module, slot].long().clamp(min=1))
            update = _update(rows, target.shape[1], offset, shape, tables.mixer[module, slot].bool(), pool, max_rank)
            update = update * tables.scaling[module, slot].to(x.dtype)[:, None]
            target.add_(torch.where(used[:, None], update, torch.zeros_like(update)))
            if batch.classes_in(tables).vectors:
                place = tables.vectors[module, slot]
                at = place.clamp(0, len(pool) - 2 * target.shape[1])[:, None] + torch.arange(target.shape[1])
                scaled = pool[at] * target + pool[at + target.shape[1]]
                target.copy_(torch.where((used & (place >= 0))[:, None], scaled, target))

    return add_updates


def _update(
    x: Tensor, d_out: int, offset: Tensor, shape: tuple[Tensor, Tensor], mixes: Tensor, pool: Tensor, max_rank: int
) -> Tensor:
    """((x A) C) B for one adapter a token; shape is (rank, split), each int64 (tokens,)."""
    d_in = x.shape[1]
    rank, split = (each[:, None, None] for each in shape)
    at = offset.clamp(min=0)[:, None, None]
    segment = (rank // split).clamp(min=1)
    r, i, n = (torch.arange(size, device=x.device) for size in (max_rank, d_in, d_out))
    zero = torch.zeros((), dtype=pool.dtype, device=x.device)

    def factor(index: Tensor, inside: Tensor) -> Tensor:
        return torch.where(inside, pool[index.clamp(0, len(pool) - 1)], zero)

    # A is stored d_in x segment_rank, C rank x rank, B segment_rank x d_out, one after the other.
    a = factor(at + i[:, None] * segment + r % segment, (r < rank) & (i[:, None] * split // d_in == r // segment))
    reduced = (x[:, :, None] * a).sum(1)
    at = at + d_in * segment
    c = factor(at + r[:, None] * rank + r, (r[:, None] < rank) & (r < rank))
    mixed = torch.where(mixes[:, None], (reduced[:, :, None] * c).sum(1), reduced)
    at = at + torch.where(mixes[:, None, None], rank * rank, 0)
    inside = (r[:, None] < rank) & (n * split // d_out == r[:, None] // segment)
    b = factor(at + (r[:, None] % segment) * d_out + n, inside)
    return (mixed[:, :, None] * b).sum(1)
