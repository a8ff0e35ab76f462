"""One run of a comparison: its settings, or a baseline in their place, and what is measured.

It also runs on transformers 4, on which the library `adapters` depends.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from adapters_store import AdapterBundle, Published, StoreError
from sera_serve.base import FrozenBase
from sera_serve.base.loading import EMBEDDED, EMBEDDED_FOLDER
from sera_serve.errors import SeraServeError
from sera_serve.layers import attached_layers
from sera_serve.trainer.baselines import BaselineShape, install_baseline, same_head
from sera_serve.trainer.data.image_batches import take_rows
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks import TrainingTask

# The rows of the test set that are scored are the same in all runs.
_TEST_SEED = 0
_PEAK, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LIBRARIES = ("torch", "transformers", "peft", "adapters")


def train_one(run: dict[str, Any]) -> dict[str, Any]:
    """Train one run. A run that fails gives a result with `error` instead of `metrics`.

    Args:
        run: `settings`, `baseline`, `test_rows` of a `RunSpec`.
    """
    folder = Path(tempfile.mkdtemp(prefix="compare-"))
    try:
        return _train_in(folder, run)
    except (SeraServeError, StoreError) as error:
        return {"error": error.message}
    except (OSError, torch.OutOfMemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _train_in(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    options = run["settings"] | {"store": folder / "store", "name": "compare/run", "work_dir": folder / "work"}
    # A killed run starts again from nothing, so checkpoints within an epoch have no use.
    settings = TrainSettings.model_validate(options | {"checkpoint_seconds": 1e9})
    settings = settings.model_copy(update={"base": _readable_base(settings.base, folder)})
    shape = BaselineShape(**run["baseline"]) if run["baseline"] is not None else None
    measure = Measure(settings.device)
    probe: float | None = None

    def prepare(task: TrainingTask, settings: TrainSettings) -> list[TrainerCallback]:
        nonlocal probe
        probe = base_probe(task.base)
        if run["test_rows"] is not None:
            task.test_rows = _some_of(task.test_rows, run["test_rows"])
        callbacks = install_baseline(task, settings, shape) if shape is not None else []
        same_head(task.model, settings.seed)
        return callbacks

    def keep(bundle: AdapterBundle, name: str) -> Published:
        return Published(name, 0, "")

    result = train_adapter(settings, callbacks=[measure], publish=keep, prepare=prepare, baseline=shape is not None)
    return {
        "metrics": result.metrics,
        "parameters": result.parameters,
        "head_parameters": result.head_parameters,
        "train_seconds": result.train_seconds,
        # What the run would take alone on one core; the other times depend on what else runs.
        "cpu_seconds": round(time.process_time(), 1),
        "peak_memory_mb": measure.peak_mb,
        "step_ms": measure.step_ms,
        "steps": measure.steps,
        "notes": result.notes,
        "base_probe": probe,
        "versions": _versions(),
    }


@torch.no_grad()
def base_probe(base: FrozenBase) -> float | None:
    """Compute a number that shows whether two environments compute the same base: the size of some hidden states.

    Returns:
        None for a base without texts, or with an adapter whose update is not zero.
    """
    updates = [layer.sera_b for layer in attached_layers(base.model).values()]
    if base.kind not in ("decoder", "encoder") or any(factor.any() for factor in updates):
        return None
    ids = torch.arange(3, 19, device=base.device)[None] % base.model.get_input_embeddings().weight.shape[0]
    return float(base.hidden_states(ids, torch.ones_like(ids)).float().norm())


def _some_of(rows: Any, count: int) -> Any:
    if len(rows) <= count:
        return rows
    generator = torch.Generator().manual_seed(_TEST_SEED)
    drawn = sorted(torch.randperm(len(rows), generator=generator)[:count].tolist())
    return take_rows(rows, drawn)


class Measure(TrainerCallback):  # type: ignore[misc]
    """Measures the steps of a run.

    Attributes:
        peak_mb: Most memory between the first step and the end, in MB: of the process on a CPU, allocated on a GPU.
    """

    def __init__(self, device: str) -> None:
        self.peak_mb = 0.0
        self._on_gpu = device.startswith("cuda")
        self._times: list[float] = []
        self._started = 0.0

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self._times)

    @property
    def step_ms(self) -> float:
        """Median time of a step (forward, backward, optimiser) in milliseconds."""
        return round(1e3 * statistics.median(self._times), 3) if self._times else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the peak of what went before: loading, and reading the rows."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif _RESET_PEAK.exists():
            _RESET_PEAK.write_text("5")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._synchronise()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock of a step."""
        self._synchronise()
        self._times.append(time.perf_counter() - self._started)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the peak."""
        if self._on_gpu:
            self.peak_mb = round(torch.cuda.max_memory_allocated() / 1e6, 1)
            return
        status = _PEAK.read_text().splitlines() if _PEAK.exists() else []
        peaks = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
        kilobytes = peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.peak_mb = round(kilobytes * 1024 / 1e6, 1)

    def _synchronise(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def _readable_base(spec: str, folder: Path) -> str:
    """Return a base that this transformers can read: transformers 4 does not know the tokenizer class of 5."""
    source = EMBEDDED_FOLDER if spec == EMBEDDED else Path(spec)
    if not transformers.__version__.startswith("4.") or not (source / "tokenizer_config.json").is_file():
        return spec
    config = json.loads((source / "tokenizer_config.json").read_text())
    if config.get("tokenizer_class") != "TokenizersBackend":
        return spec
    copy = folder / source.resolve().name
    copy.mkdir()
    for path in source.resolve().iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "tokenizer_config.json").unlink()
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # A list in transformers 5, a mapping in 4. The tokens themselves are in tokenizer.json.
    if isinstance(extra := config.pop("extra_special_tokens", None), list):
        config["additional_special_tokens"] = extra
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return str(copy)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
