"""Training on images: rules are learned, bundles carry the preprocessing, and a stopped run ends as an unbroken one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_samples import captioned_images, image_folder, image_settings

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import attached_layers
from sera_serve.trainer.compare.one_run import train_one
from sera_serve.trainer.run import TrainResult, train_adapter
from sera_serve.trainer.settings import TrainSettings
from support.factories import random_decoder
from support.vision import random_clip, random_deit, random_vit


def stored(settings: TrainSettings, result: TrainResult) -> Any:
    return AdapterStore(settings.store).load(result.digest)


@pytest.mark.parametrize(
    ("make_base", "pooling"), [(random_vit, "cls"), (random_deit, "mean"), (random_clip, "cls"), (random_clip, "mean")]
)
def test_colours_are_learned(make_base: Callable[[], FrozenBase], pooling: str, tmp_path: Path) -> None:
    base = make_base()
    options: dict[str, Any] = {"pooling": pooling, "learning_rate": 1e-2, "augment": pooling == "mean"}
    settings = image_settings(tmp_path, image_folder(tmp_path / "rows", 16, ("train", "test")), **options)
    result = train_adapter(settings, base=base)
    assert result.metrics["test_accuracy"] == 1
    config = stored(settings, result).config
    assert (config.task, config.labels, config.pooling) == ("image-classify", ["blue", "red"], pooling)
    assert config.image == base.image_spec
    assert config.max_length is None
    assert (result.head_parameters, result.parameters > 0) == (2 * 65, True)
    assert not attached_layers(base.model)


def test_only_layers_that_images_pass_are_adapted(tmp_path: Path) -> None:
    base, train = random_clip(), image_folder(tmp_path / "rows", 10)
    settings = image_settings(tmp_path, train, epochs=1, target_modules=("q_proj", "v_proj"))
    result = train_adapter(settings, base=base)
    modules = stored(settings, result).config.modules
    assert sorted(modules) == [f"vision_model.encoder.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]
    assert result.notes == [
        "4 layers that no image passes are not adapted, such as text_model.encoder.layers.0.self_attn.v_proj"
    ]
    with pytest.raises(InvalidConfiguration, match="no layer of the image tower"):
        train_adapter(image_settings(tmp_path, train, target_modules=("text_projection",)), base=base)


def test_head_only_trains_on_states_of_the_frozen_tower(tmp_path: Path) -> None:
    settings = image_settings(
        tmp_path, image_folder(tmp_path / "rows", 12, ("train", "val", "test")), method="head-only", epochs=10
    )
    result = train_adapter(settings, base=random_vit())
    assert result.metrics["test_accuracy"] == 1
    assert (result.parameters, stored(settings, result).config.modules) == (0, {})


def test_captions_find_their_images(tmp_path: Path) -> None:
    base = random_clip()
    photos = captioned_images(tmp_path / "photos", 16)
    settings = image_settings(
        tmp_path, photos, task="retrieve", eval=photos, epochs=8, learning_rate=2e-2, batch_size=16, rank=8
    )
    result = train_adapter(settings, base=base)
    still = settings.model_copy(update={"name": "acme/still", "learning_rate": 1e-9, "epochs": 1})
    untrained = train_adapter(still, base=base)
    # Captions name one of four colours, so an image's own are among those of about four images.
    assert result.metrics["rsum"] > untrained.metrics["rsum"] + 1
    bundle = stored(settings, result)
    assert (bundle.config.task, bundle.config.labels, bundle.config.max_length) == ("retrieve", None, 40)
    assert {path.split(".")[0] for path in bundle.config.modules} == {"text_model", "vision_model"}
    assert all(path.endswith(("q_proj", "v_proj")) for path in bundle.config.modules)
    assert bundle.config.image == base.image_spec
    assert result.head_parameters == 0


def test_a_part_of_the_test_captions_is_scored(tmp_path: Path) -> None:
    photos = captioned_images(tmp_path / "photos", 16)
    settings = image_settings(tmp_path, photos, task="retrieve", epochs=1, test=photos)
    options = settings.model_dump(mode="json", exclude_unset=True, exclude={"store", "name"})
    base, clip = tmp_path / "base", random_clip()
    clip.model.save_pretrained(base)
    clip.tokenizer.save_pretrained(base)
    scores = [
        train_one({"settings": options | {"base": str(base)}, "baseline": None, "test_rows": count})["metrics"]
        for count in (4, None)
    ]
    # Fewer captions are easier to tell apart.
    assert scores[0]["test_t2i_r5"] == 1 > scores[1]["test_t2i_r5"]


def test_embeddings_that_came_to_one_point_are_told(tmp_path: Path) -> None:
    base, photos = random_clip(), captioned_images(tmp_path / "photos", 16)
    settings = image_settings(tmp_path, photos, task="retrieve", eval=photos, epochs=2, learning_rate=1e-9)
    assert not any("nearly the same" in note for note in train_adapter(settings, base=base).notes)
    with torch.no_grad():
        # Every image is its bias.
        base.model.vision_model.post_layernorm.weight.zero_()
        base.model.vision_model.post_layernorm.bias.normal_()
    notes = train_adapter(settings.model_copy(update={"name": "acme/one-point"}), base=base).notes
    assert sum("the embeddings of all images were nearly the same" in note for note in notes) == 1


@pytest.mark.slow
def test_going_on_from_an_adapter_keeps_its_labels_and_towers(tmp_path: Path) -> None:
    base = random_clip()
    first = image_settings(tmp_path, image_folder(tmp_path / "rows", 8), epochs=1)
    train_adapter(first, base=base)
    again = TrainSettings(
        **{"base": "random", "store": first.store, "name": "acme/eyes", "task": "image-classify", "epochs": 1},
        train=image_folder(tmp_path / "more", 9),
        init_from="acme/eyes@v1",
    )
    result = train_adapter(again, base=base)
    assert result.version == 2
    photos = captioned_images(tmp_path / "photos", 16)
    retrieve = image_settings(tmp_path, photos, task="retrieve", name="acme/find", epochs=1, max_length=12)
    result = train_adapter(retrieve, base=base)
    assert "28 of 28 training captions were cut to 12 tokens" in result.notes
    more = TrainSettings(
        **{"base": "random", "store": first.store, "name": "acme/find", "task": "retrieve", "epochs": 1},
        train=photos,
        init_from="acme/find@v1",
    )
    bundle = stored(more, train_adapter(more, base=base))
    assert {path.rpartition(".")[2] for path in bundle.config.modules} == {"q_proj", "v_proj"}
    assert bundle.config.max_length == 12


TEXT_TASKS: dict[str, dict[str, Any]] = {
    "classify": {"text": "a b", "label": "x"},
    "regress": {"text": "a b", "label": 1.5},
    "token-classify": {"text": "a b", "spans": [{"start": 0, "end": 1, "label": "x"}]},
    "generate": {"prompt": "a", "completion": "b"},
}
OTHERS: dict[str, dict[str, Any]] = {"classify": {"label": "y"}, "regress": {"label": 2.5}}


@pytest.mark.parametrize("task", TEXT_TASKS)
@pytest.mark.parametrize(
    ("make_base", "fitting"), [(random_vit, "image-classify"), (random_clip, "image-classify or retrieve")]
)
def test_a_base_of_images_trains_no_task_of_texts(
    make_base: Callable[[], FrozenBase], fitting: str, task: str, tmp_path: Path
) -> None:
    rows = [TEXT_TASKS[task], TEXT_TASKS[task] | OTHERS.get(task, {})] * 6
    train = tmp_path / "rows.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"max_length": 30, "target_modules": "all-linear", "eval_fraction": 0}
    with pytest.raises(InvalidConfiguration, match=f"--task {task} trains on texts.*take --task {fitting}, or") as said:
        train_adapter(image_settings(tmp_path, train, task=task, **options), base=make_base())
    assert said.value.param == "task"
    assert list(AdapterStore(tmp_path / "store").iter_adapters()) == []


def test_bases_without_the_towers_are_refused(tmp_path: Path) -> None:
    rows, photos = image_folder(tmp_path / "rows", 6), captioned_images(tmp_path / "photos", 16)
    with pytest.raises(InvalidConfiguration, match="takes no images"):
        train_adapter(image_settings(tmp_path, rows), base=random_decoder())
    with pytest.raises(InvalidConfiguration, match="take a CLIP base"):
        train_adapter(image_settings(tmp_path, photos, task="retrieve", target_modules="all-linear"), base=random_vit())
    with pytest.raises(InvalidConfiguration, match="--pooling last_token is not for images"):
        train_adapter(image_settings(tmp_path, rows, pooling="last_token"), base=random_vit())
