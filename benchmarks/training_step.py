"""A training step beside PEFT's LoRA: the same base, rows, targets, rank and optimiser; time paired in one process.

    python -m benchmarks.training_step [--quick] [--bases encoder,decoder,vit] [--ranks 8,16,64]

Bases: the encoder all-MiniLM-L6-v2 (16 rows of 128 tokens), the embedded decoder (8 of 128), a ViT with random weights
(12 layers, 384 wide, 8 images of 197 patches). PEFT's adapter is LoRA; ours are LoRA and SeRA with split = rank. A step
is forward, backward and AdamW. Steps alternate; the time is the median over rounds of the ratio within a round, which a
busy neighbour changes less than a ratio of medians. The memory is the growth of the resident set over its value before
the first step, at its peak within three steps, each in a process of its own. The last line is one JSON object. It is
`correct` where our LoRA with PEFT's values has PEFT's loss and gradients.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from benchmarks.last_line import tell
from benchmarks.minilm import minilm
from sera_serve.base import load_base
from sera_serve.layers import SeraConfig, attach_adapter, attached_layers

TARGETS = {"encoder": ("query", "value"), "decoder": ("q_proj", "v_proj"), "vit": ("q_proj", "v_proj")}
SYSTEMS = ("peft_lora", "lora", "sera")
_MEMORY_STEPS = 3
# Every tensor is mapped alone, so the resident set follows the live tensors.
_MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Step = Callable[[], Tensor]


def build_model(base: str) -> nn.Module:
    """Load a base model in float32."""
    torch.manual_seed(0)
    if base == "vit":
        config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
        return ViTModel(config, add_pooling_layer=False).eval()
    if base == "decoder":
        decoder: nn.Module = load_base("embedded").model
        return decoder
    encoder: nn.Module = load_base(minilm()).model
    return encoder


def build_loss(base: str, model: nn.Module) -> Step:
    """Return a function that computes the loss of one fixed batch of random rows."""
    torch.manual_seed(1)
    if base == "vit":
        pixels = torch.randn(8, 3, 224, 224)
        return lambda: model(pixel_values=pixels).last_hidden_state[:, 0].square().mean()
    if base == "decoder":
        tokens = torch.randint(5, 1000, (8, 128))
        return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss
    tokens = torch.randint(5, 1000, (16, 128))
    mask = torch.ones_like(tokens)
    return lambda: model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, 0].square().mean()


def adapt(system: str, base: str, rank: int, targets: str) -> nn.Module:
    """Load a base and attach a system's adapter of `rank` to it."""
    model = build_model(base)
    names: Any = TARGETS[base] if targets == "query-value" else "all-linear"
    torch.manual_seed(2)
    if system == "peft_lora":
        if names == "all-linear":
            # PEFT's own "all-linear" needs a PreTrainedModel with an output embedding; the names are the same.
            names = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
            names = [name for name in names if name != "lm_head"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(names))
        adapted: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
        return adapted
    sera = system == "sera"
    attach_adapter(model, SeraConfig(rank, rank if sera else 1, 2.0 * rank, names, use_mixer=sera))
    return model


def training_step(model: nn.Module, loss_of: Step) -> Step:
    """Return a function that does one step of AdamW."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def agrees_with_peft(base: str, rank: int, targets: str) -> bool:
    """Whether our LoRA with PEFT's values has PEFT's loss and gradients, in float32."""
    theirs, ours = adapt("peft_lora", base, rank, targets), adapt("lora", base, rank, targets)
    layers = attached_layers(ours)
    peft = dict(theirs.named_parameters())
    torch.manual_seed(3)
    pairs = []
    for path, layer in layers.items():
        factors = [
            next(p for name, p in peft.items() if name.endswith(f".{path}.lora_{letter}.default.weight"))
            for letter in "AB"
        ]
        nn.init.normal_(factors[1], std=0.02)
        with torch.no_grad():
            layer.sera_a.copy_(factors[0].T)
            layer.sera_b.copy_(factors[1].T)
        pairs += list(zip((layer.sera_a, layer.sera_b), factors, strict=True))
    losses = [build_loss(base, model)() for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    close = torch.allclose(*losses, rtol=1e-4)
    for mine, other in pairs:
        if other.grad is None or mine.grad is None:
            close &= other.grad is None and mine.grad is None
        else:
            close &= bool((mine.grad - other.grad.T).norm() <= 1e-3 * other.grad.norm() + 1e-9)
    return close


def paired_times(
    base: str, rank: int, targets: str, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, tuple[float, float]]:
    """By system: the median milliseconds of a step, and the median over rounds of its time to PEFT's in that round."""
    steps = {}
    for system in SYSTEMS:
        model = adapt(system, base, rank, targets)
        steps[system] = training_step(model, build_loss(base, model))
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for step in steps.values():
        step(), step()
    for index in range(rounds):
        # The order turns, so no system always follows the same one.
        for system in (*SYSTEMS[index % len(SYSTEMS) :], *SYSTEMS[: index % len(SYSTEMS)]):
            start = clock()
            steps[system]()
            times[system].append((clock() - start) * 1e3)
    peft = times["peft_lora"]
    return {
        system: (statistics.median(own), statistics.median(mine / other for mine, other in zip(own, peft, strict=True)))
        for system, own in times.items()
    }


def _resident(field: str) -> float:
    """A figure of this process in MiB: VmRSS (now) or VmHWM (peak)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def measure_memory(system: str, base: str, rank: int, targets: str) -> dict[str, float]:
    """MiB that steps add to this process at their peak, and the peak of the whole process."""
    model = adapt(system, base, rank, targets)
    step = training_step(model, build_loss(base, model))
    gc.collect()
    # The peak counts from here on (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    for _ in range(_MEMORY_STEPS):
        step()
    return {"step_mib": _resident("VmHWM") - before, "peak_mib": _resident("VmHWM")}


def memory_of(system: str, base: str, rank: int, targets: str) -> dict[str, float]:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--memory-of", f"{system},{base},{rank},{targets}"]
    done = subprocess.run(command, env=os.environ | _MEMORY_ENVIRONMENT, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main(
    quick: Annotated[bool, typer.Option(help="Rank 16 and query and value alone, with few rounds.")] = False,
    bases: Annotated[str, typer.Option(help="Of encoder, decoder, vit.")] = "encoder,decoder,vit",
    ranks: Annotated[str, typer.Option(help="Ranks, by commas.")] = "8,16,64",
    targets: Annotated[str, typer.Option(help="Of query-value, all-linear.")] = "query-value,all-linear",
    rounds: Annotated[int, typer.Option(help="Steps of each system.")] = 15,
    memory: Annotated[bool, typer.Option(help="Measure memory too.")] = True,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="CPU time, for a busy machine.")] = False,
    memory_of_one: Annotated[str, typer.Option("--memory-of", hidden=True)] = "",
) -> None:
    """Measure the steps."""
    if memory_of_one:
        system, base, rank, target = memory_of_one.split(",")
        typer.echo(json.dumps(measure_memory(system, base, int(rank), target)))
        return
    if quick:
        ranks, targets, rounds = "16", "query-value", 5
    console = Console(stderr=True)
    table = Table("base", "targets", "rank", "system", "step, ms", "time to PEFT", "step memory, MiB", "memory to PEFT")
    rows: list[dict[str, Any]] = []
    correct = True
    for base in bases.split(","):
        for target in targets.split(","):
            for rank in map(int, ranks.split(",")):
                agrees = agrees_with_peft(base, rank, target)
                correct &= agrees
                if not agrees:
                    console.print(f"{base}, {target}, rank {rank}: our LoRA is not PEFT's; it is not timed")
                    continue
                times = paired_times(base, rank, target, rounds, time.process_time if cpu_time else time.perf_counter)
                spaces = {s: memory_of(s, base, rank, target) for s in SYSTEMS} if memory else {}
                for system in SYSTEMS:
                    row: dict[str, Any] = {"base": base, "targets": target, "rank": rank, "system": system}
                    row |= dict(zip(("step_ms", "time_ratio"), times[system], strict=True))
                    if memory:
                        ratio = spaces[system]["step_mib"] / spaces["peft_lora"]["step_mib"]
                        row |= {**spaces[system], "memory_ratio": ratio}
                    rows.append(row)
                    space = (f"{row['step_mib']:.1f}", f"{row['memory_ratio']:.3f}") if memory else ("", "")
                    cells = (base, target, str(rank), system, f"{row['step_ms']:.1f}", f"{row['time_ratio']:.3f}")
                    table.add_row(*cells, *space)
                console.print(*(f"{row['system']} {row['time_ratio']:.3f}" for row in rows[-3:]), base, target, rank)
                gc.collect()
    console.print(table)
    tell("training_step", rows, correct=correct)


if __name__ == "__main__":
    typer.run(main)
