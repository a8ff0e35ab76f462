"""Patterns of ranks and alphas name paths in the model that PEFT adapted. PEFT's own scalings are the judge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from adapters_store.convert.peft_keys import match_layers, sort_keys
from sera_serve.base import FrozenBase, freeze_base, import_base
from support.factories import byte_tokenizer, random_decoder
from support.peft_checkpoints import imported, quiet, save_checkpoint


def bert_classifier() -> tuple[nn.Module, FrozenBase]:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(**shape, vocab_size=259, max_position_embeddings=64))
    return model, freeze_base(model.bert, byte_tokenizer(), "bert", "encoder")


def bare_decoder() -> tuple[nn.Module, FrozenBase]:
    base = random_decoder()
    return base.model.model, base


def whole_decoder() -> tuple[nn.Module, FrozenBase]:
    base = random_decoder()
    return base.model, base


BERT: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (bert_classifier, BERT),
    "bare": (bare_decoder, {"task_type": "FEATURE_EXTRACTION"}),
    "whole": (whole_decoder, {"task_type": "CAUSAL_LM"}),
}
# The model, a pattern, and whether PEFT finds a layer by it.
PATTERNS = [
    ("bert", "^bert.encoder.layer.0.attention.self.query", True),
    ("bert", "bert.encoder.layer.0.attention.self.query", True),
    ("bert", r"bert\.encoder\.layer\.1\..*", True),
    ("bert", "encoder.layer.0.attention.self.query", True),
    ("bert", "^encoder.layer.0.attention.self.query", False),
    ("bare", "^layers.0.self_attn.q_proj", True),
    ("bare", "layers.0.self_attn.q_proj", True),
    ("bare", "^model.layers.0.self_attn.q_proj", False),
    ("whole", "^model.layers.0.self_attn.q_proj", True),
    ("whole", "model.layers.0.self_attn.q_proj", True),
    ("whole", "^layers.0.self_attn.q_proj", False),
]


@pytest.mark.parametrize(("kind", "pattern", "is_found"), PATTERNS)
def test_scalings_and_ranks_are_peft_s(kind: str, pattern: str, is_found: bool, tmp_path: Path) -> None:
    make, fields = MODELS[kind]
    model, base = make()
    save_checkpoint(model, tmp_path, lora_alpha=8, alpha_pattern={pattern: 64}, rank_pattern={pattern: 2}, **fields)
    with quiet():
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path))
    theirs = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in adapted.named_modules()
        if isinstance(getattr(layer, "scaling", None), dict)
    }
    result = imported(tmp_path, base)
    ours = {path: spec.scaling for path, spec in result.bundle.config.modules.items()}
    assert sorted(ours.values()) == sorted(theirs.values())
    assert all(theirs.get(path, theirs.get(f"bert.{path}", theirs.get(path[6:]))) == ours[path] for path in ours)
    assert (len(set(ours.values())) == 2) is is_found
    # A rank that the patterns do not explain would be told.
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("base_model.model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"),
        (
            "base_model.model._orig_mod.model.layers.0.self_attn.q_proj",
            "_orig_mod.model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_only_peft_s_own_prefix_is_left_out_of_the_path(name: str, path: str) -> None:
    found = sort_keys([f"{name}.lora_A.weight", f"{name}.lora_B.weight"]).layers
    (keys,) = match_layers(found, import_base(random_decoder())).values()
    assert keys.path == path
