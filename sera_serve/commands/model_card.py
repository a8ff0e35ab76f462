"""A model card in Hugging Face's form: `README.md` beside an exported adapter."""

from __future__ import annotations

import re

from huggingface_hub import ModelCard, ModelCardData

from adapters_store import AdapterConfig
from adapters_store.card import run_card
from sera_serve.commands.imports import HUB_ID

# The hub's names of tasks; tasks that the hub has no name for are left out of the card's head.
_PIPELINES = {
    "generate": "text-generation",
    "classify": "text-classification",
    "regress": "text-classification",
    "token-classify": "token-classification",
    "image-classify": "image-classification",
    "retrieve": "zero-shot-image-classification",
}
_LABELS_SHOWN = 50


def model_card(name: str, version: int, digest: str, config: AdapterConfig) -> ModelCard:
    """Make the card of one version out of its configuration alone.

    Args:
        name: tenant/name.
        version: The version.
        digest: Of the bundle.
        config: The configuration, with the training record.
    """
    metrics = config.training.get("metrics")
    data = ModelCardData(
        base_model=config.base.name if HUB_ID.fullmatch(config.base.name) else None,
        library_name="sera-serve",
        pipeline_tag=_PIPELINES.get(config.task),
        tags=["sera-serve", "adapter", config.method],
        metrics=sorted(map(str, metrics)) if isinstance(metrics, dict) else None,
    )
    shapes = sorted({(spec.rank, spec.split) for spec in config.modules.values()})
    facts = {
        "version": f"{version}, sha256 {digest}",
        "task": config.task,
        "method": config.method,
        "rank, split": ", ".join(f"{rank}, {split}" for rank, split in shapes) or "none: a head alone",
        "layers": f"{len(config.modules):,}",
        "parameters": f"{config.parameters:,}",
        "base": f"{config.base.name} ({config.base.architecture}), weights {config.base.weights_digest}",
        "labels": ", ".join((config.labels or [])[:_LABELS_SHOWN]),
    }
    text = "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {name}",
            "",
            "An adapter for one frozen base model, which sera-serve serves beside many others. It is no model of its",
            "own: load it with its base.",
            "",
            "## Facts",
            "",
            *_table(facts),
            "",
            "## Training",
            "",
            *(_table(run_card(config)) or ["The bundle has no training record."]),
            "",
            "## Use",
            "",
            "```sh",
            f"sera-serve adapters import BUNDLE --name {name} --store store",
            f"sera-serve serve --base {_shell(config.base.name)} --store store",
            "```",
            "",
        ]
    )
    return ModelCard(text)


def _table(rows: dict[str, str]) -> list[str]:
    filled = {name: text for name, text in rows.items() if text}
    if not filled:
        return []
    return ["| | |", "| --- | --- |", *(f"| {_cell(name)} | {_cell(text)} |" for name, text in filled.items())]


def _cell(text: str) -> str:
    """A text as a table's cell: what others wrote must make neither a row nor a tag nor a link."""
    line = " ".join(text.split())
    for character, escaped in {"&": "&amp;", "<": "&lt;", "|": "\\|", "[": "\\[", "`": "\\`"}.items():
        line = line.replace(character, escaped)
    return line


def _shell(text: str) -> str:
    """A name for a command line that people copy; what a shell would read otherwise is not written."""
    return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) and text[0] != "-" else "BASE"
