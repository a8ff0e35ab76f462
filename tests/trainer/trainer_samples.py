"""A tiny base with random weights, and small data with a rule to learn."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sera_serve.trainer.settings import TrainSettings

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,:|\n?!"


def save_tiny_base(folder: Path, kind: str = "decoder") -> Path:
    """A character-level base, 32 wide, in Hugging Face format."""
    torch.manual_seed(11)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    end = [("</s>", 2)] if kind == "encoder" else []
    template = "<s> $A </s>" if kind == "encoder" else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), *end])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=64,
    ).save_pretrained(folder)
    if kind == "encoder":
        shape = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        BertModel(shape).save_pretrained(folder)
        return folder
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_csv(path: Path, rows: list[list[str]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


WORDS = ["dog", "cat", "sun", "moon", "tree", "fish", "red", "blue"]


def ending_rule(count: int, seed: int = 0) -> list[list[str]]:
    """Texts labelled by their last word, which a decoder's last state holds already."""
    return _labelled(count, seed, at=-1)


def beginning_rule(count: int, seed: int = 0) -> list[list[str]]:
    """Texts labelled by their first word, which a base has no reason to carry to the last state."""
    return _labelled(count, seed, at=0)


def _labelled(count: int, seed: int, at: int) -> list[list[str]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        text = [draw.choice(WORDS) for _ in range(draw.randint(2, 5))]
        rows.append([" ".join(text), "animal" if text[at] in ("dog", "cat", "fish") else "other"])
    return rows


def settings_for(base: Path, folder: Path, train: Path, **options: Any) -> TrainSettings:
    """Small settings; every run of one `folder` shares a store."""
    defaults: dict[str, Any] = {
        "base": str(base),
        "store": folder / "store",
        "name": "acme/tiny",
        "task": "classify",
        "train": train,
        "batch_size": 8,
        "epochs": 2,
    }
    if options.get("method") != "head-only":
        defaults["rank"] = 4
    return TrainSettings(**(defaults | options))
