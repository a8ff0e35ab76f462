"""Bases that take images: what is loaded of a folder, states and embeddings against transformers' own, identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    DeiTModel,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from sera_serve.base import FrozenBase, base_outline, load_base, pool_image_states, to_pixels
from sera_serve.errors import BaseNotFound, InvalidConfiguration, InvalidRequest, UnsupportedTask
from sera_serve.layers import adaptable_linears
from support.factories import encoded, random_encoder
from support.vision import IMAGE_SIZE, clip_tokenizer, picture, random_clip, random_deit, random_vit, spec_of


def saved(base: FrozenBase, folder: Path) -> str:
    base.model.save_pretrained(folder)
    if base.reads_text:
        base.tokenizer.save_pretrained(folder)
    return str(folder)


def some_pixels(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "kind", "tokens", "prefix"),
    [(random_vit, "vision", 17, 1), (random_deit, "vision", 18, 2), (random_clip, "dual", 17, 1)],
)
def test_a_folder_is_loaded_as_the_base_that_was_saved(
    make: Callable[[], FrozenBase], kind: str, tokens: int, prefix: int, tmp_path: Path
) -> None:
    base = make()
    loaded = load_base(saved(base, tmp_path / "base"))
    again = load_base(str(tmp_path / "base"))
    assert loaded.kind == kind
    assert loaded.reads_text == (kind == "dual")
    assert loaded.info == again.info
    assert loaded.info.weights_digest == base.info.weights_digest
    assert loaded.info.hidden_size == loaded.hidden_size == 64
    tower = loaded.image_tower
    assert tower is not None
    assert (tower.tokens, tower.prefix_tokens, tower.height, tower.width) == (tokens, prefix, IMAGE_SIZE, IMAGE_SIZE)
    torch.testing.assert_close(loaded.image_states(some_pixels()), base.image_states(some_pixels()))
    assert loaded.image_states(some_pixels()).shape == (3, tokens, 64)
    assert loaded.image_spec == base.image_spec
    outline = base_outline(str(tmp_path / "base"))
    assert set(adaptable_linears(outline)) == set(loaded.module_shapes())


@pytest.mark.parametrize(("make", "own"), [(random_vit, ViTModel), (random_deit, DeiTModel)])
def test_states_are_the_models_own_after_its_last_norm(
    make: Callable[[], FrozenBase], own: type[torch.nn.Module]
) -> None:
    base = make()
    assert type(base.model) is own
    states = base.image_states(some_pixels())
    torch.testing.assert_close(states, base.model(pixel_values=some_pixels()).last_hidden_state)
    torch.testing.assert_close(base.image_embeddings(some_pixels()), states[:, 0])


def test_clips_embeddings_are_transformers_own(tmp_path: Path) -> None:
    base = random_clip()
    own = CLIPModel.from_pretrained(saved(base, tmp_path / "base")).eval()
    images = own.get_image_features(pixel_values=some_pixels()).pooler_output
    torch.testing.assert_close(base.image_embeddings(some_pixels()), images)
    padded = base.tokenizer(["a cat", "a longer text of a dog"], padding=True, return_tensors="pt")
    ids, mask = padded["input_ids"], padded["attention_mask"]
    texts = own.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(base.text_embeddings(ids, mask), texts)
    assert base.embedding_size == 32
    # The class token of the states is what transformers calls the pooled output.
    pooled = own.vision_model(pixel_values=some_pixels()).pooler_output
    torch.testing.assert_close(base.image_states(some_pixels())[:, 0], pooled)


def test_both_towers_and_projections_can_be_adapted_and_no_pooler() -> None:
    paths = set(random_clip().module_shapes())
    assert {"text_projection", "visual_projection"} <= paths
    assert {path.split(".")[0] for path in paths} - {"text_projection", "visual_projection"} == {
        "text_model",
        "vision_model",
    }
    assert not any("pooler" in path for path in random_vit().module_shapes())


def test_the_mean_is_over_patches_alone() -> None:
    states = torch.arange(2 * 5 * 1, dtype=torch.float32).reshape(2, 5, 1)
    assert pool_image_states(states, "mean", 2).tolist() == [[3.0], [8.0]]
    assert pool_image_states(states, "cls", 2).tolist() == [[0.0], [5.0]]
    with pytest.raises(InvalidRequest, match="cls or mean"):
        pool_image_states(states, "last_token", 2)


def test_the_folders_preprocessing_is_read(tmp_path: Path) -> None:
    folder = saved(random_vit(), tmp_path / "vit")
    spec = load_base(folder).image_spec
    assert spec is not None
    assert (spec.resize, spec.resample, spec.mean) == ("exact", "bilinear", [0.5] * 3)
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3, resample=3).save_pretrained(folder)
    spec = load_base(folder).image_spec
    assert spec is not None
    # The size is the tower's: the processor's own of 224 would not fit it.
    assert (spec.height, spec.width) == (IMAGE_SIZE, IMAGE_SIZE)
    assert (spec.resize, spec.resample, spec.mean, spec.std) == ("exact", "bicubic", [0.1, 0.2, 0.3], [0.4] * 3)
    folder = saved(random_clip(), tmp_path / "clip")
    family = load_base(folder).image_spec
    CLIPImageProcessorPil().save_pretrained(folder)
    assert load_base(folder).image_spec == family
    assert family is not None
    assert family.resize == "shortest_edge"


def test_a_base_says_what_it_does_not_take() -> None:
    vision = random_vit()
    with pytest.raises(UnsupportedTask, match="images and no text"):
        encoded(vision, ["some text"], 8)
    with pytest.raises(UnsupportedTask, match="CLIP"):
        vision.text_embeddings(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    with pytest.raises(UnsupportedTask, match="text and no images"):
        random_encoder().image_states(some_pixels())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_rescale": False},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 70.0, 80.0]},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 128, "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
)
@pytest.mark.parametrize("processor", [ViTImageProcessorPil, CLIPImageProcessorPil])
def test_pixels_are_those_of_the_folders_processor(processor: Any, options: dict[str, Any], tmp_path: Path) -> None:
    is_clip = processor is CLIPImageProcessorPil
    folder = saved(random_clip() if is_clip else random_vit(), tmp_path / "base")
    sides = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": sides} if is_clip else {"size": sides}
    own = processor(**sizes, **options)
    own.save_pretrained(folder)
    expected = own(picture(5), return_tensors="np")["pixel_values"][0]
    pixels = to_pixels(picture(5), spec_of(load_base(folder)))
    # Without rescaling the values go up to 255.
    np.testing.assert_allclose(pixels, expected, rtol=2e-6, atol=2e-6)


def test_null_in_the_folders_preprocessing_is_the_familys_own(tmp_path: Path) -> None:
    folder = saved(random_clip(), tmp_path / "base")
    fields = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "do_center_crop")
    family = spec_of(load_base(folder))
    Path(folder, "preprocessor_config.json").write_text(json.dumps(dict.fromkeys(fields)))
    assert spec_of(load_base(folder)) == family


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rescale_factor": 0}, "rescale_factor is 0; give a number above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        ({"image_std": [1, 0, 1]}, "image_std is .*; give numbers above 0"),
        ({"image_mean": [0.5]}, "image_mean is .*; give three finite numbers"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean is .*; give three finite numbers"),
        ({"rescale_factor": 10**400}, "rescale_factor is 1000"),
        ({"rescale_factor": 1e-320}, "rescale_factor is .* too small or too large"),
        ({"image_std": [1e-323] * 3, "rescale_factor": 1}, "rescale_factor is 1, too small or too large"),
        ({"resample": 2.0}, "resample is 2.0; take 0 to 3"),
        ({"resample": True}, "resample is True; take 0 to 3"),
        ({"resample": 4}, "resample is 4; take 0 to 3, nearest, lanczos, bilinear, bicubic"),
        ({"do_resize": False}, "do_resize is false, and images are always resized .* make it true"),
    ],
)
def test_preprocessing_that_no_spec_describes_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = saved(random_vit(), tmp_path / "base")
    Path(folder, "preprocessor_config.json").write_text(json.dumps(options))
    with pytest.raises(InvalidConfiguration, match=said) as refusal:
        load_base(folder)
    assert refusal.value.param == "base"


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"image_mean": [0.1, 0.2', "cannot be read as JSON .* or remove the file"),
        (b"\xff\xfe\x00\x9d", "cannot be read as JSON"),
        (b"[" * 200_000, "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"[1, 2]", "it is no JSON object"),
    ],
)
def test_a_damaged_file_of_preprocessing_is_not_taken_for_a_missing_one(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    folder = saved(random_vit(), tmp_path / "base")
    Path(folder, name).write_bytes(content)
    with pytest.raises(InvalidConfiguration, match=f"^{name} of the base: .*{said}") as refusal:
        load_base(folder)
    assert refusal.value.param == "base"


def test_the_file_of_a_whole_processor_comes_first(tmp_path: Path) -> None:
    folder = saved(random_vit(), tmp_path / "base")
    for name, fields in (
        ("preprocessor_config.json", {"image_mean": [0.2] * 3}),
        ("processor_config.json", {"image_processor": {"image_mean": [0.1] * 3}}),
    ):
        Path(folder, name).write_text(json.dumps(fields))
    assert spec_of(load_base(folder)).mean == [0.1] * 3
    # A file of another part alone says nothing of images.
    Path(folder, "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert spec_of(load_base(folder)).mean == [0.2] * 3
    Path(folder, "processor_config.json").write_text(json.dumps({"image_processor": 5}))
    with pytest.raises(InvalidConfiguration, match=r"processor_config.json of the base: image_processor is no JSON"):
        load_base(folder)


def grey_vit() -> PreTrainedModel:
    return ViTModel(ViTConfig(num_channels=1, num_hidden_layers=1, image_size=IMAGE_SIZE), add_pooling_layer=False)


def grey_clip() -> PreTrainedModel:
    tower = {"num_hidden_layers": 1, "image_size": IMAGE_SIZE, "num_channels": 1}
    return CLIPModel(CLIPConfig(vision_config=tower, text_config={"num_hidden_layers": 1, "vocab_size": 259}))


@pytest.mark.parametrize("make", [grey_vit, grey_clip])
def test_a_base_whose_images_are_not_rgb_is_refused(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    clip_tokenizer().save_pretrained(tmp_path)
    for load in (load_base, base_outline):
        with pytest.raises(InvalidConfiguration, match="images of 1 channels") as refusal:
            load(str(tmp_path))
        assert refusal.value.param == "base"


def test_a_checkpoint_with_a_pooler_is_loaded_without_a_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = random_vit().model.config
    ViTModel(config).save_pretrained(tmp_path)
    capfd.readouterr()
    assert load_base(str(tmp_path)).kind == "vision"
    out, err = capfd.readouterr()
    assert "pooler" not in out + err + caplog.text
    # transformers tells others of it as before.
    ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert "pooler" in "".join(capfd.readouterr()) + caplog.text


def test_a_checkpoint_of_other_shapes_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(random_vit(), tmp_path / "base")
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(BaseNotFound, match=r"other shapes than its config.json says, such as .*\(128,\), not \(96,\)"):
        load_base(folder)
