"""What leaves the server with gains, offsets and heads of two layers: exactly, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bundle_factory import HEAD, fill, make_bundle, make_classifier
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from adapters_store import AdapterBundle, AdapterConfig, InvalidBundle, ModuleSpec, dense_factors, export_peft
from sera_serve.base import FrozenBase, freeze_base, merge_adapter
from support.factories import random_decoder, random_encoder

SHAPE = {"rank": 4, "split": 2, "use_mixer": True, "scaling": 0.5}


def bundle_for(base: FrozenBase, paths: list[str], **vectors: bool) -> AdapterBundle:
    shapes = base.module_shapes()
    modules = {
        path: ModuleSpec.model_validate({**SHAPE, "d_in": shapes[path][0], "d_out": shapes[path][1], **vectors})
        for path in paths
    }
    return fill(AdapterConfig(task="generate", method="lora", base=base.info, modules=modules), seed=2)


def gpt2() -> FrozenBase:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=259, n_positions=32, bos_token_id=0, eos_token_id=0)
    return freeze_base(GPT2LMHeadModel(config), random_decoder().tokenizer, "random-gpt2")


@pytest.mark.parametrize("vectors", [{"has_gain": True}, {"has_offset": True}, {"has_gain": True, "has_offset": True}])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_merged_layer_computes_the_formula(transposed: bool, vectors: dict[str, bool]) -> None:
    base = gpt2() if transposed else random_encoder()
    path = "transformer.h.0.attn.c_attn" if transposed else "encoder.layer.0.attention.self.query"
    bundle = bundle_for(base, [path], **vectors)
    layer = base.model.get_submodule(path)
    layer.get_parameter("bias").normal_()
    x = torch.randn(5, bundle.config.modules[path].d_in)
    update = x.double() @ dense_factors(bundle, path).delta_weight()
    want = layer(x).double() + update
    if vectors.get("has_gain"):
        want = bundle.tensors[f"{path}.gain"] * want
    if vectors.get("has_offset"):
        want = want + bundle.tensors[f"{path}.offset"]
    merge_adapter(base, bundle)
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=1e-5)


def test_a_gain_of_a_layer_without_a_bias_is_merged() -> None:
    base, path = random_decoder(), "model.layers.0.mlp.up_proj"
    bundle = bundle_for(base, [path], has_gain=True)
    layer = base.model.get_submodule(path)
    assert isinstance(layer, nn.Linear) and layer.bias is None
    before = layer.weight.double()
    merge_adapter(base, bundle)
    delta = dense_factors(bundle, path).delta_weight().T
    want = bundle.tensors[f"{path}.gain"].double()[:, None] * (before + delta)
    torch.testing.assert_close(layer.weight.double(), want, rtol=1e-6, atol=1e-6)


def test_an_offset_of_a_layer_without_a_bias_cannot_be_merged() -> None:
    base = random_decoder()
    paths = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    bundle = bundle_for(base, paths, has_gain=True, has_offset=True)
    # An offset of zeros is none.
    bundle.tensors[f"{paths[0]}.offset"].zero_()
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with pytest.raises(InvalidBundle, match="has no bias") as refusal:
        merge_adapter(base, bundle)
    assert (refusal.value.code, refusal.value.param) == ("not_mergeable", f"{paths[1]}.offset")
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.model.state_dict().items())
    bundle.tensors[f"{paths[1]}.offset"].zero_()
    merge_adapter(base, bundle)


def test_a_head_of_two_layers_is_written_beside(tmp_path: Path) -> None:
    bundle = make_classifier(format_version=2, head=HEAD)
    assert export_peft(bundle, tmp_path) is True
    head = safetensors.torch.load_file(tmp_path / "head.safetensors")
    names = {name.removeprefix("head."): name for name in bundle.tensors if name.startswith("head.")}
    assert set(head) == set(names) == {"weight", "bias", "dense.weight", "dense.bias"}
    assert all(torch.equal(head[name], bundle.tensors[names[name]]) for name in names)
    with safetensors.safe_open(tmp_path / "head.safetensors", "pt") as file:
        assert file.metadata()["activation"] == "tanh"
        assert json.loads(file.metadata()["labels"]) == ["no", "yes"]


def test_a_chat_template_leaves_beside_the_lora(tmp_path: Path) -> None:
    template = "{{ messages }} é\n"
    assert export_peft(make_bundle(format_version=2, chat_template=template), tmp_path) is False
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == template
    assert export_peft(make_bundle(), tmp_path / "plain") is False
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()
