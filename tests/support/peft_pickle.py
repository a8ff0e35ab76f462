"""A PEFT checkpoint whose weights are a pickle that runs code when it is read."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any


class _Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._witness,)


def pickled_checkpoint(checkpoint: Path, witness: Path) -> bytes:
    """Replace the weights of a checkpoint by a pickle that makes the file `witness`; return the folder as a zip."""
    (checkpoint / "adapter_model.safetensors").unlink()
    (checkpoint / "adapter_model.bin").write_bytes(pickle.dumps({"weight": _Touches(witness)}))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in checkpoint.iterdir():
            archive.write(path, path.name)
    return buffer.getvalue()
