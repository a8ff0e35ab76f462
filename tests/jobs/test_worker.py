"""The program of a job's process: the template that it trains chats with, and what it says of a full disk."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from adapters_store import AdapterStore
from adapters_store.errors import StoreCorrupted
from sera_serve.base.loading import EMBEDDED_FOLDER
from sera_serve.errors import BaseNotFound
from sera_serve.jobs import Job, JobPaths, JobProcesses, JobSpec
from sera_serve.jobs.worker import CHAT_TEMPLATE, failure, train
from sera_serve.trainer.checkpoint import CheckpointNotWritten
from support.training import jsonl

CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]}
    for word in ("red", "green", "blue", "black", "white", "pink")
]


def trained(store: AdapterStore, base: Path, name: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> str | None:
    """Train a job in this process, and return its adapter's chat template."""
    paths = JobPaths(store.root)
    paths.make()
    paths.file("file-1").write_bytes(jsonl(CHATS))
    spec = JobSpec(base.name, name, "messages", "generate", 1, 4, 1.0, 0, len(CHATS), **fields)
    job = Job(*(f"ftjob-{name[2:]}", "t", "running", spec, {}, "file-1", None, None), *[None] * 12)  # type: ignore[arg-type]
    run = JobProcesses(str(base), store.root, "cpu", "auto", 1, 0.5, 64 << 20).prepare(job, paths)
    monkeypatch.chdir(run)
    return store.config(train(run)["digest"]).chat_template


def test_the_adapter_carries_the_template_and_a_job_that_goes_on_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(EMBEDDED_FOLDER, tmp_path / "base")
    options = json.loads((base / "tokenizer_config.json").read_text())
    del options["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(options))
    store = AdapterStore(tmp_path / "store")
    first = trained(store, base, "t/first", monkeypatch, rank=4, split=2)
    assert first == CHAT_TEMPLATE.read_text()
    assert trained(store, base, "t/second", monkeypatch, init_from="t/first@v1", kept_method="sera") == first


@pytest.mark.parametrize("error", [StoreCorrupted("/srv/v1.json is damaged"), BaseNotFound("/srv/base is no model")])
def test_a_fault_of_the_server_is_told_to_its_log_alone(error: Exception) -> None:
    assert failure(error) is None


def test_a_full_disk_is_told_without_a_path_and_without_options_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TrainerState, "save_to_json", full)
    with pytest.raises(CheckpointNotWritten) as caught:
        trained(AdapterStore(tmp_path / "store"), EMBEDDED_FOLDER, "t/a", monkeypatch, rank=4, split=2)
    assert str(tmp_path) not in caught.value.message
    told = failure(caught.value)
    assert told is not None and (told["code"], told["param"]) == ("checkpoint_not_written", None)
    assert "create the job again" in told["message"] and "--" not in told["message"]
