"""Rows, servers and waits of the tests of training jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

PATIENCE_S = 240.0
SORTED = [
    {"text": f"{word} number {number}", "label": label}
    for number in range(6)
    for word, label in (("apple", "fruit"), ("hammer", "tool"))
]
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"{word}!"}]}
    for word in ("red", "blue", "green", "black", "white", "brown")
]
STORIES = [{"prompt": f"One day, {name}", "completion": " went home."} for name in ("Tom", "Ann", "Sue", "Max", "Lee")]


def jsonl(rows: Sequence[Any]) -> bytes:
    """The bytes of a JSONL file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def finished(client: openai.OpenAI, job_id: str, seconds: float = PATIENCE_S) -> Any:
    """Wait for the end of a job, and return it."""
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job_id)).finished_at is None:
        assert time.monotonic() < deadline, (job, client.fine_tuning.jobs.list_events(job_id).data[:3])
        time.sleep(0.1)
    return job


def upload(client: openai.OpenAI, rows: Sequence[Any], name: str = "rows.jsonl") -> str:
    """Upload a file, and return its id."""
    return client.files.create(file=(name, jsonl(rows)), purpose="fine-tune").id


@contextmanager
def served_process(store: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server process of the command, with the embedded base. It is killed at the end, if it still runs."""
    log = store.with_suffix(".log")
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from sera_serve.cli import main; main()",
                "serve",
                "--store",
                str(store),
                "--port",
                "0",
                *options,
            ],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            yield process, _address(log, begin, process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def _address(log: Path, begin: int, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for word in log.read_bytes()[begin:].decode(errors="replace").split():
            if word.startswith("http://localhost:") and word.count("/") == 2:
                return word
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise TimeoutError(log.read_text())
