"""`sera-serve analyze`: singular values, norms and subspaces of adapters, for people, machines and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.table import Table

from adapters_store import AdapterBundle, AdapterStore, ModuleSpec, check_same_base
from adapters_store.convert.spectrum import (
    ENERGIES,
    GroupSimilarity,
    LayerSpectrum,
    layer_spectra,
    representable,
    similarity_by_group,
    smallest_rank,
)
from sera_serve.commands.output import JsonOption, console, one_line, print_json, refusals
from sera_serve.errors import InvalidConfiguration
from sera_serve.terminal import say, show_table

JSON_FILE = "analysis.json"
_DIGITS = 6


@dataclass(frozen=True)
class AnalyzedAdapter:
    """One adapter and the spectra of its layers.

    Attributes:
        name: What the user called it.
        bundle: Its tensors.
        layers: In the order of the bundle.
    """

    name: str
    bundle: AdapterBundle
    layers: list[LayerSpectrum]

    @property
    def groups(self) -> dict[str, list[LayerSpectrum]]:
        """Layers by what they compute, in the order of the bundle."""
        groups: dict[str, list[LayerSpectrum]] = {}
        for layer in self.layers:
            groups.setdefault(layer.group, []).append(layer)
        return groups


def analyze_command(
    adapter: Annotated[
        str,
        typer.Argument(
            help="A bundle (directory, .safetensors, .tar), or with --store tenant/name, tenant/name@alias, @v3.",
            show_default=False,
        ),
    ],
    other: Annotated[
        str | None, typer.Argument(help="Another adapter of the same base: adds the similarity of their subspaces.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Directory of the adapter store, for references.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help=f"Directory for {JSON_FILE} and the pictures (PNG); made if absent."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the singular values of an adapter's updates, their norms, a rank that would do, and compare two adapters.

    Example: sera-serve analyze demo/pirate demo/chat --store demo-store --output analysis
    """
    with refusals():
        adapters = [analyze(source, store) for source in (adapter, other) if source is not None]
        similarity: list[GroupSimilarity] = []
        if other is not None:
            check_same_base(adapters[1].bundle.config.base, adapters[0].bundle.config.base)
            similarity = similarity_by_group(adapters[0].layers, adapters[1].layers)
        result = as_values(adapters, similarity)
        if output is not None:
            result["files"] = [str(path) for path in write_files(output, adapters, similarity, result)]
        if as_json:
            print_json(result)
            return
        for each in adapters:
            _show_adapter(each)
        if other is not None:
            _show_similarity(adapters, similarity)
        for path in result.get("files", ()):
            typer.echo(f"wrote {path}")


def analyze(source: str, store: Path | None) -> AnalyzedAdapter:
    """Read an adapter and decompose its updates.

    Args:
        source: A path; or, where no path of that name exists, a reference in `store`.
        store: Directory of a store, or None.

    Raises:
        InvalidConfiguration: There is neither a path nor a store.
        StoreError: The reference or the bundle is refused.
    """
    if os.path.lexists(source):
        bundle = AdapterBundle.load(source)
        return AnalyzedAdapter(source, bundle, layer_spectra(bundle))
    if store is None:
        raise InvalidConfiguration(
            f"{source} is no path; give --store to read it from a store, or correct the path", param="adapter"
        )
    opened = AdapterStore(store, create=False)
    resolved = opened.resolve(source)
    bundle = opened.load(resolved.digest)
    return AnalyzedAdapter(f"{resolved.adapter}@v{resolved.version}", bundle, layer_spectra(bundle))


def suggestions(layers: Sequence[LayerSpectrum]) -> dict[str, dict[str, int] | None]:
    """Return by energy the smallest rank that keeps this share of all squared norms, rounded to a rank that fits.

    The rule: see `smallest_rank` and `representable`. None where every update is 0.
    """
    specs: list[ModuleSpec] = [layer.spec for layer in layers]
    found: dict[str, dict[str, int] | None] = {}
    for energy in ENERGIES:
        kept = smallest_rank([layer.values for layer in layers], energy)
        rank, split = representable(kept, specs) if kept else (0, 0)
        found[f"{energy:g}"] = {"kept": kept, "rank": rank, "split": split} if kept else None
    return found


def as_values(adapters: Sequence[AnalyzedAdapter], similarity: Sequence[GroupSimilarity]) -> dict[str, Any]:
    """Return the whole analysis as JSON values. Figures have 6 digits: the last ones depend on the machine."""
    return {
        "adapters": [_adapter_values(adapter) for adapter in adapters],
        "similarity": [
            {
                "group": each.group,
                "layers": each.layers,
                "phi": [[_rounded(value) for value in row] for row in each.phi.tolist()],
                "unrelated": _rounded(each.unrelated),
            }
            for each in similarity
        ],
    }


def _adapter_values(adapter: AnalyzedAdapter) -> dict[str, Any]:
    config = adapter.bundle.config
    return {
        "adapter": adapter.name,
        "digest": adapter.bundle.digest,
        "task": config.task,
        "method": config.method,
        "base": config.base.name,
        "suggested": suggestions(adapter.layers),
        "groups": [
            {
                "group": group,
                "layers": len(layers),
                "mean_norm": _rounded(fmean(layer.norm for layer in layers)),
                "suggested": suggestions(layers),
            }
            for group, layers in adapter.groups.items()
        ],
        "layers": [_layer_values(layer) for layer in adapter.layers],
    }


def _layer_values(layer: LayerSpectrum) -> dict[str, Any]:
    spec = layer.spec
    return {
        "path": layer.path,
        "group": layer.group,
        **spec.model_dump(mode="json", exclude_defaults=True),
        "singular_values": [_rounded(value) for value in layer.values.tolist()],
        "norm": _rounded(layer.norm),
        "factor_norms": {name: _rounded(value) for name, value in layer.norms.items()},
        "numerical_rank": layer.numerical_rank,
        "effective_rank": _rounded(layer.effective_rank),
        "rank_for": {f"{energy:g}": layer.rank_for(energy) for energy in ENERGIES},
        "suggested": suggestions([layer]),
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def write_files(
    folder: Path, adapters: Sequence[AnalyzedAdapter], similarity: Sequence[GroupSimilarity], values: dict[str, Any]
) -> list[Path]:
    """Write the JSON file and the pictures. Return their paths.

    Raises:
        InvalidConfiguration: matplotlib is missing.
        OSError: A file cannot be written.
    """
    # matplotlib takes a second to import, and is needed for pictures alone.
    from sera_serve.commands import analysis_plots

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / JSON_FILE, folder / "singular_values.png"]
    paths[0].write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
    named = [(adapter.name, adapter.groups) for adapter in adapters]
    analysis_plots.plot_spectra(named, paths[1])
    for (name, groups), suffix in zip(named, ("", "_2"), strict=False):
        paths.append(folder / f"norms{suffix}.png")
        analysis_plots.plot_norms(name, groups, paths[-1])
    if similarity:
        paths.append(folder / "similarity.png")
        analysis_plots.plot_similarity((adapters[0].name, adapters[1].name), similarity, paths[-1])
    return paths


def _show_adapter(adapter: AnalyzedAdapter) -> None:
    config = adapter.bundle.config
    base = one_line(config.base.name)
    say(f"{adapter.name}: {config.task}, {config.method}, base {base}, {len(adapter.layers)} layers")
    table = Table(
        "layers of",
        "count",
        "rank",
        "split",
        "norm",
        "largest value",
        "effective rank",
        *(f"rank for {energy:.0%}" for energy in ENERGIES),
        *(f"|{name.upper()}|" for name in ("a", "c", "b")),
    )
    for group, layers in adapter.groups.items():
        table.add_row(
            group,
            str(len(layers)),
            _span([layer.spec.rank for layer in layers]),
            _span([layer.spec.split for layer in layers]),
            _range([layer.norm for layer in layers]),
            _range([float(layer.values[0]) for layer in layers]),
            f"{fmean(layer.effective_rank for layer in layers):.1f}",
            *(_span([layer.rank_for(energy) for layer in layers]) for energy in ENERGIES),
            *(_range([layer.norms[name] for layer in layers if name in layer.norms]) for name in ("a", "c", "b")),
        )
    show_table(console(), table)
    for energy, suggested in suggestions(adapter.layers).items():
        share = f"{float(energy):.0%} of the squared norm of all updates"
        if suggested is None:
            typer.echo("every update is 0: nothing was trained, so no rank is suggested")
            break
        typer.echo(
            f"{share}: rank {suggested['kept']} of {_span([layer.spec.rank for layer in adapter.layers])}; "
            f"to train: --rank {suggested['rank']} --split {suggested['split']}"
        )
    if gains := sum(layer.spec.has_gain for layer in adapter.layers):
        typer.echo(f"{gains} layers have a gain: the figures are without its change of the frozen weight")


def _show_similarity(adapters: Sequence[AnalyzedAdapter], similarity: Sequence[GroupSimilarity]) -> None:
    say(f"similarity of subspaces, phi(i, j): i of {adapters[0].name}, j of {adapters[1].name}")
    table = Table("layers of", "count", "phi(1, 1)", "phi(i, all), i = 1, 2, 4 ...", "phi(all, all)", "unrelated")
    for each in similarity:
        rows, columns = each.phi.shape
        steps = [2**power for power in range(rows.bit_length()) if 2**power <= rows]
        table.add_row(
            each.group,
            str(each.layers),
            f"{float(each.phi[0, 0]):.3f}",
            " ".join(f"{float(each.phi[i - 1, columns - 1]):.2f}" for i in steps),
            f"{float(each.phi[rows - 1, columns - 1]):.3f}",
            f"{each.unrelated:.4f}, {each.unrelated * max(rows, columns):.3f}",
        )
    show_table(console(), table)
    typer.echo("unrelated: what random subspaces have, at phi(1, 1) and at phi(all, all)")


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _range(values: Sequence[float]) -> str:
    if not values:
        return "none"
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
