"""PEFT checkpoints of image bases: PEFT's own forward pass of transformers' own models is the judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPForImageClassification, DeiTForImageClassification, ViTForImageClassification

from adapters_store import AdapterBundle
from adapters_store.convert.peft_errors import UnsupportedAdapter
from sera_serve.base import FrozenBase, import_base
from sera_serve.residency.import_probe import import_checkpoint
from support.peft_checkpoints import (
    bundle_states,
    edit_config,
    edit_tensors,
    imported,
    peft_states,
    read,
    save_checkpoint,
)
from support.vision import image_file, pixels_of, random_clip, random_deit, random_vit, spec_of

LABELS = {"id2label": {"0": "cat", "1": "dog", "2": "fish"}}
TARGETS = ["q_proj", "v_proj"]


def pixels(base: FrozenBase) -> Tensor:
    """Three images, float64."""
    return torch.cat([pixels_of(image_file(seed), spec_of(base)) for seed in range(3)]).double()


def for_task(base: FrozenBase, kind: type[nn.Module]) -> nn.Module:
    """The base within transformers' model for image classification, with three labels."""
    torch.manual_seed(5)
    config = base.model.config
    config.num_labels = 3
    model = kind(config)
    getattr(model, base.model.base_model_prefix).load_state_dict(base.model.state_dict())
    return model.eval()


def head_of(bundle: AdapterBundle, pooled: Tensor) -> Tensor:
    """The scores of a bundle's head, float64."""
    return pooled.double() @ bundle.tensors["head.weight"].double().T + bundle.tensors["head.bias"].double()


@pytest.mark.parametrize(
    ("make", "kind"), [(random_vit, ViTForImageClassification), (random_deit, DeiTForImageClassification)]
)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}])
def test_a_classifier_of_images_is_exact(
    make: Callable[[], FrozenBase], kind: type[nn.Module], fields: dict[str, object], tmp_path: Path
) -> None:
    base = make()
    model = for_task(base, kind)
    save_checkpoint(model, tmp_path, target_modules=TARGETS, modules_to_save=["classifier"], **fields)
    edit_config(tmp_path, **LABELS)
    bundle = import_checkpoint(read(tmp_path), import_base(base), base.dtype).bundle
    config = bundle.config
    assert (config.task, config.pooling, config.labels) == ("image-classify", "cls", ["cat", "dog", "fish"])
    assert config.image == base.image_spec
    images = pixels(base)
    expected = peft_states(model, tmp_path, lambda found: found(pixel_values=images).logits)
    states = bundle_states(base.model, bundle, lambda found: found(pixel_values=images).last_hidden_state)
    scores = head_of(bundle, states[:, 0])
    assert torch.allclose(scores, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        plain = base.model.double()(pixel_values=images).last_hidden_state[:, 0]
    assert not torch.allclose(head_of(bundle, plain), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_the_names_of_older_releases_are_those_of_the_same_layers(tmp_path: Path) -> None:
    base = random_vit()
    targets = ["q_proj", "o_proj", "fc1", "fc2"]
    fields = {"target_modules": targets, "modules_to_save": ["classifier"], "alpha_pattern": {"q_proj": 32}}
    save_checkpoint(for_task(base, ViTForImageClassification), tmp_path, **fields)
    bundle = imported(tmp_path, base).bundle
    older = {
        "layers.": "encoder.layer.",
        "attention.q_proj": "attention.attention.query",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            for new, old in older.items():
                name = name.replace(new, old)
            found[name] = tensor
        return found

    edit_tensors(tmp_path, renamed)
    edit_config(tmp_path, target_modules=["query", "dense"], alpha_pattern={"query": 32})
    again = imported(tmp_path, base).bundle
    assert again.config.modules == bundle.config.modules
    assert all(torch.equal(tensor, bundle.tensors[name]) for name, tensor in again.tensors.items())
    assert {spec.scaling for spec in again.config.modules.values()} == {32 / 4, 6 / 4}


def test_both_towers_of_clip_are_exact(tmp_path: Path) -> None:
    base = random_clip()
    save_checkpoint(base.model, tmp_path, target_modules=["q_proj", "v_proj"])
    result = imported(tmp_path, base)
    config = result.bundle.config
    assert (config.task, config.labels, config.pooling, config.image) == ("retrieve", None, None, base.image_spec)
    assert {path.partition(".")[0] for path in config.modules} == {"text_model", "vision_model"}
    assert any("preprocessing" in warning for warning in result.warnings)
    images, tokens = pixels(base), torch.tensor([[256, 65, 66, 67, 257], [256, 70, 71, 72, 257]])

    def embeddings(model: nn.Module) -> Tensor:
        found = model(pixel_values=images, input_ids=tokens)
        return torch.cat([found.image_embeds, found.text_embeds])

    expected = peft_states(base.model, tmp_path, embeddings)
    edit_config(tmp_path, task_type="FEATURE_EXTRACTION")
    assert imported(tmp_path, base).bundle.digest == result.bundle.digest
    found = bundle_states(base.model, result.bundle, embeddings)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(embeddings(base.model.double()), expected, rtol=0, atol=0.01)


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    base = random_vit()
    save_checkpoint(base.model, tmp_path / "headless", target_modules=TARGETS)
    with pytest.raises(UnsupportedAdapter, match="add 'classifier' to modules_to_save") as caught:
        imported(tmp_path / "headless", base)
    assert caught.value.param == "adapter_config.modules_to_save"
    edit_config(tmp_path / "headless", task_type="SEQ_CLS")
    with pytest.raises(UnsupportedAdapter, match="PEFT has no name for tasks of images"):
        imported(tmp_path / "headless", base)
    model, saved = for_task(base, ViTForImageClassification), ["classifier"]
    save_checkpoint(model, tmp_path / "conv", target_modules=["q_proj", "projection"], modules_to_save=saved)
    with pytest.raises(
        UnsupportedAdapter, match=r"'vit.embeddings.patch_embeddings.projection' is a convolution"
    ) as caught:
        imported(tmp_path / "conv", base)
    assert caught.value.param == "vit.embeddings.patch_embeddings.projection"
    save_checkpoint(model, tmp_path / "head", target_modules=["q_proj", "classifier"])
    with pytest.raises(
        UnsupportedAdapter, match="leave 'classifier' out of target_modules, add it to modules"
    ) as caught:
        imported(tmp_path / "head", base)
    assert caught.value.param == "classifier"
    clip = random_clip()
    config = clip.model.config
    config.num_labels = 3
    # transformers takes the mean of the patches without the last normalisation.
    save_checkpoint(
        CLIPForImageClassification(config), tmp_path / "clip", target_modules=["q_proj"], modules_to_save=["classifier"]
    )
    with pytest.raises(UnsupportedAdapter, match="before the last normalisation"):
        imported(tmp_path / "clip", clip)
