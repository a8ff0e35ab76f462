"""kill -9 of the server, and of a job's process, in the middle of jobs: each job ends once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import openai
import psutil
import pytest

from adapters_store import AdapterStore
from support.live_server import wait_until
from support.training import PATIENCE_S, SORTED, finished, served_process, upload

pytestmark = pytest.mark.slow


def workers(run: Path) -> list[int]:
    """The processes that train in a directory."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if str(run) in (process.info["cmdline"] or ()) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


def connected(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=3, timeout=30)


def test_a_job_survives_kills_of_its_process_and_of_the_server(tmp_path: Path) -> None:
    store = tmp_path / "store"
    options = ("--pool-mib", "4", "--kv-cache-tokens", "1024")
    with served_process(store, *options) as (server, url), connected(url) as client:
        job = client.fine_tuning.jobs.create(
            model="embedded",
            training_file=upload(client, SORTED),
            suffix="kept",
            seed=1,
            hyperparameters={"n_epochs": 12, "batch_size": 4},
            extra_body={"adapter": {"rank": 2, "target_modules": ["q_proj"], "tenant": "acme"}},
        )
        run = store / "jobs" / "runs" / job.id
        wait_until(lambda: bool(list(run.glob("work/*/checkpoint-*"))), PATIENCE_S)
        (worker,) = workers(run)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: any(pid != worker for pid in workers(run)), PATIENCE_S)
        server.kill()
        server.wait()
        # Its processes end with it.
        wait_until(lambda: not workers(run), 10)
    with served_process(store, *options) as (server, url), connected(url) as client:
        ended = finished(client, job.id)
        assert ended.status == "succeeded", ended.error
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        steps = [event.data["step"] for event in events if event.type == "metrics" and "eval_loss" not in event.data]
        assert steps == sorted(set(steps), reverse=True) and steps[-1] == 1
        messages = [event.message for event in events]
        assert any("ended by the system (signal 9)" in message for message in messages)
        assert sum(message == "The job has successfully completed" for message in messages) == 1
        answer = client.post("/classify", body={"adapter": ended.fine_tuned_model, "inputs": ["apple"]}, cast_to=object)
        assert answer["results"][0]["label"] in ("fruit", "tool")  # type: ignore[index]
        assert AdapterStore(store).inspect(ended.fine_tuned_model).versions == (1,)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
