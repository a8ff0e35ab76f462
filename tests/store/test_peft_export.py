"""An exported LoRA checkpoint and merged weights are the adapter, to the last digit that float32 allows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bundle_factory import Q, classifier_fields, fill, make_bundle, make_classifier
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from adapters_store import AdapterBundle, AdapterConfig, InvalidBundle, ModuleSpec
from adapters_store.convert.dense import dense_factors
from adapters_store.convert.peft_export import alpha_for, export_peft, peft_config, write_head
from sera_serve.base import FrozenBase, freeze_base, merge_adapter
from support.factories import random_decoder
from support.peft_checkpoints import quiet

ATTENTION, MLP = "model.layers.{}.self_attn.{}", "model.layers.{}.mlp.{}"
SPECS = {
    ATTENTION.format(0, "q_proj"): {"d_in": 64, "d_out": 64, "rank": 8, "split": 8, "use_mixer": True, "scaling": 2.0},
    ATTENTION.format(0, "v_proj"): {"d_in": 64, "d_out": 32, "rank": 8, "split": 2, "use_mixer": False, "scaling": 2.0},
    ATTENTION.format(1, "q_proj"): {"d_in": 64, "d_out": 64, "rank": 6, "split": 2, "use_mixer": True, "scaling": 0.3},
    MLP.format(0, "down_proj"): {"d_in": 128, "d_out": 64, "rank": 4, "split": 1, "use_mixer": False, "scaling": 1 / 3},
    MLP.format(1, "up_proj"): {"d_in": 64, "d_out": 128, "rank": 16, "split": 4, "use_mixer": True, "scaling": -0.7},
}
# peft asks transformers for a property under its old name.
PEFT_ON_TRANSFORMERS_5 = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return random_decoder()


def mixed_bundle(base: FrozenBase) -> AdapterBundle:
    """Layers of different rank, split, scaling and mixer."""
    modules = {path: ModuleSpec.model_validate(spec) for path, spec in SPECS.items()}
    config = AdapterConfig(task="generate", method="sera", base=base.info, modules=modules)
    return fill(config, seed=3)


def by_definition(bundle: AdapterBundle, path: str) -> torch.Tensor:
    """scaling * A C B, element by element from the format's description of blocks."""
    spec = bundle.config.modules[path]
    a = torch.zeros(spec.d_in, spec.rank, dtype=torch.float64)
    b = torch.zeros(spec.rank, spec.d_out, dtype=torch.float64)
    for row in range(spec.d_in):
        block = row // (spec.d_in // spec.split)
        for j in range(spec.segment_rank):
            a[row, block * spec.segment_rank + j] = bundle.tensors[f"{path}.sera_a"][row, j]
    for column in range(spec.d_out):
        block = column // (spec.d_out // spec.split)
        for j in range(spec.segment_rank):
            b[block * spec.segment_rank + j, column] = bundle.tensors[f"{path}.sera_b"][j, column]
    c = bundle.tensors[f"{path}.sera_c"].double() if spec.use_mixer else torch.eye(spec.rank).double()
    return spec.scaling * a @ c @ b


def test_exported_matrices_give_the_dense_product(base: FrozenBase, tmp_path: Path) -> None:
    bundle = mixed_bundle(base)
    assert export_peft(bundle, tmp_path) is False
    written = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert len(written) == 2 * len(SPECS)
    for path, spec in bundle.config.modules.items():
        lora_a = written[f"base_model.model.{path}.lora_A.weight"].double()
        lora_b = written[f"base_model.model.{path}.lora_B.weight"].double()
        assert (lora_a.shape, lora_b.shape) == ((spec.rank, spec.d_in), (spec.d_out, spec.rank))
        key = "^" + path.replace(".", r"\.")
        rank = config["rank_pattern"].get(key, config["r"])
        scaling = config["alpha_pattern"].get(key, config["lora_alpha"]) / rank
        assert (rank, scaling) == (spec.rank, spec.scaling)
        expected = by_definition(bundle, path)
        assert torch.allclose(dense_factors(bundle, path).delta_weight(), expected, rtol=1e-12, atol=1e-12)
        # lora_A is rounded to float32 once; that is all that is lost.
        assert torch.allclose(
            scaling * (lora_b @ lora_a).T, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
        )
    assert config["target_modules"] == list(SPECS)


@PEFT_ON_TRANSFORMERS_5
def test_real_peft_gives_what_merged_weights_give(tmp_path: Path) -> None:
    bundle = mixed_bundle(random_decoder())
    export_peft(bundle, tmp_path)
    tokens = torch.arange(40).view(2, 20)
    base_only, merged = random_decoder(), random_decoder()
    merge_adapter(merged, bundle)
    with torch.no_grad():
        plain = base_only.model.double()(tokens).logits
        expected = merged.model.double()(tokens).logits
        adapted = PeftModel.from_pretrained(base_only.model, str(tmp_path)).double()(tokens).logits
    assert (expected - plain).abs().max() > 0.1
    assert torch.allclose(adapted, expected, rtol=0, atol=1e-4)
    loaded = sum(isinstance(module, nn.ModuleDict) and "default" in module for module in base_only.model.modules())
    assert loaded


def test_uniform_adapter_needs_no_patterns() -> None:
    config = peft_config(make_bundle().config)
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    assert type(config["lora_alpha"]) is int
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == make_bundle().config.base.name
    assert config["task_type"] == "CAUSAL_LM"


def test_the_largest_rank_is_r_and_its_alpha_gives_the_usual_scaling() -> None:
    # vLLM reads these two alone: `r` is at most --max-lora-rank, and every layer is scaled by lora_alpha / r.
    ranks = {"layers.0.q": 2, "layers.1.q": 2, "layers.2.q": 8}
    modules = {path: make_bundle().config.modules[Q].model_copy(update={"rank": r}) for path, r in ranks.items()}
    scaling = modules["layers.0.q"].scaling
    config = peft_config(make_bundle().config.model_copy(update={"modules": modules}))
    assert (config["r"], config["lora_alpha"] / config["r"]) == (8, scaling)
    assert config["rank_pattern"] == {r"^layers\.0\.q": 2, r"^layers\.1\.q": 2}
    assert config["alpha_pattern"] == {r"^layers\.0\.q": 2 * scaling, r"^layers\.1\.q": 2 * scaling}
    odd = modules | {"layers.2.q": modules["layers.2.q"].model_copy(update={"scaling": 3.0})}
    config = peft_config(make_bundle().config.model_copy(update={"modules": odd}))
    assert (config["r"], config["lora_alpha"] / config["r"]) == (8, scaling)
    assert config["alpha_pattern"][r"^layers\.2\.q"] == 24


def test_patterns_match_their_own_layer_only() -> None:
    modules = make_bundle().config.modules
    small = ModuleSpec(**{**modules[Q].model_dump(), "rank": 2})
    both = {"layers.0.q": small, "model.layers.0.q": modules[Q], "model.layers.0x0.q": modules[Q]}
    config = peft_config(make_bundle().config.model_copy(update={"modules": both}))
    assert config["rank_pattern"] == {r"^layers\.0\.q": 2}


@given(st.floats(-1e6, 1e6), st.integers(1, 4096))
def test_alpha_gives_the_scaling_back(scaling: float, rank: int) -> None:
    alpha = alpha_for(scaling, rank)
    assert math.isclose(alpha / rank, scaling, rel_tol=2.3e-16, abs_tol=5e-324)


@given(st.integers(1, 512), st.integers(1, 1024))
def test_whole_alpha_comes_back_as_it_was_trained(alpha: int, rank: int) -> None:
    found = alpha_for(alpha / rank, rank)
    assert found / rank == alpha / rank


def test_head_is_written_beside(tmp_path: Path) -> None:
    bundle = make_classifier()
    assert export_peft(bundle, tmp_path) is True
    head = safetensors.torch.load_file(tmp_path / "head.safetensors")
    assert torch.equal(head["weight"], bundle.tensors["head.weight"])
    assert torch.equal(head["bias"], bundle.tensors["head.bias"])
    with safetensors.safe_open(tmp_path / "head.safetensors", "pt") as file:
        assert json.loads(file.metadata()["labels"]) == ["no", "yes"]
        assert file.metadata()["pooling"] == "last_token"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None


def test_head_only_has_no_lora_form(tmp_path: Path) -> None:
    fields = classifier_fields(method="head-only", modules={})
    bundle = fill(AdapterConfig.from_json(json.dumps(fields)))
    with pytest.raises(InvalidBundle) as refusal:
        export_peft(bundle, tmp_path / "out")
    assert (refusal.value.code, refusal.value.param) == ("nothing_to_export", "format")
    assert "use format 'sera' or 'merged'" in refusal.value.message
    assert not (tmp_path / "out").exists()


def test_a_head_of_images_alone_is_refused_for_its_images(tmp_path: Path) -> None:
    spec = {"height": 8, "width": 8, "resize": "exact", "resample": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    changes = {"format_version": 3, "task": "image-classify", "pooling": "cls", "image": spec}
    fields = classifier_fields(method="head-only", modules={}, **changes)
    bundle = fill(AdapterConfig.from_json(json.dumps({name: fields[name] for name in fields if name != "max_length"})))
    with pytest.raises(InvalidBundle, match=r"no place for the image preprocessing .* use format 'sera' or") as refusal:
        export_peft(bundle, tmp_path / "out")
    assert (refusal.value.code, refusal.value.param) == ("no_peft_form", "adapter_config.image")
    assert not (tmp_path / "out").exists()
    assert write_head(bundle, tmp_path)
    with safetensors.safe_open(tmp_path / "head.safetensors", "pt") as file:
        assert json.loads(file.metadata()["image"]) == spec


def test_merging_into_gpt2_turns_no_matrix_round() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=259, n_positions=32, bos_token_id=0, eos_token_id=0)
    tokenizer = random_decoder().tokenizer
    base = freeze_base(GPT2LMHeadModel(config), tokenizer, "random-gpt2")
    path = "transformer.h.0.attn.c_attn"
    spec = ModuleSpec(d_in=16, d_out=48, rank=4, split=4, use_mixer=True, scaling=0.5)
    bundle = fill(AdapterConfig(task="generate", method="sera", base=base.info, modules={path: spec}))
    weight = base.model.get_submodule(path).get_parameter("weight")
    before = weight.double()
    merge_adapter(base, bundle)
    assert torch.allclose(weight.double() - before, by_definition(bundle, path), atol=1e-6)


def test_merging_into_another_base_changes_nothing(base: FrozenBase) -> None:
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    with pytest.raises(InvalidBundle) as refusal:
        merge_adapter(base, make_bundle())
    assert refusal.value.code == "wrong_base"
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.model.state_dict().items())


@PEFT_ON_TRANSFORMERS_5
def test_offsets_become_the_bias_of_lora_b(tmp_path: Path) -> None:
    base = random_decoder()
    path = ATTENTION.format(0, "q_proj")
    modules = {name: ModuleSpec.model_validate(spec) for name, spec in SPECS.items()}
    modules[path] = modules[path].model_copy(update={"has_offset": True})
    bundle = fill(AdapterConfig(task="generate", method="sera", base=base.info, modules=modules), seed=3)
    export_peft(bundle, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_bias"] is True
    layer = base.model.get_submodule(path)
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = layer.double()(x) + x @ by_definition(bundle, path) + bundle.tensors[f"{path}.offset"].double()
    # PEFT warns that a layer without a bias cannot be merged.
    with quiet():
        loaded = PeftModel.from_pretrained(random_decoder().model, str(tmp_path)).double()
    found = loaded.get_submodule(f"base_model.model.{path}")(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("vector", "changes"), [("gain", {}), ("offset", {"scaling": 0.0})])
def test_a_gain_or_an_offset_alone_has_no_peft_form(
    vector: str, changes: dict[str, float], base: FrozenBase, tmp_path: Path
) -> None:
    bundle = mixed_bundle(base)
    path = ATTENTION.format(0, "q_proj")
    spec = bundle.config.modules[path].model_copy(update={f"has_{vector}": True, **changes})
    config = AdapterConfig(task="generate", method="sera", base=base.info, modules=bundle.config.modules | {path: spec})
    with pytest.raises(InvalidBundle) as refusal:
        export_peft(fill(config), tmp_path / "x")
    assert (refusal.value.code, refusal.value.param) == ("no_peft_form", f"{path}.{vector}")
