"""The figure of a run of many_adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

OURS, PEFT = "tab:blue", "tab:orange"


def plot_many_adapters(path: Path, rows: list[dict[str, Any]], ttfts: dict[str, list[float]]) -> None:
    """Write a PNG of four panels.

    Args:
        path: Where to.
        rows: The benchmark's rows.
        ttfts: Seconds to the first token of every request in the open loop, by the curve's label.
    """
    figure, ((throughput, first), (tiers, distribution)) = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    ours = [row for row in rows if row["system"] == "sera-serve"]
    peft = [row for row in rows if row["system"] == "peft-swap"]
    throughput.plot(_sizes(ours), [row["saturated_tokens_per_s"] for row in ours], "o-", color=OURS, label="sera-serve")
    throughput.plot(_sizes(peft), [row["tokens_per_s"] for row in peft], "s--", color=PEFT, label="PEFT, swapping")
    _scale(throughput, ours, "new tokens a second", "Throughput at saturation")
    throughput.set_ylim(bottom=0)
    for percent, style in ((50, "o-"), (95, "o--"), (99, "o:")):
        first.plot(_sizes(ours), [row[f"ttft_p{percent}_s"] for row in ours], style, color=OURS, label=f"p{percent}")
    first.plot(_sizes(peft), [row["ttft_p50_s"] for row in peft], "s-", color=PEFT, label="PEFT, swapping, p50")
    first.set_yscale("log")
    _scale(first, ours, "seconds", "Time to the first token, open loop")
    _plot_tiers(tiers, ours)
    for label, seconds in ttfts.items():
        distribution.plot(np.sort(seconds), np.linspace(0, 1, len(seconds)), label=label)
    distribution.set(xscale="log", xlabel="seconds", ylabel="share of requests", title="Time to the first token")
    # A narrow range would have labels over each other.
    distribution.xaxis.set_minor_formatter(NullFormatter())
    _legend(distribution, 3)
    distribution.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_tiers(axes: Axes, rows: list[dict[str, Any]]) -> None:
    positions = np.arange(len(rows))
    bottom = np.zeros(len(rows))
    for key, label in (("hit_rate", "device"), ("host_rate", "host"), ("store_rate", "store")):
        share = np.array([row[key] or 0.0 for row in rows])
        axes.bar(positions, share, bottom=bottom, label=label)
        bottom += share
    axes.set_xticks(positions, [f"{row['adapters']:,}" for row in rows])
    axes.set(xlabel="registered adapters", ylabel="share of requests", title="Where the adapter was found", ylim=(0, 1))
    if not bottom.any():
        axes.text(0.5, 0.5, "the server does not say", ha="center", transform=axes.transAxes)
    _legend(axes, 3)


def _scale(axes: Axes, rows: list[dict[str, Any]], unit: str, title: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(_sizes(rows), [f"{size:,}" for size in _sizes(rows)])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="registered adapters", ylabel=unit, title=title)
    _legend(axes, 4)
    axes.grid(alpha=0.3)


def _legend(axes: Axes, columns: int) -> None:
    # Below the axes: inside, it would hide a curve.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False)


def _sizes(rows: list[dict[str, Any]]) -> list[int]:
    return [row["adapters"] for row in rows]
