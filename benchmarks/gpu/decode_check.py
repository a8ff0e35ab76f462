"""A decode step with adapters against merged weights, through one CUDA graph over changing slots."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.gpu.decode_model import DecodeStep, adapt, random_llama
from benchmarks.gpu.setting import Row, Setting
from sera_kernels import NO_ADAPTER, AdapterTables
from sera_serve.layers import AdapterContext, adaptable_linears, linear_widths

# Of float32 logits against those of merged weights, and of bfloat16 ones, whose merged weights are rounded too.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_decode(setting: Setting) -> Iterator[Row]:
    """A two-layer base with three adapters: logits against merged weights, through one graph over changing slots."""
    for dtype in (torch.float32, torch.bfloat16):
        model = random_llama(setting, 2, dtype)
        linears = adaptable_linears(model)
        base_only = DecodeStep.make(model, 4, 16)
        context = adapt(model, 3, dtype)
        step = base_only.over(context, torch.zeros_like(base_only.slots))
        run = step.ready(setting)
        got = []
        for slot in (0, 1, 2, NO_ADAPTER):
            # Beside it another adapter and the base model, so that a mixed batch is what is checked.
            step.slots.copy_(torch.tensor([slot, 2, slot, NO_ADAPTER]))
            step.rewind()
            run()
            got.append(step.logits[::2].clone())
        for slot, mine in zip((0, 1, 2, NO_ADAPTER), got, strict=True):
            want = _merged_logits(base_only, linears, context, slot)
            error = ((mine - want).norm() / want.norm()).item()
            correct = error <= TOLERANCE[dtype]
            if dtype == torch.float32:
                correct &= torch.equal(mine.argmax(-1), want.argmax(-1))
            moved = ((want - got[-1]).norm() / want.norm()).item()
            # An adapter that changes nothing would prove nothing.
            correct &= slot == NO_ADAPTER or moved > 2 * TOLERANCE[dtype]
            case = {"case": "decode, merged weights", "dtype": str(dtype).removeprefix("torch."), "slot": slot}
            yield {**case, "correct": correct, "error": error, "moved_by_adapter": moved}


def _merged_logits(base_only: DecodeStep, linears: dict[str, nn.Module], context: AdapterContext, slot: int) -> Tensor:
    """Logits of every second sequence with one adapter in the weights themselves and no adapter in the pass."""
    kept = [linear.get_parameter("weight").clone() for linear in linears.values()]
    if slot != NO_ADAPTER:
        for module, linear in enumerate(linears.values()):
            delta = _delta(context.pool, context.tables, module, slot, *linear_widths(linear))
            weight = linear.get_parameter("weight")
            weight.copy_((weight.double() + delta.T).to(weight.dtype))
    base_only.rewind()
    base_only.run()
    for linear, before in zip(linears.values(), kept, strict=True):
        linear.get_parameter("weight").copy_(before)
    return base_only.logits[::2].clone()


def _delta(pool: Tensor, tables: AdapterTables, module: int, slot: int, d_in: int, d_out: int) -> Tensor:
    (entry,) = tables.entries(module, [slot])
    a, c, b = (None if factor is None else factor.double() for factor in entry.factors(pool, d_in, d_out))
    assert a is not None and b is not None
    left = torch.block_diag(*a.view(entry.split, -1, entry.segment_rank))
    right = torch.block_diag(*b.view(entry.segment_rank, entry.split, -1).transpose(0, 1))
    mixed: Tensor = left if c is None else left @ c
    delta: Tensor = (mixed @ right) * entry.scaling
    return delta
