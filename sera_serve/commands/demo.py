"""Trains three demo tenants from `demo_data/`: `python -m sera_serve.commands.demo --store DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from adapters_store import AdapterNotFound, AdapterStore, BaseInfo, StoreError
from sera_serve.base import load_base
from sera_serve.errors import SeraServeError
from sera_serve.terminal import PlainConsole, fail

DATA = Path(__file__).parents[1] / "demo_data"

# Options of each tenant's training run, by adapter id. Other options have the trainer's defaults.
DEMOS: dict[str, dict[str, Any]] = {
    "demo/tickets": {
        "task": "classify",
        "train": DATA / "tickets_train.csv",
        "eval": DATA / "tickets_eval.csv",
        "text_column": "text",
        "label_column": "label",
        "pooling": "mean",
        "rank": 16,
        "dropout": 0.2,
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "description": "Which desk a support ticket goes to.",
    },
    "demo/pirate": {
        "task": "generate",
        "train": DATA / "pirate_train.jsonl",
        "eval": DATA / "pirate_eval.jsonl",
        "prompt_column": "prompt",
        "completion_column": "completion",
        "rank": 64,
        "dropout": 0.1,
        "epochs": 5,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "description": "Goes on with a story as a pirate would.",
    },
    "demo/chat": {
        "task": "generate",
        "train": DATA / "chat_train.jsonl",
        "eval": DATA / "chat_eval.jsonl",
        "prompt_column": "prompt",
        "completion_column": "completion",
        "chat_template": DATA / "chat_template.jinja",
        "rank": 64,
        "dropout": 0.1,
        "epochs": 5,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "description": "A kind friend that answers a child.",
    },
}

# An example prompt or input for each. It is in neither the training rows nor the evaluation rows.
EXAMPLES = {
    "demo/tickets": "My parcel is late.",
    "demo/pirate": "The little cat found a map.",
    "demo/chat": "I lost my red ball.",
}


def train_demos(store_path: Path, base: str, console: Console) -> list[str]:
    """Train the demo tenants that are missing from the store.

    Args:
        store_path: The store; created if absent.
        base: The base model to train on.
        console: Shows the progress.

    Returns:
        Ids of the adapters that were trained now.
    """
    store = AdapterStore(store_path)
    disable_progress_bar()
    frozen = load_base(base)
    missing = [name for name in DEMOS if not _is_there(store, name, frozen.info)]
    if not missing:
        console.print(f"the demo tenants are in {store_path}: {', '.join(DEMOS)}", highlight=False)
        return []
    # The import is slow, and only training needs it.
    from sera_serve.trainer.run import train_adapter
    from sera_serve.trainer.settings import TrainSettings

    for name in missing:
        console.print(f"training demo tenant {name} on base {base}", highlight=False)
        settings = TrainSettings(base=base, store=store_path, name=name, **DEMOS[name])
        result = train_adapter(settings, base=frozen, console=console)
        metrics = ", ".join(f"{metric} {value:.3f}" for metric, value in result.metrics.items())
        console.print(
            f"published {name} version {result.version}: {result.parameters:,} parameters, {metrics}, "
            f"{result.train_seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    return missing


def _is_there(store: AdapterStore, name: str, base: BaseInfo) -> bool:
    """Tell whether the store has the tenant, made for this base."""
    try:
        made_for = store.resolve(name).base
    except AdapterNotFound:
        return False
    return made_for.weights_digest == base.weights_digest and made_for.config_digest == base.config_digest


def _command(
    store: Annotated[Path, typer.Option(help="Folder of the adapter store; created if absent.")],
    base: Annotated[str, typer.Option(help='"embedded", a folder, or a hub id.')] = "embedded",
) -> None:
    """Train the three demo tenants unless the store has them."""
    # Small matrices gain nothing from a second thread, and lose much on a busy machine.
    torch.set_num_threads(1)
    try:
        train_demos(store, base, PlainConsole())
    except (SeraServeError, StoreError) as error:
        fail("sera_serve.commands.demo", error.message, 1)


if __name__ == "__main__":
    typer.run(_command)
