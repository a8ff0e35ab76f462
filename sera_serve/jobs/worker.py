"""The program of a job's process; `process` starts it.

It reads its orders from the directory, trains, publishes, and leaves its result there. It ends with the server: the
server holds the other end of its stdin.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from adapters_store import AdapterBundle, AdapterStore, BundleLimits, Published
from adapters_store.errors import AdapterNotFound, StoreError, StoreUnavailable, StoreWriteFailed
from sera_serve.access import AccessDatabase, AccessDatabaseError, Holdings, Quotas, Shares
from sera_serve.base import load_base
from sera_serve.errors import BaseNotFound, SeraServeError
from sera_serve.jobs.process import ORDERS, PROGRESS, PUBLISHING, RESULT, read_limits, read_publishing, write_json
from sera_serve.jobs.spec import SHAPE, in_words
from sera_serve.trainer.checkpoint import CheckpointNotWritten
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import load_options

T = TypeVar("T")

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""The template of chats that are trained on a base without one. The adapter keeps it."""
_NICENESS = 10
# The system ends this process before the server, when memory is short.
_OOM_SCORE = 500
_PR_SET_PDEATHSIG = 1
# A disk that is full may have room again, and a database that is busy may be free.
_PATIENCE_S, _RETRY_S = 300.0, 2.0
# Fields of a job's body by the trainer's names of its options.
_PARAMS = {
    "train": "training_file",
    "eval": "validation_file",
    "label_column": "training_file",
    "text_pair_column": "training_file",
    "spans_column": "training_file",
    "chat_template": "training_file",
    "messages_column": "training_file",
    "learning_rate": "learning_rate_multiplier",
    "init_from": "model",
    "adapter": "model",
    "suffix": "suffix",
    **{field: f"adapter.{field}" for field in SHAPE},
}


class NameTaken(SeraServeError):
    """The name of the job's adapter was taken by another one while the job ran."""

    code = "name_taken"
    status = 409


class Progress(TrainerCallback):  # type: ignore[misc]
    """Appends a line of JSON for each loss, evaluation and message."""

    def __init__(self, path: Path) -> None:
        """Append to a file. A process that was killed may have left a part of a line."""
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n")
        self._begun: tuple[float, int] | None = None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def say(self, message: str) -> None:
        """Append a message."""
        self._write({"type": "message", "message": message})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the first step of this process begins."""
        self._begun = time.monotonic(), state.global_step
        self.say(f"Training of {state.max_steps} steps begins at step {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Append the loss of the last steps."""
        if "loss" in logs:
            values = {"train_loss": logs["loss"], "learning_rate": logs.get("learning_rate")}
            self._write({"type": "metrics", **self._place(state), **values})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Append the metrics of an epoch."""
        place = self._place(state)
        self._write({"type": "metrics", **place, **self._train_loss(state), **metrics})
        self._write({"type": "checkpoint", **place, **self._train_loss(state), **metrics})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that a process that is started again goes on from here."""
        self._write({"type": "saved", "step": state.global_step})

    def _place(self, state: Any) -> dict[str, Any]:
        assert self._begun is not None
        begun, first = self._begun
        done = state.global_step - first
        left = (time.monotonic() - begun) / done * (state.max_steps - state.global_step) if done else None
        epoch = None if state.epoch is None else round(state.epoch, 3)
        return {"step": state.global_step, "total_steps": state.max_steps, "epoch": epoch, "seconds_left": left}

    def _train_loss(self, state: Any) -> dict[str, float]:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return {"train_loss": losses[-1]} if losses else {}

    def _write(self, entry: dict[str, Any]) -> None:
        # JSON has no NaN, which a run that diverges logs before it is stopped.
        known = {k: v for k, v in entry.items() if v is not None and (not isinstance(v, float) or v - v == 0)}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()


class JobPublisher:
    """Publishes the bundle of a run under a name that no one else has."""

    def __init__(self, run: Path, store: AdapterStore, quotas: Quotas, shares: Shares) -> None:
        """Note in a directory what is published to a store, within the tenant's quotas."""
        self._run = run
        self._store = store
        self._quotas = quotas
        self._holdings = Holdings(store, quotas)
        self._shares = shares

    def publish(self, bundle: AdapterBundle, name: str) -> Published:
        """Publish a bundle. Waits for minutes where the disk or the database refuses: it has taken hours to train.

        Raises:
            NameTaken: There is an adapter of this name.
            QuotaExceeded: The tenant may not have another adapter, or so many bytes.
            AccessDatabaseError: Nobody knows whether shares of an older adapter of this name are left.
            StoreError, OSError: It cannot be written.
        """
        return patiently(lambda: self._publish(bundle, name))

    def _publish(self, bundle: AdapterBundle, name: str) -> Published:
        if self.published(name) is None:
            self._check_free(name)
            # The server and commands may have set other limits while the job trained. A busy database must lose no
            # training of hours: then the commands' limits of its beginning hold.
            if (limits := read_limits(self._run)) is not None:
                self._quotas.reload(limits)
            with suppress(AccessDatabaseError):
                self._quotas.refresh()
            self._holdings.check_publish(name, bundle.digest, bundle.file_bytes)
            # A kill may have come between the deletion of an older adapter of this name and the end of its shares.
            self._shares.remove_all(name)
        # A process that is killed after this, and before it leaves its result, knows by this what it has published.
        write_json(self._run / PUBLISHING, {"name": name, "digest": bundle.digest})
        return self._store.publish(bundle, name)

    def published(self, name: str) -> dict[str, Any] | None:
        """The result of a process of this job that was killed after it had published, or None."""
        noted = read_publishing(self._run)
        if noted is None:
            return None
        try:
            found = self._store.resolve(name)
        except AdapterNotFound:
            return None
        if found.digest != noted["digest"]:
            return None
        return result_of(found.version, found.digest, self._store)

    def _check_free(self, name: str) -> None:
        try:
            self._store.resolve(name)
        except AdapterNotFound:
            return
        raise NameTaken(f"an adapter {name} was published while the job ran; create the job again", param="suffix")


def patiently(act: Callable[[], T]) -> T:
    """Do something, and do it again for some minutes where the disk or the database refuses it. Returns its result.

    Raises:
        AccessDatabaseError, StoreWriteFailed, StoreUnavailable, OSError: It is refused still.
    """
    began = time.monotonic()
    while True:
        try:
            return act()
        except (AccessDatabaseError, StoreWriteFailed, StoreUnavailable, OSError):
            if time.monotonic() - began > _PATIENCE_S:
                raise
        time.sleep(_RETRY_S)


def result_of(version: int, digest: str, store: AdapterStore) -> dict[str, Any]:
    """The result of a job that has succeeded, from its version and the record of its training."""
    training: dict[str, Any] = store.config(digest).training
    return {
        "status": "succeeded",
        "version": version,
        "digest": digest,
        "chosen_step": training["chosen_step"],
        "trained_tokens": training["trained_tokens"],
    }


def train(run: Path) -> dict[str, Any]:
    """Carry out the orders in a directory. Returns the result of success; raises what the trainer raises."""
    orders = json.loads((run / ORDERS).read_text(encoding="utf-8"))
    options = orders["settings"]
    torch.set_num_threads(orders["threads"])
    if options["device"].startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(orders["gpu_memory_fraction"])
    store = AdapterStore(options["store"], limits=BundleLimits(max_bytes=orders["max_bundle_bytes"]))
    database = AccessDatabase(store.root)
    quotas = patiently(lambda: Quotas(database, read_limits(run)))
    publisher = JobPublisher(run, store, quotas, Shares(database))
    if (done := publisher.published(options["name"])) is not None:
        return done
    base = load_base(options["base"], device=options["device"], dtype=options["dtype"], quantize=options["quantize"])
    if "messages_column" in options and not base.tokenizer.chat_template:
        initial = options.get("init_from")
        # An adapter that was trained on chats brings its own template, and the trainer takes no second one.
        if initial is None or not store.resolve(initial).has_chat_template:
            options["chat_template"] = str(CHAT_TEMPLATE)
    with closing(Progress(run / PROGRESS)) as progress:
        result = train_adapter(load_options(None, options), base=base, callbacks=[progress], publish=publisher.publish)
        for note in result.notes:
            progress.say(note)
    return result_of(result.version, result.digest, store)


def failure(error: Exception) -> dict[str, Any] | None:
    """The result of a job that has failed; None for a defect, and for faults of the server, which have its paths."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        remedy = "send a smaller batch_size or rank, or shorter rows"
        return _failed("out_of_memory", f"the memory that a training job may use is too small; {remedy}")
    if isinstance(error, CheckpointNotWritten):
        remedy = "ask the operator to free space there, and create the job again"
        return _failed(error.code, f"the disk of the store takes no checkpoint of the job; {remedy}")
    if isinstance(error, SeraServeError | StoreError):
        if error.status == 500 or isinstance(error, BaseNotFound):
            return None
        return _failed(error.code, in_words(error.message), _PARAMS.get(error.param or ""))
    if isinstance(error, OSError):
        return _failed("disk_error", f"the job's files cannot be written or read: {error.strerror or error}")
    return None


def _failed(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"status": "failed", "code": code, "message": message, "param": param}


def be_modest() -> None:
    """Let the server go first: for processors, and when memory is short."""
    os.nice(_NICENESS)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))


def end_with_parent() -> None:
    """Let the kernel end this process with the server's thread that started it. `process` watches the pipe too."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(run: Path) -> int:
    """Run the job of a directory. Returns the exit status."""
    end_with_parent()
    be_modest()
    disable_progress_bar()
    # Paths in messages are relative: those of the server are nobody's business.
    os.chdir(run)
    try:
        result = train(run)
    except Exception as error:
        found = failure(error)
        if found is None:
            raise
        result = found
    # Without a result the job has failed, and what it has published is deleted.
    patiently(lambda: write_json(run / RESULT, result))
    return 0
