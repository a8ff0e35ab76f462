"""The pictures of `sera-serve analyze`: singular values, subspace similarity, norms by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters_store.convert.spectrum import GroupSimilarity, LayerSpectrum
from sera_serve.errors import InvalidConfiguration

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise InvalidConfiguration(
        "pictures need matplotlib; install it with: pip install 'sera-serve[train]'", param="output"
    ) from error

# viridis grows evenly in lightness, so that it reads in grey and by every kind of sight.
_COLOURS = "viridis"
# Okabe and Ito's colours, with a line style each.
_LINES = (("#0072b2", "-"), ("#d55e00", "--"))
_DPI = 130
_MAX_PANELS = 8


def plot_spectra(adapters: Sequence[tuple[str, Mapping[str, Sequence[LayerSpectrum]]]], path: Path) -> None:
    """Draw singular values in descending order, one panel for each group of layers.

    Args:
        adapters: One or two adapters: name, and layers by group.
        path: The PNG file.
    """
    groups = _most_told(list(dict.fromkeys(group for _, by_group in adapters for group in by_group)))
    figure, panels = _panels(len(groups), "Singular values of the updates")
    for panel, group in zip(panels, groups, strict=True):
        for (name, by_group), (colour, style) in zip(adapters, _LINES, strict=False):
            # A logarithm has no zero.
            curves = [_positive(layer) for layer in by_group.get(group, ())]
            curves = [curve for curve in curves if len(curve)]
            for curve in curves:
                panel.semilogy(_places(curve), curve, color=colour, linestyle=style, alpha=0.25, linewidth=0.8)
            if curves:
                length = min(len(curve) for curve in curves)
                mean = np.mean([curve[:length] for curve in curves], axis=0)
                panel.semilogy(_places(mean), mean, color=colour, linestyle=style, linewidth=2.2, label=f"{name}, mean")
        # Names of files and layers are no formulas, whatever dollars they have, here and below.
        panel.set_title(
            f"{group} ({max(len(by_group.get(group, ())) for _, by_group in adapters)} layers)",
            fontsize=10,
            parse_math=False,
        )
        panel.set_xlabel("index")
        panel.set_ylabel("singular value")
        panel.grid(True, which="major", alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    # An adapter need not have curves in every panel.
    lines = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
    if lines:
        legend = figure.legend(
            lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    _save(figure, path)


def plot_similarity(names: tuple[str, str], similarity: Sequence[GroupSimilarity], path: Path) -> None:
    """Draw phi(i, j) as heat maps on one scale from 0 to 1, one for each group of layers, query and value first."""
    by_group = {each.group: each for each in similarity}
    groups = _most_told(list(by_group))
    figure, panels = _panels(len(groups), "Similarity of subspaces, phi(i, j)")
    image: Any = None
    for panel, group in zip(panels, groups, strict=True):
        phi = by_group[group].phi.numpy()
        rows, columns = phi.shape
        image = panel.imshow(
            phi,
            cmap=_COLOURS,
            vmin=0,
            vmax=1,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, columns + 0.5, 0.5, rows + 0.5),
        )
        panel.set_title(f"{group} (mean of {by_group[group].layers} layers)", fontsize=10, parse_math=False)
        panel.set_xlabel(f"j, {_short(names[1])}", parse_math=False)
        panel.set_ylabel(f"i, {_short(names[0])}", parse_math=False)
        for axis in (panel.xaxis, panel.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(panels), label="0: separate, 1: one holds the other", shrink=0.9)
    _save(figure, path)


def plot_norms(name: str, groups: Mapping[str, Sequence[LayerSpectrum]], path: Path) -> None:
    """Draw the Frobenius norms of the updates and of their factors: a row for each group, a column for each layer.

    The column is the number of the layer in the base, so that one layer is one column in all rows. Where a group has no
    adapter on a layer, the place is white.
    """
    columns = {group: _columns(layers) for group, layers in groups.items()}
    first, last = min(map(min, columns.values())), max(map(max, columns.values()))
    depth = last - first + 1
    kinds = [
        "update",
        *(f"|{f.upper()}|" for f in ("a", "c", "b") if any(f in x.norms for y in groups.values() for x in y)),
    ]
    figure = Figure(figsize=(2.5 + max(4.0, 0.34 * depth), 0.9 + len(kinds) * (0.7 + 0.32 * len(groups))), dpi=_DPI)
    figure.set_layout_engine("constrained")
    figure.suptitle(f"Norms by layer, {_short(name)}", parse_math=False)
    for panel, kind in zip(figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0], kinds, strict=True):
        table = np.full((len(groups), depth), np.nan)
        for row, (group, layers) in enumerate(groups.items()):
            for column, layer in zip(columns[group], layers, strict=True):
                norm = layer.norm if kind == "update" else layer.norms.get(kind[1:-1].lower(), np.nan)
                table[row, column - first] = norm
        image = panel.imshow(
            table,
            cmap=_COLOURS,
            vmin=0,
            aspect="auto",
            interpolation="nearest",
            extent=(first - 0.5, last + 0.5, len(groups) - 0.5, -0.5),
        )
        panel.set_title("scaling * A C B" if kind == "update" else kind, fontsize=10)
        panel.set_yticks(range(len(groups)), list(groups), parse_math=False)
        panel.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=panel, pad=0.01)
    counted = any(columns[group] != _numbers(layers) for group, layers in groups.items())
    panel.set_xlabel("layer, by its number in the base" + counted * " (or its place in a group without numbers)")
    _save(figure, path)


def _columns(layers: Sequence[LayerSpectrum]) -> list[int]:
    """The numbers of the layers. Where one has none, or two have the same, the layers' places in the group."""
    numbers = _numbers(layers)
    return numbers if -1 not in numbers and len(set(numbers)) == len(numbers) else list(range(len(layers)))


def _numbers(layers: Sequence[LayerSpectrum]) -> list[int]:
    """The first number in each layer's path, at most three digits, which is as wide as a picture may be; or -1."""
    return [
        next((int(part) for part in layer.path.split(".") if part.isdecimal() and len(part) <= 3), -1)
        for layer in layers
    ]


def _most_told(groups: list[str]) -> list[str]:
    """Query and value first, as in the paper, and at most as many as a page holds."""
    first = [group for group in ("query", "value") if group in groups]
    return [*first, *(group for group in groups if group not in first)][:_MAX_PANELS]


def _panels(count: int, title: str) -> tuple[Figure, Sequence[Any]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(5.5, 3.6 * columns), 0.8 + 3.0 * rows), dpi=_DPI)
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, list(grid[:count])


def _positive(layer: LayerSpectrum) -> Any:
    return layer.values[: layer.numerical_rank].numpy()


def _places(curve: Any) -> Any:
    return np.arange(1, len(curve) + 1)


def _short(name: str, width: int = 32) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png")
