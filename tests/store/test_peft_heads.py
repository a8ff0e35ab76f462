"""Classifiers from PEFT: the head in the bundle gives the logits that PEFT's own model gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from adapters_store import AdapterBundle, InvalidBundle, import_peft
from adapters_store.errors import WrongShape
from sera_serve.base import FrozenBase, freeze_base, import_base
from support.factories import byte_tokenizer
from support.peft_checkpoints import (
    CONFIG,
    WEIGHTS,
    bundle_states,
    edit_config,
    edit_tensors,
    imported,
    peft_states,
    read,
    save_checkpoint,
)

TOKENS = torch.arange(5, 45).view(2, 20)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
LABELS = 3
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu}


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def classifier(kind: str) -> tuple[PreTrainedModel, FrozenBase]:
    """A model for sequence classification, and its backbone as a base."""
    vocabulary = {"vocab_size": 259, "max_position_embeddings": 64, "num_labels": LABELS}
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(**SMALL, **vocabulary, pad_token_id=258))
        generator = LlamaForCausalLM(model.config)
        randomised(model)
        generator.model.load_state_dict(model.model.state_dict())
        return model, freeze_base(generator, byte_tokenizer(), "llama")
    if kind == "distilbert":
        config = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, **vocabulary)
        model = DistilBertForSequenceClassification(config)
    elif kind == "roberta":
        model = RobertaForSequenceClassification(RobertaConfig(**SMALL, **vocabulary, pad_token_id=1))
    elif kind == "electra":
        model = ElectraForSequenceClassification(ElectraConfig(**SMALL, embedding_size=32, **vocabulary))
    else:
        model = BertForSequenceClassification(BertConfig(**SMALL, **vocabulary))
    randomised(model)
    return model, freeze_base(model.base_model, byte_tokenizer(), kind, "encoder")


ROWS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "score of a decoder": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["score"]}, None),
    "BERT's pooler is the first layer": ("bert", {"target_modules": ["query", "value"]}, "tanh"),
    "a LoRA on BERT's pooler too": ("bert", {"target_modules": ["query", "dense"]}, "tanh"),
    "DoRA on BERT's pooler too": ("bert", {"target_modules": ["dense"], "use_dora": True}, "tanh"),
    "a bias of the LoRA on BERT's pooler": ("bert", {"target_modules": ["dense"], "lora_bias": True}, "tanh"),
    "another pooler than BERT's": ("bert", {"target_modules": ["query"], "modules_to_save": ["pooler"]}, "tanh"),
    "RoBERTa's dense + out_proj": ("roberta", {"target_modules": ["query", "value"]}, "tanh"),
    "ELECTRA's dense + out_proj": ("electra", {"target_modules": ["query", "value"]}, "gelu"),
    "DistilBERT's pre_classifier + classifier": (
        "distilbert",
        {"target_modules": ["q_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
        "relu",
    ),
}


def head_logits(bundle: AdapterBundle, states: Tensor) -> Tensor:
    """The logits of pooled states (rows, hidden), in float64, as FORMAT.md defines them."""
    tensors = {name: tensor.double() for name, tensor in bundle.tensors.items()}
    if bundle.config.head is not None:
        dense = states @ tensors["head.dense.weight"].T + tensors["head.dense.bias"]
        states = ACTIVATIONS[bundle.config.head.activation](dense)
    return states @ tensors["head.weight"].T + tensors["head.bias"]


def pooled(model: nn.Module, pooling: str | None) -> Tensor:
    backbone = model.model if hasattr(model, "lm_head") else model
    states: Tensor = backbone(input_ids=TOKENS).last_hidden_state
    return states[:, 0] if pooling == "cls" else states[:, -1]


@pytest.mark.parametrize("row", ROWS)
def test_the_head_and_the_layers_give_peft_s_logits(row: str, tmp_path: Path) -> None:
    kind, fields, activation = ROWS[row]
    model, base = classifier(kind)
    save_checkpoint(model, tmp_path, task_type="SEQ_CLS", **fields)
    told: list[int] = []
    bundle = import_peft(read(tmp_path), import_base(base), told.append).bundle
    config = bundle.config
    # The rest are vectors. What was merged into a head is no factor of the bundle.
    assert 0.8 * config.parameters < told[0] < config.parameters
    assert config.task == "classify"
    assert config.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert config.pooling == ("last_token" if kind == "llama" else "cls")
    assert (None if config.head is None else config.head.activation) == activation
    expected = peft_states(model, tmp_path, lambda adapted: adapted(input_ids=TOKENS).logits)
    with torch.no_grad():
        plain = model(input_ids=TOKENS).logits
    found = head_logits(bundle, bundle_states(base.model, bundle, lambda m: pooled(m, config.pooling)))
    assert (expected - plain).abs().max() > 0.05 * expected.abs().max()
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_labels_come_from_id2label(tmp_path: Path) -> None:
    model, base = classifier("roberta")
    save_checkpoint(model, tmp_path, task_type="SEQ_CLS", target_modules=["query"])
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "x", "1": "y", "2": "z"}}))
    # A tokenizer beside may have one. A classifier has no chat.
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    config = imported(tmp_path, base).bundle.config
    assert (config.labels, config.chat_template) == (["x", "y", "z"], None)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "x", "1": "y", "3": "z"}}))
    with pytest.raises(InvalidBundle, match="its keys must be 0 to 2") as wrong:
        imported(tmp_path, base)
    assert wrong.value.param == "config.json.id2label"
    edit_config(tmp_path, id2label={"0": "no", "1": "maybe", "2": "yes"})
    assert imported(tmp_path, base).bundle.config.labels == ["no", "maybe", "yes"]
    for labels in {"0": "no", "1": "yes"}, {"0": "no", "1": "yes", "2": "no"}:
        edit_config(tmp_path, id2label=labels)
        with pytest.raises(InvalidBundle, match="has 2 different labels, the head has 3 rows"):
            imported(tmp_path, base)


def test_a_regression_is_refused_with_what_trains_one(tmp_path: Path) -> None:
    model, base = classifier("roberta")
    save_checkpoint(model, tmp_path, task_type="SEQ_CLS", target_modules=["query"])
    edit_tensors(tmp_path, lambda tensors: {n: t[:1] if "out_proj" in n else t for n, t in tensors.items()})
    with pytest.raises(InvalidBundle, match="train_adapter --task regress"):
        imported(tmp_path, base)


def test_heads_that_are_not_whole(tmp_path: Path) -> None:
    model, base = classifier("distilbert")
    save_checkpoint(model, tmp_path / "distilbert", task_type="SEQ_CLS", target_modules=["q_lin"])
    # PEFT takes the layer before the projection along only because its name ends alike.
    edit_tensors(tmp_path / "distilbert", lambda t: {n: x for n, x in t.items() if "pre_classifier" not in n})
    with pytest.raises(InvalidBundle, match="pre_classifier") as refusal:
        imported(tmp_path / "distilbert", base)
    assert refusal.value.code == "missing_tensor"
    model, base = classifier("roberta")
    folder = save_checkpoint(model, tmp_path / "roberta", task_type="SEQ_CLS", target_modules=["query"])
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if "classifier" not in n})
    with pytest.raises(InvalidBundle, match="no classifier") as refusal:
        imported(folder, base)
    assert refusal.value.param == "adapter_config.modules_to_save"
    edit_config(folder, task_type=None)
    with pytest.raises(InvalidBundle, match="is an encoder"):
        imported(folder, base)
    edit_tensors(whole, lambda t: t | {"base_model.model.classifier.extra.weight": torch.ones(2)})
    with pytest.raises(InvalidBundle, match=r"classifier\.extra\.weight"):
        imported(whole, base)
    for part, shape in ("bias", (3, 1)), ("weight", (3, 31)), ("weight", (3,)):
        name = f"base_model.model.classifier.out_proj.{part}"
        edit_tensors(whole, lambda t, name=name, shape=shape: t | {name: torch.ones(shape)})  # type: ignore[misc]
        with pytest.raises(WrongShape) as refusal:
            imported(whole, base)
        assert refusal.value.param == name


def test_a_base_without_its_pooler_is_refused(tmp_path: Path) -> None:
    model, base = classifier("bert")
    save_checkpoint(model, tmp_path, task_type="SEQ_CLS", target_modules=["query"])
    base.model.get_submodule("pooler.dense").weight.data.zero_()
    without = freeze_base(BertModel(model.config, add_pooling_layer=False), byte_tokenizer(), "bert", "encoder")
    for found in base, without:
        with pytest.raises(InvalidBundle, match="pooler") as refusal:
            imported(tmp_path, found)
        assert refusal.value.param == "base"


@pytest.fixture(scope="module")
def roberta_base() -> FrozenBase:
    """The shapes of roberta-base with few tokens, and no values: they are not read."""
    config = RobertaConfig(vocab_size=64, max_position_embeddings=66, pad_token_id=1)
    return freeze_base(RobertaModel(config, add_pooling_layer=False), byte_tokenizer(), "roberta-base", "encoder")


@pytest.mark.parametrize("name", ["roberta_base_r8", "loralib_roberta_base_mnli"])
def test_public_checkpoints_of_an_encoder(
    name: str, roberta_base: FrozenBase, shared_data: Path, tmp_path: Path
) -> None:
    checkpoint = shared_data / "peft_checkpoints" / name
    folder = Path(shutil.copytree(checkpoint, tmp_path / name, copy_function=shutil.copyfile))
    source = next(folder.glob("*.safetensors"))
    tensors = safetensors.torch.load_file(source)
    if not (folder / CONFIG).exists():
        # loralib has no configuration; its paper gives rank and alpha.
        folder.chmod(0o755)
        source.rename(folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    bundle = imported(folder, roberta_base).bundle
    assert len(bundle.config.modules) == 24
    assert bundle.config.head is not None
    prefix = "base_model.model." if name.startswith("roberta") else ""
    suffix = ".weight" if prefix else ""
    generator = torch.Generator().manual_seed(0)
    for path, spec in bundle.config.modules.items():
        a, b = (tensors[f"{prefix}roberta.{path}.lora_{part}{suffix}"].double() for part in "AB")
        x = torch.randn(3, spec.d_in, generator=generator, dtype=torch.float64)
        found = spec.scaling * (
            x @ bundle.tensors[f"{path}.sera_a"].double() @ bundle.tensors[f"{path}.sera_b"].double()
        )
        assert torch.allclose(found, 2.0 * (x @ a.T) @ b.T, rtol=1e-12, atol=1e-14)
    states = torch.randn(4, 768, generator=generator, dtype=torch.float64)
    head = {part: tensors[f"{prefix}classifier.{part}"].double() for part in HEAD}
    hidden = torch.tanh(states @ head["dense.weight"].T + head["dense.bias"])
    assert torch.allclose(head_logits(bundle, states), hidden @ head["out_proj.weight"].T + head["out_proj.bias"])


HEAD = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
