"""Export of an adapter as a PEFT LoRA checkpoint of the same update: lora_A = (A C)^T, lora_B = B^T, both dense.

An offset becomes the bias of lora_B (`lora_bias`). A gain is refused: DoRA's magnitude depends on the base's weights.

Layout: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from adapters_store.convert.dense import dense_factors
from adapters_store.convert.peft_files import TEMPLATE_FILE
from adapters_store.errors import InvalidBundle
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.config import AdapterConfig
from adapters_store.format.containers import CONFIG_FILE
from adapters_store.format.safetensors_file import MODEL_FILE, save_tensors

HEAD_FILE = "head.safetensors"


class NoPeftForm(InvalidBundle):
    """A checkpoint of a LoRA cannot hold the adapter: a gain, an offset without an update, or images.

    `param` is the tensor, or the field of the configuration.
    """

    code = "no_peft_form"


class NothingToExport(InvalidBundle):
    """The adapter has no adapted layer, and therefore no LoRA form."""

    code = "nothing_to_export"


def export_peft(bundle: AdapterBundle, directory: Path) -> bool:
    """Write a LoRA checkpoint that `peft.PeftModel.from_pretrained` loads.

    The matrices are float32; products are computed in float64. A chat template stands beside them, where an import
    finds it. The checkpoint has no place for a classifier's head; see `write_head`.

    Args:
        bundle: The adapter.
        directory: Made if missing; files of these names are replaced.

    Returns:
        Whether a head was written too.

    Raises:
        NothingToExport: A head-only adapter.
        NoPeftForm: An adapter with a gain, with an offset and a scaling of 0, or of images.
    """
    if bundle.config.image is not None:
        raise NoPeftForm(
            f"a PEFT checkpoint has no place for the image preprocessing of task {bundle.config.task!r}; use format "
            "'sera' or 'merged'",
            param="adapter_config.image",
        )
    if not bundle.config.modules:
        raise NothingToExport("a head-only adapter has no LoRA form; use format 'sera' or 'merged'", param="format")
    for path, spec in bundle.config.modules.items():
        if spec.has_gain or (spec.has_offset and not spec.scaling):
            vector = "gain" if spec.has_gain else "offset"
            raise NoPeftForm(
                f"layer {path!r} has a vector of {vector}s, which a LoRA cannot hold; use format 'sera' or 'merged'",
                param=f"{path}.{vector}",
            )
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    # PEFT has one switch for all layers.
    has_bias = any(spec.has_offset for spec in bundle.config.modules.values())
    for path in bundle.config.modules:
        dense = dense_factors(bundle, path)
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = (dense.a @ dense.c).T.to(torch.float32).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = dense.b.T.to(torch.float32).contiguous()
        if has_bias:
            offset = bundle.tensors.get(f"{path}.offset", torch.zeros(len(dense.b.T)))
            # PEFT scales this bias with the update. The scaling is 1 or so, and the quotient is rounded once.
            scaling = dense.scaling if offset.any() else 1.0
            tensors[f"{prefix}.lora_B.bias"] = (offset.double() / scaling).to(torch.float32)
    save_tensors(tensors, directory / MODEL_FILE, {"format": "pt"})
    text = json.dumps(peft_config(bundle.config), indent=2, sort_keys=True, ensure_ascii=False)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if bundle.config.chat_template is not None:
        (directory / TEMPLATE_FILE).write_text(bundle.config.chat_template, encoding="utf-8")
    return write_head(bundle, directory)


def write_head(bundle: AdapterBundle, directory: Path) -> bool:
    """Write an adapter's head beside an exported model, into `head.safetensors`; False for an adapter without a head.

    Tensors `weight` (rows, hidden) and `bias` (rows,); metadata `task`, and where the adapter has them `labels`, a JSON
    list, `pooling`, `multi_label` (`true`) and `image`, a JSON object. With a hidden layer also `dense.weight`
    (width, hidden), `dense.bias` (width,), and metadata `activation`: see FORMAT.md.
    """
    config = bundle.config
    if not config.has_head:
        return False
    parts = ("weight", "bias") if config.head is None else ("weight", "bias", "dense.weight", "dense.bias")
    head = {part: bundle.tensors[f"head.{part}"] for part in parts}
    metadata = {"format": "pt", "task": config.task}
    if config.labels is not None:
        metadata["labels"] = json.dumps(config.labels, ensure_ascii=False)
    if config.pooling is not None:
        metadata["pooling"] = config.pooling
    if config.multi_label:
        metadata["multi_label"] = "true"
    if config.image is not None:
        metadata["image"] = config.image.model_dump_json()
    if config.head is not None:
        metadata["activation"] = config.head.activation
    save_tensors(head, directory / HEAD_FILE, metadata)
    return True


def peft_config(config: AdapterConfig) -> dict[str, Any]:
    """PEFT's `LoraConfig` as JSON: the largest rank, its alpha, and patterns for the other layers.

    vLLM reads `r` and `lora_alpha`, and no pattern: it checks `r` against `--max-lora-rank`, and scales every layer by
    `lora_alpha / r`. So `r` is the largest rank, and that quotient is the most frequent scaling.
    """
    ranks = {path: spec.rank for path, spec in config.modules.items()}
    alphas = {path: alpha_for(spec.scaling, spec.rank) for path, spec in config.modules.items()}
    rank = max(ranks.values())
    scaling = Counter(spec.scaling for spec in config.modules.values()).most_common(1)[0][0]
    alpha = alpha_for(scaling, rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.task == "generate" else None,
        "base_model_name_or_path": config.base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(config.modules),
        "rank_pattern": {_exactly(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(path): a for path, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": any(spec.has_offset for spec in config.modules.values()),
    }


def alpha_for(scaling: float, rank: int) -> float:
    """The lora_alpha whose quotient lora_alpha / rank is `scaling`, to the last bit if such a number exists."""
    # The number next to the exact product: no other one has a quotient as near.
    alpha = scaling * rank
    # A whole number is written as an integer, as PEFT's own files have it.
    return int(alpha) if alpha.is_integer() else alpha


def _exactly(path: str) -> str:
    # PEFT reads a pattern's key as a regular expression that may follow any dotted prefix.
    return "^" + re.escape(path)
