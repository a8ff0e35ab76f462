"""What a dry run found, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from sera_serve.trainer.dry_run import DryRun, Lengths

_BAR = 40


def show_dry_run(found: DryRun, console: Console) -> None:
    """Print rows, lengths, notes such as of what would be cut, parameters, memory and time."""
    rows = ", ".join(f"{count:,} {use}" for use, count in found.rows.items() if count)
    _line(console, "rows", f"{rows}; every row was read and checked")
    if found.lengths is not None:
        _show_lengths(found.lengths, console)
    for note in found.notes or ["none: nothing is cut, and nothing else is unusual"]:
        _line(console, "note", note)
    table = Table("layers", "count", "parameters", "of the base")
    for name, kind in found.kinds.items():
        table.add_row(name, str(kind.layers), f"{kind.parameters:,}", f"{kind.parameters / found.base:.3%}")
    table.add_row("head", "", f"{found.head:,}", f"{found.head / found.base:.3%}")
    table.add_row("trained", "", f"{found.trained:,}", f"{found.trained / found.base:.3%}")
    table.add_row("base, frozen", "", f"{found.base:,}", "")
    console.print(table)
    memory = found.memory
    parts = {
        "weights": memory.weights,
        "gradients and AdamW": memory.optimiser,
        "activations": memory.activations,
        "backward": memory.backward,
        "rest of the process": memory.rest,
    }
    measured = "" if memory.measured is None else f"; the timed steps reached {_mib(memory.measured)}"
    _line(console, "memory", f"{_mib(memory.peak)} at most (estimate){measured}; {_mib(memory.free)} are free")
    _line(console, "", ", ".join(f"{name} {_mib(value)}" for name, value in parts.items()))
    if found.time is None:
        _line(console, "time", "not measured: the largest batch does not fit; lower --batch-size or --max-length")
    else:
        time = found.time
        _line(console, "steps", f"{found.steps:,} of {time.step:.3g} s (estimate from a few)")
        _line(
            console,
            "time",
            f"about {_duration(time.total)}: an epoch {_duration(time.epoch)}, an evaluation "
            f"{_duration(time.evaluation)}; checkpoints come on top",
        )
    _line(console, "written", "nothing; train with the same command without --dry-run")


def _show_lengths(lengths: Lengths, console: Console) -> None:
    shown = {"0": "shortest", "50": "median", "90": "90%", "99": "99%", "100": "longest"}
    text = ", ".join(f"{name} {lengths.percentiles[place]}" for place, name in shown.items())
    _line(console, "tokens", f"a row: {text}")
    padding = lengths.padded_tokens / lengths.tokens - 1
    _line(console, "", f"an epoch: {lengths.tokens:,}, and {padding:.0%} of padding")
    most = max(lengths.counts)
    edges = zip(lengths.edges, lengths.edges[1:], strict=False)
    last = len(lengths.counts) - 1
    for index, ((low, high), count) in enumerate(zip(edges, lengths.counts, strict=True)):
        bar = "█" * round(_BAR * count / most)
        end = high if index == last else high - 1
        span = f"{low}-{end}" if low < end else str(low)
        _line(console, "", f"{span:>9}  {bar} {count:,}" if count else f"{span:>9}")


def _line(console: Console, name: str, text: str) -> None:
    console.print(f"{name:<9}{text}", highlight=False, soft_wrap=True, markup=False)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
