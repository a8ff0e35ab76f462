"""The paper's plot of a comparison: score over trained parameters, with a line for each method's sizes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from sera_serve.trainer.compare.plan import LOWER_IS_BETTER
from sera_serve.trainer.compare.report import CellResult

_COLUMNS = 3
_COLOURS = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
_MARKERS = "osD^vP*X<>"

Point = tuple[int, float, float | None, bool]
"""(parameters, mean score in hundredths, deviation in hundredths or None, whether all seeds are behind it)"""


def plot_scores(path: Path, results: Sequence[CellResult]) -> bool:
    """Write a PNG with a panel for each base and data set, and one for the mean over a base's data sets.

    A method without parameters of its own, such as head-only, is a horizontal line. The bars are one deviation over
    the seeds. A marker is hollow where some of the seeds failed or are left. The panel of the means has the methods
    that have a score on every data set.

    Returns:
        False if there is no score yet; then no file is written.
    """
    panels = _panels(results)
    if not panels:
        return False
    families = list(dict.fromkeys(result.family for result in results))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (title, ylabel, points) in zip(axes, panels, strict=False):
        _draw(panel, points, families)
        # Names of the plan are no formulas, whatever dollars they have.
        panel.set_title(title, parse_math=False)
        panel.set(xlabel="trained parameters without the head", ylabel=ylabel)
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    shown = {family for _, _, points in panels for family in points}
    without = {result.family for result in results if result.parameters == 0}
    handles = [
        Line2D([], [], color=_colour(i), linestyle="--", label=family)
        if family in without
        else Line2D([], [], color=_colour(i), marker=_MARKERS[i % len(_MARKERS)], label=family)
        for i, family in enumerate(families)
        if family in shown
    ]
    if not all(whole for _, _, points in panels for sizes in points.values() for *_, whole in sizes):
        few = "hollow: some seeds failed or are left"
        handles.append(Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="", label=few))
    width = min(2 * columns, len(handles))
    for text in figure.legend(handles=handles, loc="outside lower center", ncols=width, fontsize=8).get_texts():
        text.set_parse_math(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def _panels(results: Sequence[CellResult]) -> list[tuple[str, str, dict[str, list[Point]]]]:
    panels = []
    for base in dict.fromkeys(result.base for result in results):
        of_base = [result for result in results if result.base == base]
        data = list(dict.fromkeys(result.data for result in of_base))
        for name in data:
            cells = [result for result in of_base if result.data == name and result.mean is not None]
            if cells:
                score = cells[0].score
                scale, unit = (1, score) if score in LOWER_IS_BETTER else (100, f"{score} x 100")
                points: dict[str, list[Point]] = {}
                for cell in cells:
                    assert cell.mean is not None and cell.parameters is not None
                    deviation = None if cell.deviation is None else scale * cell.deviation
                    points.setdefault(cell.family, []).append(
                        (cell.parameters, scale * cell.mean, deviation, cell.runs == cell.planned)
                    )
                panels.append((f"{name} on {base}", unit, points))
        if means := _means(of_base, data):
            panels.append((f"mean over {len(data)} data sets, {base}", "score x 100", means))
    return panels


def _means(results: Sequence[CellResult], data: Sequence[str]) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {}
    if len(data) < 2:
        return points
    for method in dict.fromkeys(result.method for result in results):
        of_method = [result for result in results if result.method == method and result.mean is not None]
        cells = [result for result in of_method if result.score not in LOWER_IS_BETTER]
        if len(cells) == len(data):
            mean = statistics.fmean(cell.mean for cell in cells if cell.mean is not None)
            parameters = max(cell.parameters or 0 for cell in cells)
            points.setdefault(cells[0].family, []).append(
                (parameters, 100 * mean, None, all(cell.runs == cell.planned for cell in cells))
            )
    return points


def _colour(index: int) -> tuple[float, ...]:
    # First the strong colours of the map, then the pale ones.
    colours = [*_COLOURS[::2], *_COLOURS[1::2]]
    return tuple(colours[index % len(colours)])


def _draw(axes: Axes, points: dict[str, list[Point]], families: Sequence[str]) -> None:
    axes.set_xscale("log")
    for i, family in enumerate(families):
        # Two sizes may have as many parameters, and equal scores.
        sizes = sorted(points.get(family, []), key=lambda point: point[:2])
        if not sizes:
            continue
        if sizes[0][0] == 0:
            axes.axhline(sizes[0][1], color=_colour(i), linestyle="--", linewidth=1)
            continue
        parameters, means, deviations, whole = zip(*sizes, strict=True)
        axes.errorbar(
            parameters,
            means,
            yerr=[deviation or 0.0 for deviation in deviations],
            color=_colour(i),
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            linewidth=1,
            elinewidth=0.7,
            capsize=2,
            markevery=[place for place, is_whole in enumerate(whole) if is_whole],
        )
        axes.plot(
            parameters,
            means,
            color=_colour(i),
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            markerfacecolor="white",
            linestyle="",
            markevery=[place for place, is_whole in enumerate(whole) if not is_whole],
        )
    counts = [size[0] for sizes in points.values() for size in sizes if size[0]]
    if counts and max(counts) < 10 * min(counts):
        # A narrow range may have no power of ten, and its other labels would lie over each other.
        axes.set_xlim(10 ** math.floor(math.log10(min(counts))), 10 ** math.ceil(math.log10(max(counts) + 1)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
