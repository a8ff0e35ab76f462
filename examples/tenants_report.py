"""Table and plot of tenants_experiment.py."""

from __future__ import annotations

import statistics
from pathlib import Path

from tenants_runs import Runs
from tenants_setup import BASE_ONLY, SEEDS, TENANTS, variants_of


def mean_and_spread(values: list[float], places: int) -> str:
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{spread}"


def write_table(runs: Runs, tenants: list[str], path: Path) -> None:
    lines = [
        f"Base weights {runs.base}; {len(SEEDS)} seeds, mean ± standard deviation on the test rows; "
        "parameters without the head.",
        "",
        "| data set | method | parameters | learning rate | score | loss (nats) | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in tenants:
        tenant = TENANTS[name]
        places = 2 if tenant.score == "perplexity" else 4
        for variant in variants_of(tenant):
            chosen = runs.chosen(name, variant)
            scores = [r["metrics"][f"test_{tenant.score}"] for r in chosen]
            losses = [r["metrics"]["test_loss"] for r in chosen]
            rate = "" if variant == BASE_ONLY else f"{chosen[0]['rate']:g}"
            lines.append(
                f"| {name} ({tenant.score}) | {variant} | {chosen[0]['parameters']:,} | {rate} "
                f"| {mean_and_spread(scores, places)} | {mean_and_spread(losses, 3)} "
                f"| {statistics.fmean(r['seconds'] for r in chosen):.0f} |"
            )
    path.write_text("\n".join(lines) + "\n")


def draw_plot(runs: Runs, tenants: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(1, len(tenants), figsize=(3.4 * len(tenants), 3.6), squeeze=False)
    styles = {"SeRA": ("tab:blue", "o"), "LoRA": ("tab:orange", "s")}
    for axis, name in zip(axes[0], tenants, strict=True):
        tenant = TENANTS[name]
        for family, (colour, marker) in styles.items():
            points = []
            for variant in variants_of(tenant):
                if variant.startswith(family):
                    chosen = runs.chosen(name, variant)
                    values = [r["metrics"][f"test_{tenant.score}"] for r in chosen]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    points.append((chosen[0]["parameters"], statistics.fmean(values), spread))
            x, y, bars = zip(*points, strict=True)
            axis.errorbar(x, y, yerr=bars, color=colour, marker=marker, capsize=3, label=family)
        floor = variants_of(tenant)[0]
        values = [r["metrics"][f"test_{tenant.score}"] for r in runs.chosen(name, floor)]
        axis.axhline(statistics.fmean(values), color="gray", linestyle="--", label=floor)
        axis.set(title=name, xlabel="adapter parameters", xscale="log", ylabel=tenant.score)
        axis.set_xticks([3e4, 1e5, 2e5], labels=["30k", "100k", "200k"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        if tenant.score == "perplexity":
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
