"""Files and training jobs by the official client, with the real trainer on the embedded base."""

from __future__ import annotations

import csv
import io
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters_store import AdapterStore
from sera_serve.base import load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from support.answers import refused
from support.live_server import live_server, wait_until
from support.training import CHATS, PATIENCE_S, SORTED, STORIES, finished, jsonl, upload

QUICK: dict[str, Any] = {
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
    "seed": 7,
}
SMALL = {"rank": 2, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    return AdapterStore(tmp_path_factory.mktemp("training") / "store")


@pytest.fixture(scope="module")
def url(store: AdapterStore) -> Iterator[str]:
    settings = ServeSettings(
        store=store.root, pool_mib=16, kv_cache_tokens=4096, max_training_jobs=3, max_training_file_mib=1
    )
    engine = ServingEngine(load_base("embedded"), store, settings)
    with live_server(build_app(engine, store, settings)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def adapter(**fields: Any) -> dict[str, Any]:
    """The `extra_body` of a job with an adapter object."""
    return {"adapter": SMALL | fields}


@pytest.fixture(scope="module")
def started(client: openai.OpenAI) -> dict[str, Any]:
    """Two jobs that run beside each other."""
    create = client.fine_tuning.jobs.create
    rows, wrong = upload(client, SORTED), upload(client, [*SORTED[:2], {"text": "stone", "label": "rock"}])
    sort = create(
        model="embedded",
        training_file=rows,
        validation_file=upload(client, SORTED[:4]),
        suffix="goods",
        metadata={"who": "me"},
        **QUICK,
        extra_body=adapter(tenant="acme", method="lora"),
    )
    fail = create(model="embedded", training_file=rows, validation_file=wrong, **QUICK, extra_body=adapter())
    return {"sort": sort, "fail": fail}


def test_a_file_is_kept_listed_read_and_deleted(client: openai.OpenAI, store: AdapterStore) -> None:
    content = jsonl(STORIES)
    first = client.files.create(file=("../../etc/passwd", content), purpose="fine-tune")
    second = client.files.create(file=('b "2".jsonl', jsonl(SORTED)), purpose="fine-tune")
    assert second.filename == 'b "2".jsonl'
    assert (first.filename, first.bytes, first.status) == ("../../etc/passwd", len(content), "processed")
    assert [held.id for held in client.files.list(limit=2)][:2] == [second.id, first.id]
    assert [held.id for held in client.files.list(after=second.id, limit=1).data] == [first.id]
    assert client.files.list(order="asc").data[-1].id == second.id
    assert client.files.list(purpose="assistants").data == []
    assert client.files.content(first.id).read() == content
    assert (store.root / "jobs").stat().st_mode & 0o777 == 0o700
    assert client.files.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(first.id)
    assert caught.value.code == "file_not_found"
    assert [path.name for path in (store.root / "jobs" / "files").iterdir()] == [second.id]


def test_a_file_whose_bytes_are_gone_is_told_at_once(client: openai.OpenAI, store: AdapterStore) -> None:
    kept, gone = upload(client, SORTED), upload(client, SORTED)
    (store.root / "jobs" / "files" / gone).unlink()
    for files, param in (
        ({"training_file": gone}, "training_file"),
        ({"training_file": kept, "validation_file": gone}, "validation_file"),
    ):
        with pytest.raises(openai.BadRequestError, match=f"file {gone} is missing; upload it again") as refused:
            client.fine_tuning.jobs.create(model="embedded", **files, **QUICK, extra_body=adapter())
        assert (refused.value.code, refused.value.param) == ("file_missing", param)
    with pytest.raises(openai.NotFoundError, match="is missing; upload it again") as absent:
        client.files.content(gone)
    assert (absent.value.code, absent.value.param) == ("file_missing", "file_id")
    for held in (kept, gone):
        assert client.files.delete(held).deleted


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (jsonl(STORIES) + b'{"prompt": "x"}\n', "row 6 (line 6): completion is missing"),
        (jsonl(SORTED[:2]) + b"\n" + jsonl(CHATS[:1]), "row 3 (line 4): it has messages, and rows before it have text"),
        (jsonl([{"text": "a", "label": 1.5}]), "row 1 (line 1): label is float 1.5"),
        (jsonl([{"text": "a", "label": "b", "weight": 1}]), "row 1 (line 1): 'weight' is not used"),
        (jsonl([{"text": "a", "text_pair": " ", "label": "b"}]), "row 1 (line 1): text_pair is empty"),
        (
            jsonl([{"text": "a", "text_pair": "b", "label": "c"}, {"text": "a", "label": "b"}]),
            "row 2 (line 2): it has text and label, and rows before it have text and text_pair and label",
        ),
        (jsonl([{"messages": [{"role": "robot", "content": "x"}]}]), "messages[0] has the role 'robot'"),
        (b"[" * 100_000, "row 1 (line 1): not JSON"),
        (b'{"text": "\xff"}', "row 1 (line 1): it is not UTF-8"),
        (
            jsonl(SORTED[:2]) + b'{"text": "a", "label": "\\ud800"}\n',
            "row 3 (line 3): not JSON (a string holds half of a",
        ),
        (b"\n\n", "the file has no rows"),
    ],
)
def test_a_file_with_a_row_that_cannot_be_used_is_refused(client: openai.OpenAI, content: bytes, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "file")
    assert words in caught.value.message


def test_forms_that_are_not_of_their_form_are_refused_by_name(url: str) -> None:
    with httpx.Client(base_url=url) as raw:

        def post(files: Any, data: dict[str, str]) -> httpx.Response:
            return raw.post("/v1/files", files=files, data=data)

        rows = {"file": ("a.jsonl", jsonl(STORIES))}
        error = refused(post(rows, {"purpose": "assistants"}), 400, "invalid_request")
        assert error["param"] == "purpose" and "'assistants'" in error["message"]
        assert refused(post(rows, {}), 400, "missing_field")["param"] == "purpose"
        as_file = refused(post(rows | {"purpose": ("p", b"fine-tune")}, {}), 400, "invalid_request")
        assert as_file["param"] == "purpose" and "is a file; send it as text" in as_file["message"]
        assert refused(post(None, {"purpose": "fine-tune"}), 415, "unsupported_media_type")
        expiring = {"purpose": "fine-tune", "expires_after[anchor]": "created_at"}
        assert refused(post(rows, expiring), 400, "unknown_field")["param"] == "expires_after[anchor]"
        long = {"file": ("a.jsonl", b"x" * (2 << 20))}
        assert refused(post(long, {"purpose": "fine-tune"}), 413, "body_too_large")["param"] == "file"
        assert refused(raw.get("/v1/files?after=file-0"), 404, "file_not_found")["param"] == "after"


@pytest.mark.slow
def test_a_classifier_is_trained_and_serves_at_once(
    client: openai.OpenAI, url: str, store: AdapterStore, started: dict[str, Any]
) -> None:
    made = started["sort"]
    assert made.status in ("validating_files", "queued", "running") and made.fine_tuned_model is None
    # The file of an unfinished job stays.
    with pytest.raises(openai.ConflictError) as caught:
        client.files.delete(made.training_file)
    assert caught.value.code == "file_in_use"
    with httpx.stream("GET", f"{url}/v1/fine_tuning/jobs/{made.id}/events?stream=true", timeout=PATIENCE_S) as response:
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    events = [json.loads(line) for line in data[:-1]]
    assert [event["id"] for event in events] == [f"ftevent-{number}" for number in range(1, len(events) + 1)]
    points = [event["data"] for event in events if event["type"] == "metrics"]
    assert [point["step"] for point in points if "eval_loss" not in point] == [1, 2, 3]
    assert all(point["total_steps"] == 3 and point["train_loss"] > 0 for point in points)
    assert {"eval_loss", "eval_accuracy"} <= set(points[-1])

    job = finished(client, made.id)
    assert (job.status, job.error, job.seed, job.metadata) == ("succeeded", None, 7, {"who": "me"})
    assert job.hyperparameters.n_epochs == 1 and job.method.supervised.hyperparameters.batch_size == 4
    assert job.trained_tokens > 12 and job.fine_tuned_model.startswith("acme/embedded-goods-")
    answer = httpx.post(f"{url}/v1/classify", json={"adapter": job.fine_tuned_model, "inputs": ["apple"]})
    assert answer.json()["results"][0]["label"] in ("fruit", "tool")
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(made.id).data
    assert checkpoint.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}@v1"
    assert checkpoint.step_number == 3
    newest = client.fine_tuning.jobs.list_events(made.id, limit=2)
    assert newest.has_more and newest.data[0].message == "The job has successfully completed"
    assert client.fine_tuning.jobs.list_events(made.id, after=newest.data[1].id).data[0].id == events[-3]["id"]
    page = client.fine_tuning.jobs.list(limit=1)
    assert [held.id for held in page.data] == [started["fail"].id] and page.has_more
    assert client.fine_tuning.jobs.list(after=page.data[-1].id).data[0].id == made.id
    assert [held.id for held in client.fine_tuning.jobs.list(metadata={"who": "me"}).data] == [made.id]
    assert client.fine_tuning.jobs.list(metadata={"who": "you"}).data == []

    (results,) = job.result_files
    file = client.files.retrieve(results)
    assert (file.purpose, file.filename) == ("fine-tune-results", f"{made.id}.csv")
    table = client.files.content(results).read()
    assert file.bytes == len(table)
    rows = list(csv.DictReader(io.StringIO(table.decode())))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [float(row["train_loss"]) for row in rows] == [point["train_loss"] for point in points[:3]]
    assert float(rows[-1]["valid_loss"]) == points[-1]["eval_loss"] and rows[0]["valid_loss"] == ""
    assert float(rows[-1]["valid_accuracy"]) == points[-1]["eval_accuracy"]
    assert results in [held.id for held in client.files.list(purpose="fine-tune-results").data]
    assert results not in [held.id for held in client.files.list(purpose="fine-tune").data]
    with pytest.raises(openai.BadRequestError, match="has the metrics of a job") as caught:  # type: ignore[assignment]
        client.fine_tuning.jobs.create(model="embedded", training_file=results)
    assert caught.value.param == "training_file"
    # Nothing of the run is left.
    wait_until(lambda: not (store.root / "jobs" / "runs" / made.id).exists())
    assert client.files.delete(made.validation_file).deleted
    lines = (store.root / "access" / "audit.jsonl").read_text().splitlines()
    actions = [json.loads(line)["action"] for line in lines if made.id in line or job.fine_tuned_model in line]
    assert actions == ["job.create", "adapter.publish", "job.finish"]


@pytest.mark.slow
def test_a_chat_is_trained_and_goes_on_from_the_first_job(client: openai.OpenAI, store: AdapterStore) -> None:
    rows = upload(client, CHATS)
    created = client.fine_tuning.jobs.create(
        model="embedded", training_file=rows, **QUICK, extra_body=adapter(split=2, rank=4)
    )
    first = finished(client, created.id)
    assert first.status == "succeeded", first.error
    file = first.training_file
    assert first.fine_tuned_model.startswith("default/embedded-")
    answer = client.chat.completions.create(
        model=first.fine_tuned_model, messages=[{"role": "user", "content": "Say red."}], max_tokens=4
    )
    assert answer.choices[0].message.role == "assistant"
    made = client.fine_tuning.jobs.create(
        model=first.fine_tuned_model, training_file=file, hyperparameters={"n_epochs": 2}, suffix="more"
    )
    second = finished(client, made.id)
    assert second.status == "succeeded", second.error
    before, after = (store.config(store.resolve(job.fine_tuned_model).digest) for job in (first, second))
    assert after.modules == before.modules and after.chat_template == before.chat_template
    assert after.training["init_from"]["adapter"] == f"{first.fine_tuned_model}@v1"
    with pytest.raises(openai.BadRequestError, match=r"keeps its rank; leave adapter\.rank out"):
        client.fine_tuning.jobs.create(model=first.fine_tuned_model, training_file=file, extra_body=adapter())


@pytest.mark.slow
def test_a_job_whose_data_do_not_fit_fails_in_words(client: openai.OpenAI, started: dict[str, Any]) -> None:
    job = finished(client, started["fail"].id)
    assert (job.status, job.fine_tuned_model, job.error.code) == ("failed", None, "invalid_training_data")
    assert job.error.message.startswith("validation_file.jsonl, row 3 (line 3): label 'rock' is not in the training")
    with pytest.raises(openai.ConflictError) as caught:
        client.fine_tuning.jobs.cancel(job.id)
    assert caught.value.code == "job_ended"


def test_a_cancelled_job_stops_and_leaves_nothing(client: openai.OpenAI, store: AdapterStore) -> None:
    file = upload(client, SORTED)
    made = client.fine_tuning.jobs.create(
        model="embedded", training_file=file, hyperparameters={"n_epochs": 50}, extra_body=adapter()
    )
    run = store.root / "jobs" / "runs" / made.id
    wait_until(lambda: (run / "orders.json").exists(), 30)
    assert client.fine_tuning.jobs.cancel(made.id).status == "cancelled"
    wait_until(lambda: not run.exists(), 3)
    job = client.fine_tuning.jobs.cancel(made.id)
    assert (job.status, job.fine_tuned_model) == ("cancelled", None)
    assert not any(made.id.removeprefix("ftjob-")[:10] in info.adapter for info in store.iter_adapters())
    assert client.files.delete(file).deleted


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"integrations": [{"type": "wandb"}]}, "integrations", "has no integrations"),
        ({"integrations": [], "nonsense": 1}, "nonsense", "is not a field"),
        ({"integrations": None, "nonsense": 1}, "nonsense", "is not a field"),
        ({"method": {"type": "dpo"}}, "method.type", "supervised"),
        ({"model": "acme/none"}, "model", "is not in the store"),
        ({"training_file": "file-none"}, "training_file", "does not exist"),
        ({"suffix": "My Model"}, "suffix", "a-z"),
        ({"adapter": {"task": "classify"}}, "adapter.task", "task generate"),
        ({"adapter": {"rank": 4, "split": 3}}, "adapter", "split 3 does not divide"),
        ({"adapter": {"target_modules": ["nothing"]}}, "adapter.target_modules", "no linear layer"),
        ({"adapter": {"tenant": "A/B"}}, "adapter.tenant", "lower"),
        ({"adapter": {"rank_pattern": {"q_proj": 2**40}}}, "adapter.rank_pattern", "less than or equal"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", ""),
        ({"hyperparameters": {"n_epochs": 2**40}}, "hyperparameters.n_epochs", ""),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, "hyperparameters", "method.supervised alone"),
        ({"metadata": {"a": 1}}, "metadata", "strings"),
    ],
)
def test_a_job_that_cannot_run_is_refused_by_the_field(
    client: openai.OpenAI, url: str, body: dict[str, Any], param: str, words: str
) -> None:
    sent = {"model": "embedded", "training_file": upload(client, STORIES)} | body
    answer = httpx.post(f"{url}/v1/fine_tuning/jobs", json=sent)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert param in (error["param"] or ""), error
    assert words in error["message"] or words == "lower", error


@pytest.mark.slow
def test_the_example(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fine_tune.py", "--url", url])
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "fine_tune.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("Step 1/") for line in lines)
    # The answer of the new model to a chat that it has not seen. It ends where a turn ends.
    assert lines[-1].startswith("default/embedded-colours-") and lines[-1].endswith(": I like it too!")


def test_bytes_that_no_record_names_are_swept(tmp_path: Path) -> None:
    import fcntl

    from sera_serve.access import AccessDatabase
    from sera_serve.jobs import JobPaths, TrainingFiles

    paths = JobPaths(AdapterStore(tmp_path).root)
    paths.make()
    database = AccessDatabase(tmp_path)
    with database.writing():
        pass
    files = TrainingFiles(database, paths, 1 << 20)
    paths.file("file-dead").write_bytes(b"x")
    # Of a disk that is mounted there.
    paths.file("lost+found").mkdir()
    with paths.file("file-live.part").open("wb") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        assert files.sweep() == 1
        assert {path.name for path in paths.files.iterdir()} == {"file-live.part", "lost+found"}
    assert files.sweep() == 1
