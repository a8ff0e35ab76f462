"""Checkpoints of a training run, and the folder that holds them.

A checkpoint is a folder `checkpoint-STEP` with `tensors.safetensors` (adapter, head, optimiser moments, rank
allocation, scale of the loss, generator states), `extra.json` (optimiser groups, schedule, Python's and numpy's
generators) and transformers' `trainer_state.json`. It has no pickle. It is written under another name, synced, and
renamed, so a kill at any moment leaves complete checkpoints only. A checkpoint that was damaged later is recognised and
skipped.

The folder of a run is named by the settings, data and base that decide the result. One process at a time uses it, and
it is deleted when the adapter is published.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState

from adapters_store.backends.durable import put_text, sync, try_file_lock
from sera_serve.errors import SeraServeError

STATE_FILE = "trainer_state.json"
_TENSORS, _EXTRA, _PARTIAL, _LOCK = "tensors.safetensors", "extra.json", "partial-checkpoint", "lock"
_NESTED = "/"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointNotWritten(SeraServeError):
    """The disk took no checkpoint. The run stopped; its earlier checkpoints are whole."""

    code = "checkpoint_not_written"
    status = 507


class RunInProgress(SeraServeError):
    """Another process is training the same adapter from the same data."""

    code = "run_in_progress"
    status = 409


def save_checkpoint(
    run_dir: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    optimiser: Any,
    schedule: Any,
    state: Any,
) -> Path:
    """Write `checkpoint-STEP`. It is complete and durable when this returns.

    Args:
        run_dir: Folder of the run.
        step: Optimiser steps done.
        parts: The adapter's tensors by name, as `adapter`; and those of what else has a state, by the part's name.
        optimiser: Torch optimiser.
        schedule: Torch learning-rate scheduler.
        state: transformers' `TrainerState`.

    Raises:
        CheckpointNotWritten: The disk is full, or refuses the files otherwise. What was written of it is deleted.
    """
    with _told(run_dir, step):
        partial, final = run_dir / _PARTIAL, run_dir / f"checkpoint-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        optimiser_state = optimiser.state_dict()
        tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        for index, moments in optimiser_state["state"].items():
            tensors.update({f"optimiser.{index}.{key}": tensor for key, tensor in _flat(moments)})
        tensors["generator.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["generator.cuda"] = torch.cuda.get_rng_state()
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, partial / _TENSORS)
        algorithm, keys, *rest = np.random.get_state()
        extra = {
            "groups": optimiser_state["param_groups"],
            "schedule": schedule.state_dict(),
            "python": random.getstate(),
            "numpy": [algorithm, np.asarray(keys).tolist(), *rest],
        }
        (partial / _EXTRA).write_text(json.dumps(extra))
        state.save_to_json(str(partial / STATE_FILE))
        for path in partial.iterdir():
            sync(str(path))
        sync(str(partial))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(str(run_dir))
        return final


@contextmanager
def _told(run_dir: Path, step: int) -> Iterator[None]:
    """Say what to do where the block cannot write a checkpoint, and delete what it wrote."""
    try:
        yield
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        shutil.rmtree(run_dir / _PARTIAL, ignore_errors=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        last = next(reversed(_checkpoints(run_dir)), None)
        remedy = "and start the same command again, or give --work-dir, a folder on another disk"
        if last is not None:
            remedy = f"and the same command goes on from {last.name}; with --work-dir on another disk it begins anew"
        raise CheckpointNotWritten(
            f"checkpoint-{step} cannot be written to {run_dir} ({reason}); free space there {remedy}", param="work_dir"
        ) from error


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The values of an optimiser's state. bitsandbytes has numbers and a mapping among the tensors."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}{_NESTED}")
        else:
            yield prefix + key, torch.as_tensor(value)


def copy_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved values into the tensors of the same names; raise ValueError if names or shapes differ."""
    if _shapes(own) != _shapes(saved):
        raise ValueError("the tensors belong to another adapter")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def load_part(checkpoint: Path, part: str = "adapter") -> dict[str, Tensor]:
    """Load the tensors of a part of a checkpoint, on the CPU; empty if it has no such part."""
    tensors = load_file(checkpoint / _TENSORS)
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def read_state(checkpoint: Path) -> TrainerState:
    """Read the trainer's state of a checkpoint: its step, its best step, and the history of losses and metrics."""
    return TrainerState.load_from_json(str(checkpoint / STATE_FILE))


def load_optimiser(checkpoint: Path, optimiser: Any, schedule: Any) -> None:
    """Restore the optimiser's moments and the schedule."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(checkpoint / _TENSORS).items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            *outer, last = key.split(_NESTED)
            inner = state.setdefault(int(index), {})
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[last] = tensor if tensor.dtype != torch.int64 else int(tensor)
    extra = _read_json(checkpoint / _EXTRA)
    optimiser.load_state_dict({"state": state, "param_groups": extra["groups"]})
    schedule.load_state_dict(extra["schedule"])


def load_generators(checkpoint: Path) -> None:
    """Restore the state of every random generator that training uses."""
    extra, tensors = _read_json(checkpoint / _EXTRA), load_file(checkpoint / _TENSORS)
    version, internal, gauss = extra["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, *rest = extra["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["generator.cpu"])
    if "generator.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["generator.cuda"])


def last_checkpoint(
    run_dir: Path, expected: Mapping[str, Tensor], tell: Callable[[str], None] = lambda text: None
) -> Path | None:
    """Find the newest usable checkpoint, or None. Partial and damaged checkpoints are deleted.

    Args:
        run_dir: Folder of the run. It may be absent.
        expected: The adapter's tensors. A usable checkpoint has the same names and shapes.
        tell: Called with a line for each damaged checkpoint.

    Raises:
        OSError: The state of a checkpoint with another path of the run's folder cannot be written again.
    """
    shutil.rmtree(run_dir / _PARTIAL, ignore_errors=True)
    for checkpoint in reversed(_checkpoints(run_dir)):
        if (fault := _fault(checkpoint, expected)) is None:
            _bring_here(checkpoint)
            return checkpoint
        tell(f"{checkpoint} is deleted, because {fault}")
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def delete_others(run_dir: Path, keep: set[Path]) -> None:
    """Delete every checkpoint that is not in `keep`."""
    for checkpoint in _checkpoints(run_dir):
        if checkpoint not in keep:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _checkpoints(run_dir: Path) -> list[Path]:
    found = [(int(m[1]), path) for path in run_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _fault(checkpoint: Path, expected: Mapping[str, Tensor]) -> str | None:
    """Why no run can go on from a checkpoint, or None if it can."""
    try:
        shapes = _shapes(load_part(checkpoint))
        _read_json(checkpoint / _EXTRA)
        best = _best(checkpoint)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read ({error})"
    if shapes != _shapes(expected):
        return "its tensors are those of another adapter"
    if best is None or best == checkpoint:
        return None
    # Without the checkpoint of the best epoch so far, the run would end with another adapter.
    fault = _fault(best, expected)
    return None if fault is None else f"{best.name}, which it needs for its best epoch, cannot be used: {fault}"


def _best(checkpoint: Path) -> Path | None:
    """The checkpoint of the best epoch so far, as a checkpoint's state names it; None if there is none.

    The state has the path of the run's folder when it was written. The folder may have been moved since, or be named
    from another working folder now. So the last name alone counts.
    """
    best: str | None = _read_json(checkpoint / STATE_FILE)["best_model_checkpoint"]
    return checkpoint.parent / Path(best).name if best is not None else None


def _bring_here(checkpoint: Path) -> None:
    """Let a checkpoint's state have the path of the best one as it is now. Trainer forgets a path without a folder.

    A kill leaves the old state or the new one.
    """
    state, best = _read_json(checkpoint / STATE_FILE), _best(checkpoint)
    if best is None or state["best_model_checkpoint"] == str(best):
        return
    text = json.dumps(state | {"best_model_checkpoint": str(best)}, indent=2, sort_keys=True) + "\n"
    put_text(str(checkpoint / STATE_FILE), text, str(checkpoint))


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def run_digest(identity: Mapping[str, Any]) -> str:
    """Compute the name of a run: 16 hexadecimal digits, equal for equal settings, data and base."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def run_folder(runs_dir: Path, digest: str, *, resume: bool, own_parents: int = 0) -> Iterator[Path]:
    """Create and lock the run's folder. If the block ends without an error, delete it.

    Args:
        runs_dir: Folder of the runs.
        digest: See `run_digest`.
        resume: Whether to keep the checkpoints of a killed run.
        own_parents: How many folders above the run's are the trainer's own: they go with it where they are empty. A
            folder that the user has named stays.

    Raises:
        RunInProgress: Another process uses the folder.
    """
    folder = runs_dir / digest
    folder.mkdir(parents=True, exist_ok=True)
    with try_file_lock(str(folder / _LOCK)) as is_ours:
        if not is_ours:
            raise RunInProgress(
                f"another process is training this adapter in {folder}; wait for it, or give --work-dir"
            )
        if not resume:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
        yield folder
        shutil.rmtree(folder)
    # A parent with other runs cannot be removed.
    with suppress(OSError):
        for parent in list(folder.parents)[:own_parents]:
            parent.rmdir()
