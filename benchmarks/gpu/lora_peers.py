"""LoRA the ways others compute it: gathered bmm, a loop over adapters, and vLLM's shrink and expand kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.operands import Activations
from benchmarks.gpu.vllm import VllmKernels

SCALING = 0.01


@dataclass(frozen=True)
class LoraFactors:
    """LoRA factors of all adapters, in sets that launches rotate over.

    Attributes:
        a: For each output, (sets, adapters, d_in, rank).
        b: For each output, (sets, adapters, rank, d_out).
    """

    a: list[Tensor]
    b: list[Tensor]

    @classmethod
    def make(cls, sets: int, adapters: int, rank: int, d_in: int, d_outs: tuple[int, ...], like: Tensor) -> LoraFactors:
        """Random factors of the dtype and on the device of `like`."""
        a = [like.new_empty(sets, adapters, d_in, rank).normal_(std=d_in**-0.5) for _ in d_outs]
        b = [like.new_empty(sets, adapters, rank, d_out).normal_(std=rank**-0.5) for d_out in d_outs]
        return cls(a, b)

    @property
    def sets(self) -> int:
        """How many launches pass before factors are read again."""
        return len(self.a[0])

    def of(self, i: int) -> list[tuple[Tensor, Tensor]]:
        """A (adapters, d_in, rank) and B (adapters, rank, d_out) of launch i, for each output."""
        return [(a[i % self.sets], b[i % self.sets]) for a, b in zip(self.a, self.b, strict=True)]


def gathered_bmm(activations: Activations, slots: Tensor, factors: LoraFactors) -> Callable[[int], None]:
    """Each token's factors are gathered, then two batched matrix products."""
    index = slots.long()

    def launch(i: int) -> None:
        x = activations.x[i % len(activations.x)].unsqueeze(1)
        for (a, b), y in zip(factors.of(i), activations.ys, strict=True):
            update = torch.bmm(torch.bmm(x, a[index]), b[index]).squeeze(1)
            y[i % len(y)].add_(update, alpha=SCALING)

    return launch


def adapter_loop(activations: Activations, slots: Tensor, factors: LoraFactors) -> Callable[[int], None]:
    """One adapter after the other on its rows of the batch, as PEFT does; which rows those are is known beforehand."""
    groups = [(slot, (slots == slot).nonzero()[:, 0]) for slot in slots.unique().tolist()]

    def launch(i: int) -> None:
        x = activations.x[i % len(activations.x)]
        for (a, b), y in zip(factors.of(i), activations.ys, strict=True):
            own = y[i % len(y)]
            for slot, rows in groups:
                own[rows] += (x[rows] @ a[slot]) @ b[slot] * SCALING

    return launch


def vllm_kernels(
    kernels: VllmKernels, activations: Activations, slots: Tensor, factors: LoraFactors
) -> Callable[[int], None]:
    """vLLM's shrink and expand, over q, k and v side by side in one tensor, as its layers keep them.

    The grid has as many adapters as the batch, which is vLLM's own at its best (`specialize_active_lora`).
    """
    for shapes in kernels.known_addresses:
        # Other weights may since have been given the address of these.
        shapes.clear()
    adapters = factors.a[0].shape[1]
    meta = kernels.meta_class.make(adapters, len(slots), slots.device)
    meta.prepare_tensors(slots)
    arguments = meta.meta_args(len(slots), True)
    rank = factors.a[0].shape[3]
    # vLLM stores both factors transposed.
    a_sets = [[a[i].transpose(1, 2).contiguous() for a in factors.a] for i in range(factors.sets)]
    b_sets = [[b[i].transpose(1, 2).contiguous() for b in factors.b] for i in range(factors.sets)]
    joined = torch.cat(activations.ys, 2)

    def launch(i: int) -> None:
        x = activations.x[i % len(activations.x)]
        reduced = torch.empty(len(factors.a), len(x), rank, dtype=torch.float32, device=x.device)
        kernels.shrink(x, a_sets[i % factors.sets], reduced, *arguments, SCALING)
        kernels.expand(reduced, b_sets[i % factors.sets], joined[i % len(joined)], *arguments, 0, True)

    launch.outputs = joined  # type: ignore[attr-defined]
    return launch


def peers_disagree(kernels: VllmKernels, device: torch.device) -> str | None:
    """None where all three ways give the same, or how far apart they are: a peer must be right to be timed."""
    torch.manual_seed(0)
    tokens, d_in, d_outs, rank = 24, 256, (256, 128), 16
    slots = torch.randint(6, (tokens,), device=device, dtype=torch.int32)
    # Not bfloat16: Triton's interpreter cannot multiply it.
    like = torch.empty(0, dtype=torch.float16, device=device)
    factors = LoraFactors.make(1, 6, rank, d_in, d_outs, like)
    start = Activations.make(1, tokens, d_in, d_outs, like.dtype, device)
    # Updates of the size that the outputs have, or nothing could be seen of them.
    factors.b[:] = [b / SCALING for b in factors.b]
    results = {}
    for name, make in (("gathered bmm", gathered_bmm), ("loop", adapter_loop)):
        own = Activations(start.x, [y.clone() for y in start.ys])
        make(own, slots, factors)(0)
        results[name] = torch.cat(own.ys, 2).float()
    launch = vllm_kernels(kernels, start, slots, factors)
    launch(0)
    results["vLLM"] = launch.outputs.float()  # type: ignore[attr-defined]
    for name in ("loop", "vLLM"):
        error = ((results[name] - results["gathered bmm"]).norm() / results["gathered bmm"].norm()).item()
        if not error < 1e-2:
            return f"{name} and gathered bmm differ by {error:.3g} of the result"
    return None
