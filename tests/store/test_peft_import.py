"""PEFT checkpoints that are carried over exactly: PEFT's own forward pass is the judge. The ids name the variants."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from adapters_store import AdapterBundle, BundleLimits, InvalidBundle, import_peft, peft_from_bytes
from sera_serve.base import FrozenBase, freeze_base, import_base, load_base
from sera_serve.residency.import_probe import import_checkpoint
from support.factories import random_decoder
from support.peft_checkpoints import (
    CONFIG,
    WEIGHTS,
    bundle_states,
    edit_config,
    edit_tensors,
    imported,
    logits,
    peft_states,
    quiet,
    read,
    save_checkpoint,
)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(shared_data: Path) -> FrozenBase:
    return load_base(str(shared_data / "weights" / "stories260K"))


@pytest.fixture(scope="module")
def biased() -> FrozenBase:
    """A decoder whose linear layers have biases, and some of whose layers are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=259, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn_like(parameter)
    return freeze_base(model, random_decoder().tokenizer, "random-gpt2")


def check_parity(base: FrozenBase, folder: Path, change: float = 0.05) -> AdapterBundle:
    """The bundle gives what PEFT gives, which differs from the base alone by at least `change` of the logits."""
    result = import_checkpoint(read(folder), import_base(base), base.dtype)
    bundle = result.bundle
    expected = peft_states(base.model, folder, logits)
    with torch.no_grad():
        plain = logits(base.model)
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > change * scale
    found = bundle_states(base.model, bundle, logits)
    # Gains are float32; the rest is the same arithmetic in another order.
    assert (found - expected).abs().max() < 1e-4 * change * scale
    record = bundle.config.training["import"]
    assert isinstance(record, dict)
    assert record["from"] == "peft"
    assert 0 <= record["largest_error"] < 1e-5
    return bundle


EXACT: dict[str, dict[str, Any]] = {
    "target_modules as a list": {"target_modules": ["q_proj", "down_proj"]},
    "target_modules as a regex": {"target_modules": r".*layers\.[01]\.self_attn\.(q|v)_proj"},
    "target_modules all-linear": {"target_modules": "all-linear"},
    "exclude_modules": {"target_modules": ALL, "exclude_modules": ["k_proj", "up_proj"]},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    "lora_dropout": {"lora_dropout": 0.5},
    "rank_pattern": {"target_modules": ALL, "rank_pattern": {"q_proj": 7, r"layers\.2\.mlp\.up_proj": 2}},
    "alpha_pattern by key": {"target_modules": ALL, "alpha_pattern": {"q_proj": 16, "self_attn.v_proj": 1}},
    "alpha_pattern by regex": {
        "target_modules": ALL,
        "alpha_pattern": {r"^model\.layers\.[0-2]\..*q_proj": 16, r"layers\.\d\.mlp\.(up|down)_proj": 0.5},
        "rank_pattern": {"q_proj": 3},
    },
    "use_rslora": {"use_rslora": True, "r": 6},
    "use_rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 2}},
    "gaussian initialisation": {"init_lora_weights": "gaussian"},
    "orthogonal initialisation": {"init_lora_weights": "orthogonal"},
    "use_dora": {"use_dora": True, "target_modules": ALL},
    "use_dora with use_rslora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "use_bdlora": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2
        ),
    },
}


@pytest.mark.parametrize("row", EXACT)
def test_exact(row: str, base: FrozenBase, tmp_path: Path) -> None:
    bundle = check_parity(base, save_checkpoint(base.model, tmp_path, **EXACT[row]))
    assert bundle.config.method == "lora"
    assert bundle.config.task == "generate"


GPT2 = {
    "fan_in_fan_out, Conv1D": {},
    "lora_bias on layers with a bias": {"lora_bias": True},
    "use_dora on Conv1D with a bias": {"use_dora": True},
}


@pytest.mark.parametrize("row", GPT2)
def test_exact_on_conv1d(row: str, biased: FrozenBase, tmp_path: Path) -> None:
    fields = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} | GPT2[row]
    check_parity(biased, save_checkpoint(biased.model, tmp_path, **fields))


def test_the_vectors_of_a_layer_are_those_it_needs(base: FrozenBase, biased: FrozenBase, tmp_path: Path) -> None:
    def vectors(base: FrozenBase, name: str, **fields: Any) -> set[tuple[bool, bool]]:
        bundle = imported(save_checkpoint(base.model, tmp_path / name, **fields), base).bundle
        return {(spec.has_gain, spec.has_offset) for spec in bundle.config.modules.values()}

    assert vectors(base, "plain") == {(False, False)}
    assert vectors(base, "dora", use_dora=True) == {(True, False)}
    assert vectors(base, "bias", lora_bias=True) == {(False, True)}
    assert vectors(biased, "both", target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True) == {(True, True)}


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_converted_initialisations_are_plain_loras(method: str, base: FrozenBase, tmp_path: Path) -> None:
    """PEFT writes the difference of two states: init_lora_weights true, and twice the rank."""
    with quiet():
        model = get_peft_model(
            copy.deepcopy(base.model), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=method)
        )
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(tmp_path / "initial"))
        model.peft_config["default"].init_lora_weights = method
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    folder = tmp_path / "converted"
    assert json.loads((folder / CONFIG).read_text())["init_lora_weights"] is True
    bundle = check_parity(base, folder)
    assert {spec.rank for spec in bundle.config.modules.values()} == {8}


@pytest.mark.parametrize("name", ["eva", "mica", "false", "null"])
def test_initialisations_that_leave_the_base_alone(name: str, base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path)
    before = imported(folder, base).bundle
    if name in ("false", "null"):
        edit_config(folder, init_lora_weights=json.loads(name))
    else:
        edit_config(folder, init_lora_weights=name, eva_config={"rho": 2.0} if name == "eva" else None)
    assert imported(folder, base).bundle.digest == before.digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype, base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path, dtype=dtype)
    bundle = check_parity(base, folder)
    assert {tensor.dtype for tensor in bundle.tensors.values()} == {dtype}
    record = bundle.config.training["import"]
    assert isinstance(record, dict)
    assert record["dtypes"] == [{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]]


def test_bytes_that_must_not_be_written_to_are_copied(base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path)
    data = memoryview((folder / WEIGHTS).read_bytes())
    files = peft_from_bytes(data, BundleLimits(), (folder / CONFIG).read_bytes())
    assert files is not None
    # torch warns of tensors on memory that is not to be written to, and a warning is an error here.
    assert import_peft(files, import_base(base)).bundle.digest == imported(folder, base).bundle.digest


def test_the_largest_error_of_a_coarser_base_is_recorded(base: FrozenBase, tmp_path: Path) -> None:
    files = read(save_checkpoint(base.model, tmp_path))
    errors = {
        dtype: import_checkpoint(files, import_base(base), dtype).largest_error
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert errors[torch.float32] < 1e-5
    assert 1e-4 < errors[torch.bfloat16] < 0.1


def test_the_rank_is_that_of_the_tensors(base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path)
    edit_config(folder, r=8, rank_pattern={"q_proj": 4})
    result = imported(folder, base)
    assert {(spec.rank, spec.scaling) for spec in result.bundle.config.modules.values()} == {(4, 1.5)}
    assert result.warnings[0].startswith("5 layers, such as model.layers.0.self_attn.v_proj, have another rank")


def test_a_row_of_no_length_has_no_direction(base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path, target_modules=["q_proj"], use_dora=True)
    whole = import_base(base)
    no_weight = replace(whole, weight=lambda path: torch.zeros_like(whole.weight(path)))
    edit_tensors(folder, lambda tensors: {n: t * ("lora_B" not in n) for n, t in tensors.items()})
    with pytest.raises(InvalidBundle, match="has the length 0, and DoRA divides by it"):
        import_peft(read(folder), no_weight)


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


KEYS = {
    "plain PEFT": lambda name: name,
    "without base_model.model": lambda name: name.removeprefix("base_model.model."),
    "twice base_model.model": lambda name: f"base_model.model.{name}",
    "of the backbone alone": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "language_model": lambda name: name.replace("model.model.layers", "model.language_model.layers"),
    "adapter's name .default.": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".my-adapter.weight"),
    "loralib": lambda name: name.removeprefix("base_model.model.").removesuffix(".weight"),
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
}


@pytest.mark.parametrize("row", KEYS)
def test_key_prefixes(row: str, base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path)
    before = imported(folder, base).bundle
    edit_tensors(folder, renamed(KEYS[row]))
    after = imported(folder, base).bundle
    assert set(after.tensors) == set(before.tensors)
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in before.tensors)


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        (None, False),
        ("stories260K", False),
        ("someone/Stories260k", False),
        ("/home/me/models/other", True),
        ("someone/stories260K-bnb-4bit", True),
    ],
    ids=["null", "the same", "a hub id of the same", "a local path", "a quantised copy"],
)
def test_base_model_name_or_path(name: str | None, warned: bool, base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path)
    edit_config(folder, base_model_name_or_path=name)
    warnings = imported(folder, base).warnings
    assert bool(warnings) == warned
    if warned:
        assert str(name) in warnings[0]
        assert "stories260K" in warnings[0]


def test_a_subfolder_and_files_beside(base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path / "plain")
    before = imported(folder, base)
    inner = tmp_path / "outer" / "my_adapter"
    shutil.copytree(folder, inner)
    (tmp_path / "outer" / "README.md").write_text("# hello")
    for name in ("tokenizer.json", "training_args.bin", "optimizer.pt", "notes.txt", "value_head.bin"):
        (inner / name).write_bytes(b"whatever")
    (inner / "added_tokens.json").write_text(json.dumps({"<pad>": 511}))
    after = imported(tmp_path / "outer", base)
    assert {n: t.tolist() for n, t in after.bundle.tensors.items()} == {
        n: t.tolist() for n, t in before.bundle.tensors.items()
    }
    assert after.warnings == ("files that nothing reads: notes.txt, value_head.bin",)


def test_labels_of_the_base_do_not_matter_without_a_head(base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path)
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": None}}))
    assert imported(folder, base).bundle.config.task == "generate"


def test_a_chat_template_beside_goes_along(base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert imported(folder, base).bundle.config.chat_template == "{{ messages }}"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": name, "template": f"{{{{ {name} }}}}"} for name in ("rag", "default")]
    for said, taken in ("{{ x }}", "{{ x }}"), (named, "{{ default }}"), (named[:1], None), ("", None):
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
        assert imported(folder, base).bundle.config.chat_template == taken


def test_a_public_checkpoint_of_a_decoder(shared_data: Path) -> None:
    """facebook/opt-125m of random weights: its own are not here."""
    torch.manual_seed(0)
    # The widths and names of opt-125m; fewer tokens and positions.
    config = OPTConfig(vocab_size=64, max_position_embeddings=64)
    base = freeze_base(OPTForCausalLM(config), random_decoder().tokenizer, "opt-125m")
    folder = shared_data / "peft_checkpoints" / "opt125m_causal_r16"
    bundle = check_parity(base, folder, change=1e-3)
    assert len(bundle.config.modules) == 24
    assert {(spec.rank, spec.scaling) for spec in bundle.config.modules.values()} == {(16, 2.0)}


def test_an_untrained_adapter_changes_nothing(base: FrozenBase, tmp_path: Path) -> None:
    folder = save_checkpoint(base.model, tmp_path)
    edit_tensors(folder, lambda tensors: {n: t * ("lora_A" in n) for n, t in tensors.items()})
    assert import_checkpoint(read(folder), import_base(base), base.dtype).largest_error == 0


def test_the_weights_lie_in_a_file_that_peft_wrote(base: FrozenBase, tmp_path: Path) -> None:
    # The other tests edit such files; this one shows what is edited.
    folder = save_checkpoint(base.model, tmp_path)
    assert (folder / WEIGHTS).is_file()
    assert isinstance(base.model, nn.Module)
