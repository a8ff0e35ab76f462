"""The command line `sera-serve analyze`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_factory import BASE, GAINS, MODULE, classifier_fields, fill, make_bundle
from click.testing import Result
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from adapters_store import AdapterConfig, AdapterStore
from adapters_store.convert.spectrum import GroupSimilarity, LayerSpectrum, layer_spectra, subspace_similarity
from sera_serve.cli import build_cli
from sera_serve.commands import analysis_plots

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build_cli(), ["analyze", *map(str, arguments)])


def fields(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    for seed, name in enumerate(("acme/first", "acme/second")):
        store.publish(make_bundle(seed, modules={Q: MODULE, V: MODULE}), name)
    return store


def test_one_adapter_of_a_store(store: AdapterStore) -> None:
    found = fields(run("acme/first", "--store", store.root, "--json"))
    (adapter,) = found["adapters"]
    assert (adapter["adapter"], adapter["digest"]) == ("acme/first@v1", store.resolve("acme/first").digest)
    assert found["similarity"] == []
    assert [layer["group"] for layer in adapter["layers"]] == ["query", "value"]
    expected = layer_spectra(store.load(adapter["digest"]))
    for layer, spectrum in zip(adapter["layers"], expected, strict=True):
        assert layer["singular_values"] == pytest.approx(spectrum.values.tolist(), rel=1e-5)
        assert set(layer["factor_norms"]) == {"a", "c", "b"}
        assert layer["rank_for"]["0.99"] == spectrum.rank_for(0.99)
    assert adapter["suggested"]["0.9"]["rank"] in (2, 4)


def test_two_adapters_with_pictures(store: AdapterStore, tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    result = run("acme/first", "acme/second@v1", "--store", store.root, "--output", folder)
    assert result.exit_code == 0, result.output
    for text in ("acme/first@v1", "acme/second@v1", "query", "value", "phi(1, 1)", "to train: --rank"):
        assert text in result.stdout
    names = {"analysis.json", "singular_values.png", "norms.png", "norms_2.png", "similarity.png"}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
            # More than one colour: something was drawn.
            assert min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 20
    written = json.loads((folder / "analysis.json").read_text())
    assert [(each["group"], each["layers"]) for each in written["similarity"]] == [("query", 1), ("value", 1)]
    one, two = (layer_spectra(store.load(adapter["digest"]))[0] for adapter in written["adapters"])
    phi = written["similarity"][0]["phi"]
    assert phi[1] == pytest.approx(subspace_similarity(one, two)[1].tolist(), rel=1e-5)


def test_norms_are_drawn_at_the_number_of_their_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {
        **{f"model.layers.{number}.self_attn.q_proj": MODULE for number in (2, 3, 11)},
        **{f"model.layers.{number}.self_attn.v_proj": MODULE for number in (11, 13)},
        # One number twice in a group, and no number: their places in the group.
        **{f"model.layers.4.mlp.experts.{number}.up_proj": MODULE for number in (0, 1)},
        "model.head.out_proj": MODULE,
    }
    spectra = layer_spectra(make_bundle(modules=paths))
    groups: dict[str, list[LayerSpectrum]] = {}
    for layer in spectra:
        groups.setdefault(layer.group, []).append(layer)
    drawn: list[Figure] = []
    monkeypatch.setattr(analysis_plots, "_save", lambda figure, path: drawn.append(figure))
    analysis_plots.plot_norms("acme/first", groups, tmp_path / "norms.png")
    image = drawn[0].axes[0].images[0]
    table = image.get_array()
    assert table is not None and table.shape == (4, 14)
    assert list(image.get_extent()) == [-0.5, 13.5, 3.5, -0.5]
    assert drawn[0].axes[3].get_xlabel() == "layer, by its number in the base (or its place in a group without numbers)"
    places = {"query": [2, 3, 11], "value": [11, 13], "up_proj": [0, 1], "out_proj": [0]}
    for row, group in enumerate(groups):
        assert [column for column in range(14) if not table.mask[row, column]] == places[group]
        assert table[row].compressed().tolist() == [layer.norm for layer in groups[group]]
    # The picture begins at the first layer that has an adapter.
    analysis_plots.plot_norms("acme/first", {"value": groups["value"]}, tmp_path / "norms.png")
    assert list(drawn[1].axes[0].images[0].get_extent()) == [10.5, 13.5, 0.5, -0.5]
    assert drawn[1].axes[3].get_xlabel() == "layer, by its number in the base"


def test_each_adapter_is_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(analysis_plots, "_save", lambda figure, path: drawn.append(figure))
    first = {"value": layer_spectra(make_bundle(modules={V: MODULE}))}
    second = {"query": layer_spectra(make_bundle(modules={Q: MODULE}))}
    analysis_plots.plot_spectra([("acme/first", first), ("acme/second", second)], tmp_path / "spectra.png")
    (legend,) = drawn[0].legends
    assert {text.get_text() for text in legend.get_texts()} == {"acme/first, mean", "acme/second, mean"}


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    # Matplotlib refuses this one as a formula.
    name = r"$\frac$"
    layers = {name: layer_spectra(make_bundle(modules={V: MODULE}))}
    similarity = GroupSimilarity(group=name, layers=1, phi=torch.rand(2, 2), unrelated=0.1)
    analysis_plots.plot_spectra([(name, layers)], tmp_path / "spectra.png")
    analysis_plots.plot_similarity((name, name), [similarity], tmp_path / "similarity.png")
    analysis_plots.plot_norms(name, layers, tmp_path / "norms.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_file_is_read_without_a_store(tmp_path: Path) -> None:
    bundle = make_bundle(format_version=2, modules={Q: GAINS})
    bundle.save_file(tmp_path / "one.safetensors")
    result = run(tmp_path / "one.safetensors")
    assert "1 layers have a gain: the figures are without its change of the frozen weight" in result.stdout
    assert fields(run(tmp_path / "one.safetensors", "--json"))["adapters"][0]["digest"] == bundle.digest


def test_an_adapter_without_an_update(tmp_path: Path) -> None:
    bundle = make_bundle(modules={Q: {**MODULE, "scaling": 0.0}})
    bundle.save(tmp_path / "zero")
    result = run(tmp_path / "zero", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "every update is 0" in result.stdout
    assert fields(run(tmp_path / "zero", "--json"))["adapters"][0]["suggested"] == {"0.9": None, "0.99": None}


def test_refusals(store: AdapterStore, tmp_path: Path) -> None:
    def message(*arguments: object) -> str:
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        return str(result.stderr)

    assert "give --store" in message("acme/first")
    assert "acme/none" in message("acme/none", "--store", store.root)
    (tmp_path / "text").write_text("hello")
    assert "sera-serve: " in message(tmp_path / "text")
    head = fill(AdapterConfig.model_validate(classifier_fields(method="head-only", modules={})))
    head.save(tmp_path / "head")
    assert "head-only adapter has no updates" in message(tmp_path / "head")
    make_bundle(base={**BASE, "weights_digest": "e" * 64}).save(tmp_path / "other")
    assert "was made for base 'tiny' (weights_digest" in message(
        "acme/first", tmp_path / "other", "--store", store.root
    )
    make_bundle(modules={"model.layers.7.mlp.up_proj": MODULE}).save(tmp_path / "apart")
    assert "no layer in common" in message("acme/first", tmp_path / "apart", "--store", store.root)
    (tmp_path / "taken").write_text("a file")
    assert "taken" in message("acme/first", "--store", store.root, "--output", tmp_path / "taken")


def test_a_narrow_terminal_cuts_no_figure(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    commands = ["analyze", "acme/first"], ["adapters", "inspect", "acme/first"], ["adapters", "list"]
    shown = [CliRunner().invoke(build_cli(), [*each, "--store", str(store.root)]).stdout for each in commands]
    assert not any("\u2026" in each for each in shown)
    assert "largest value" in shown[0] and "effective rank" in shown[0]
    # A digest is longer than the line, and goes on in the next one.
    assert store.resolve("acme/first").digest in "".join(shown[1].split())
    assert "acme/first" in shown[2] and "latest=v1" in shown[2]
