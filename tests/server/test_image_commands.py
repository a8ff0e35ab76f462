"""Commands on bases that take images: what a server prints at its start, the doctor, merged exports, PEFT imports."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoImageProcessor, ViTModel
from typer.testing import CliRunner

from adapters_store import AdapterStore, BundleLimits, import_peft, peft_from_path
from adapters_store.errors import InvalidBundle
from sera_serve import SeraConfig
from sera_serve.access import AccessControl, AccessDatabase
from sera_serve.base import FrozenBase, import_base, load_base, to_pixels
from sera_serve.commands.adapters import adapters_app
from sera_serve.commands.diagnosis import diagnose
from sera_serve.commands.serve import describe_server
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.errors import InvalidConfiguration
from support.factories import merged
from support.peft_checkpoints import save_checkpoint
from support.vision import (
    image_classifier,
    image_file,
    picture,
    pixels_of,
    random_clip,
    random_deit,
    random_vit,
    spec_of,
)

SHAPE = SeraConfig(4, 1, 8.0, "all-linear")


def saved(base: FrozenBase, folder: Path) -> Path:
    base.model.save_pretrained(folder)
    if base.reads_text:
        base.tokenizer.save_pretrained(folder)
    return folder


def test_a_server_says_at_its_start_how_to_send_an_image(tmp_path: Path) -> None:
    base = random_vit()
    store = AdapterStore(tmp_path / "store")
    store.publish(image_classifier(base, SHAPE, 0, ["no", "yes"]), "acme/cracks")
    settings = ServeSettings(store=store.root, pool_mib=1)
    engine = ServingEngine(base, store, settings)
    output = io.StringIO()
    console, access = Console(file=output, width=200), AccessControl(AccessDatabase(store.root))
    describe_server(console, settings, engine, access, 8000)
    describe_server(console, settings.model_copy(update={"host": "2001:db8::5"}), engine, access, 8000)
    engine.stop()
    assert "vision of" in output.getvalue()
    assert "images of 32 x 32, 17 tokens each" in output.getvalue()
    assert "/v1/classify -F adapter=acme/cracks -F image=@photo.jpg" in output.getvalue()
    assert "/v1/generate" not in output.getvalue()
    # In quotes: some shells read brackets as a pattern of names.
    assert "'http://[2001:db8::5]:8000/v1/adapters'" in output.getvalue()


def test_the_doctor_looks_at_bases_of_images(tmp_path: Path) -> None:
    for base in (random_vit(), random_clip()):
        folder = saved(base, tmp_path / base.name)
        settings = ServeSettings(base=str(folder), store=tmp_path / "none", pool_mib=1, host_cache_mib=1)
        found = {finding.name: finding for finding in diagnose(settings)}
        assert type(base.model).__name__ in found["base"].detail
        assert found["memory"].status == "ok"


def test_a_merged_export_is_transformers_own_model(tmp_path: Path) -> None:
    folder = saved(random_vit(), tmp_path / "base")
    base = load_base(str(folder))
    bundle = image_classifier(base, SHAPE, 0, ["no", "yes"])
    store = AdapterStore(tmp_path / "store")
    store.publish(bundle, "acme/cracks")
    shown = CliRunner().invoke(adapters_app, ["inspect", "acme/cracks", "--store", str(store.root)])
    assert "shortest_edge" in shown.output or "exact" in shown.output
    arguments = [
        "export",
        "acme/cracks",
        "--output",
        str(tmp_path / "out"),
        "--format",
        "merged",
        "--base",
        str(folder),
    ]
    result = CliRunner().invoke(adapters_app, [*arguments, "--store", str(store.root)])
    assert result.exit_code == 0, result.output
    own = ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    pixels = pixels_of(image_file(0), spec_of(base))
    want = merged(base, bundle).image_states(pixels)
    with torch.no_grad():
        torch.testing.assert_close(own(pixel_values=pixels).last_hidden_state, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resize", ["exact", "shortest_edge"])
@pytest.mark.parametrize("make", [random_vit, random_deit, random_clip])
def test_a_merged_export_keeps_the_adapters_preprocessing(
    make: Callable[[], FrozenBase], resize: str, tmp_path: Path
) -> None:
    folder = saved(make(), tmp_path / "base")
    base = load_base(str(folder))
    fields = {"resize": resize, "resample": "lanczos", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    bundle = image_classifier(base, SHAPE, 0, ["no", "yes"], **fields)
    store = AdapterStore(tmp_path / "store")
    store.publish(bundle, "acme/cracks")
    out = tmp_path / "out"
    arguments = ["export", "acme/cracks", "--output", str(out), "--format", "merged", "--base", str(folder)]
    result = CliRunner().invoke(adapters_app, [*arguments, "--store", str(store.root)])
    assert result.exit_code == 0, result.output
    spec = bundle.config.image
    assert spec is not None
    assert load_base(str(out)).image_spec == spec
    own = AutoImageProcessor.from_pretrained(out)(picture(4), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(to_pixels(picture(4), spec), own, atol=2e-6)


def test_an_adapter_of_images_leaves_not_as_a_peft_checkpoint(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    store.publish(image_classifier(random_vit(), SHAPE, 0, ["no", "yes"]), "acme/cracks")
    arguments = ["export", "acme/cracks", "--output", str(tmp_path / "out"), "--format", "peft"]
    result = CliRunner().invoke(adapters_app, [*arguments, "--store", str(store.root)])
    assert result.exit_code == 1
    assert "use format 'sera' or 'merged'" in " ".join(result.output.split())


def test_the_doctor_names_a_base_that_would_be_refused(tmp_path: Path) -> None:
    config = random_vit().model.config
    config.num_channels = 1
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "grey")
    settings = ServeSettings(base=str(tmp_path / "grey"), store=tmp_path / "none", pool_mib=1, host_cache_mib=1)
    found = {finding.name: finding for finding in diagnose(settings)}
    assert found["base"].status == "problem"
    assert "images of 1 channels" in found["base"].detail


def test_peft_checkpoints_without_a_classifier_are_refused_with_the_reason(tmp_path: Path) -> None:
    base = random_vit()
    folder = save_checkpoint(base.model, tmp_path / "peft", target_modules=["q_proj"])
    with pytest.raises(InvalidBundle, match="add 'classifier' to modules_to_save") as refusal:
        import_peft(peft_from_path(str(folder), BundleLimits()), import_base(base))
    assert refusal.value.code == "unsupported_adapter"


def test_without_pillow_a_base_of_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(random_vit(), tmp_path / "base")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InvalidConfiguration, match=r"sera-serve\[images\]"):
        load_base(str(folder))
