"""Jobs of each task of texts: rows checked, options refused by field, trained, and served at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import torch

from adapters_store import AdapterStore
from sera_serve.base import load_base
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.jobs import JobPaths, JobProcesses
from sera_serve.jobs.process import read_progress
from sera_serve.jobs.records import LastSteps
from sera_serve.jobs.worker import train
from sera_serve.server import build_app
from sera_serve.server.openai.fine_tuning_schemas import TrainingMethod
from sera_serve.trainer.methods import Method
from support.answers import refused
from support.live_server import live_server
from support.training import SORTED, STORIES, jsonl

PAIRS = [{"text": row["text"], "text_pair": "a thing", "label": row["label"]} for row in SORTED]
TAGGED = [
    {"text": f"{word} {number}", "labels": labels}
    for number in range(6)
    for word, labels in (("red apple", ["fruit", "red"]), ("apple", ["fruit"]), ("stone", []))
]
SCORED = [{"text": "one " * number, "score": number} for number in range(1, 13)]
ALIKE = [{"text": "one", "text_pair": "one " * number, "score": 1 / number} for number in range(1, 13)]
NAMED = [
    {"text": f"{name} is in {place}", "spans": [{"start": 0, "end": len(name), "label": "person"}]}
    for name in ("Ann", "Bob", "Mia")
    for place in ("Rome", "Oslo", "Lima", "Bern")
]
LAYERS = {"rank": 4, "target_modules": ["layers.0.*.q_proj", "layers.1.*.v_proj"]}


@dataclass
class Server:
    """A server whose jobs wait, and what runs them here."""

    url: str
    store: AdapterStore
    app: Any

    def upload(self, rows: list[dict[str, Any]]) -> httpx.Response:
        """Send a file."""
        files = {"file": ("rows.jsonl", jsonl(rows))}
        return httpx.post(f"{self.url}/v1/files", files=files, data={"purpose": "fine-tune"})

    def create(self, rows: list[dict[str, Any]], adapter: dict[str, Any], **fields: Any) -> httpx.Response:
        """Send a file, and make a job of one epoch with it."""
        body = {
            "model": "embedded",
            "training_file": self.upload(rows).json()["id"],
            "hyperparameters": {"n_epochs": 1, "batch_size": 4},
            "seed": 7,
            "adapter": adapter,
        }
        return httpx.post(f"{self.url}/v1/fine_tuning/jobs", json=body | fields)

    def run(self, job_id: str) -> tuple[str, list[dict[str, Any]]]:
        """Train a job in this process, as its own process does. Returns the adapter, and the data of its events."""
        job = self.app.state.training.jobs.get(job_id, None)
        paths = JobPaths(self.store.root)
        processes = JobProcesses("embedded", self.store.root, "cpu", "auto", torch.get_num_threads(), 0.5, 64 << 20)
        folder = processes.prepare(job, paths)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert train(folder)["status"] == "succeeded"
        found = read_progress(folder, 0, LastSteps())
        assert found.has_saved and (found.checkpoints or job.spec.options.get("budget"))
        return job.spec.adapter, [{"message": event.message, **(event.data or {})} for event in found.events]

    def classify(self, adapter: str, value: Any) -> dict[str, Any]:
        """One result of an adapter."""
        answer = httpx.post(f"{self.url}/v1/classify", json={"adapter": adapter, "inputs": [value]})
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()["results"][0]
        return result


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = AdapterStore(tmp_path_factory.mktemp("tasks") / "store")
    settings = ServeSettings(store=store.root, pool_mib=16, kv_cache_tokens=4096, max_training_jobs=0)
    app = build_app(ServingEngine(load_base("embedded"), store, settings), store, settings)
    with live_server(app) as url:
        yield Server(url, store, app)


def refusal_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a refusal, whatever its code."""
    return refused(response, 400, response.json().get("error", {}).get("code", ""))


def test_a_job_may_use_every_method_of_the_trainer() -> None:
    assert set(get_args(TrainingMethod)) == set(get_args(Method))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "labels": "b|c"}, "labels must be a list such as"),
        ({"text": "a", "labels": ["b", "b"]}, "labels has a label twice"),
        ({"text": "a", "labels": [1.5]}, "labels has 1.5; a label is a name"),
        ({"text": "a", "labels": ["b"], "label": "b"}, "'labels' is not used; a row of this kind has"),
        ({"text": "a", "score": "3.8"}, "score is the text '3.8'; write a number"),
        ({"text": "a", "score": True}, "score is True, not a number"),
        ({"text": "a", "score": 1e300}, "score is 1e+300; give numbers of at most"),
        ({"text": "a", "text_pair": "", "score": 1}, "text_pair is empty"),
        ({"text": "Ann", "spans": '[{"start": 0}]'}, "spans must be a list such as"),
        (
            {"text": "Ann", "spans": [{"start": 0, "end": 9, "label": "x"}]},
            "spans[0] goes from 0 to 9, and the text has 3",
        ),
        (
            {"text": "Ann", "spans": [{"start": 0, "end": 3, "label": "x", "text": "Ann"}]},
            "spans[0] has 'text', which is",
        ),
        ({"text": "Ann", "text_pair": "b", "spans": []}, "'text_pair' is not used"),
        ({"text": "a", "text_pair": "b"}, "it has no field that can be learned from"),
        ({}, "it has no field that can be learned from"),
        ({"text": "a"}, "label is missing; the rows before it have text and label"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_line(server: Server, row: dict[str, Any], words: str) -> None:
    kind = next((rows for key, rows in (("spans", NAMED), ("score", SCORED), ("labels", TAGGED)) if key in row), SORTED)
    if "text_pair" in row and "score" in row:
        kind = ALIKE
    error = refused(server.upload([*kind[:2], row]), 400, "invalid_training_file")
    assert error["param"] == "file" and f"row 3 (line 3): {words}" in error["message"]


def test_a_row_of_many_long_spans_takes_no_memory(server: Server) -> None:
    text = "x" * 400_000
    for spans in (
        # Each would keep, or show, the whole text.
        [{"start": 0, "end": len(text), "label": "x"}] * 12_000,
        [{"start": 0, "end": len(text) + 1, "label": "x"}] * 12_000,
    ):
        error = refused(server.upload([{"text": text, "spans": spans}]), 400, "invalid_training_file")
        assert len(error["message"]) < 2000


@pytest.mark.parametrize(
    ("rows", "adapter", "param", "words"),
    [
        (SORTED, {"task": "regress"}, "adapter.task", "are for task classify"),
        (SCORED, {"task": "multi_label"}, "adapter.task", "'multi-label'"),
        (SORTED, {"method": "sera-freeze-c"}, "adapter.method", "sera-freeze-b"),
        (SORTED, {"method": "lora-fa", "lora_plus_ratio": 0}, "adapter.lora_plus_ratio", "greater than 0"),
        (SORTED, {"method": "sera-freeze-b", "lora_plus_ratio": 16}, "adapter.lora_plus_ratio", "B does not train"),
        (SORTED, {"method": "head-only", "lora_alpha": 8}, "adapter.lora_alpha", "no meaning for method head-only"),
        (SORTED, {"method": "lora", "train_factors": ["c"]}, "adapter.train_factors", "this method trains a,b"),
        (SORTED, {"train_factors": ["b", "b"]}, "adapter.train_factors", "twice"),
        (SORTED, {"rank_pattern": {"q_proj": 512}}, "adapter.rank_pattern.q_proj", "256"),
        (SORTED, {"rank_pattern": {"*a" * 9: 8}}, "adapter.rank_pattern", "more than 8 of '*'"),
        (SORTED, {"target_modules": ["?" * 9]}, "adapter.target_modules", "more than 8 of '*'"),
        (SORTED, {"target_modules": "q_proj,v_proj"}, "adapter.target_modules", "'all-linear' or a valid list"),
        (SORTED, {"target_modules": ["q_proj", 5]}, "adapter.target_modules[1]", "is 5: it should be a valid string"),
        (
            SORTED,
            {"rank_pattern": {str(n): "x" for n in range(33)}},
            "adapter.rank_pattern",
            "33 patterns; send at most 32",
        ),
        (SORTED, {"target_modules": [0] * 65}, "adapter.target_modules", "65 patterns; send at most 64"),
        (SORTED, {"rank_pattern": {"nothing": 8}}, "adapter.rank_pattern", "'nothing' matches no layer"),
        (SORTED, {"rank_pattern": {"q_proj": 8, " q_proj": 4}}, "adapter.rank_pattern", "there twice"),
        (
            SORTED,
            {"rank": 8, "split_pattern": {"q_proj": 3}},
            "adapter.split_pattern",
            "split 3 does not divide rank 8",
        ),
        (SORTED, {"alpha_pattern": {"q_proj": 0}}, "adapter.alpha_pattern.q_proj", "greater than 0"),
        (SORTED, {"target_modules": ["layers.9.*"]}, "adapter.target_modules", "matches no linear layer"),
        (SORTED, {"rank": 8, "budget": 8}, "adapter.budget", "is not below the mean rank 8; raise adapter.rank"),
        (SORTED, {"rank": 8, "budget": 0.001}, "adapter.budget", "raise adapter.budget or lower adapter.split"),
        (SORTED, {"rank": 255}, "adapter.rank", "split 255 does not divide the widths"),
        (SORTED, {"rank": 255, "split": 255}, "adapter.split", "split 255 does not divide the widths"),
        (SORTED, {"budget_final": 0.5}, "adapter.budget_final", "belongs to adapter.budget"),
        (SORTED, {"budget": 4, "budget_warmup": 0.6, "budget_final": 0.5}, "adapter.budget_warmup", "below 1"),
        (NAMED, {"pooling": "mean"}, "adapter.pooling", "leave it out for token-classify"),
        (STORIES, {"method": "head-only"}, "adapter.method", "no head to train for task generate"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_by_its_field(
    server: Server, rows: list[dict[str, Any]], adapter: dict[str, Any], param: str, words: str
) -> None:
    error = refusal_of(server.create(rows, adapter))
    assert error["param"].startswith(param) and words in error["message"], error
    assert "--" not in error["message"]


def test_spans_are_trained_with_patterns_and_lora_plus_and_served_at_once(server: Server) -> None:
    shape = LAYERS | {
        "task": "token-classify",
        "method": "sera-freeze-a",
        "rank_pattern": {"layers.1.*": 2},
        "alpha_pattern": {"q_proj": 4.0},
        "lora_plus_ratio": 4.0,
    }
    made = server.create(NAMED, shape).json()
    assert {name: made["adapter"][name] for name in shape} == shape
    adapter, events = server.run(made["id"])
    evaluated = events[-1]
    assert {"eval_loss", "eval_f1", "eval_precision", "eval_recall", "eval_token_accuracy"} <= set(evaluated)
    assert "eval f1=" in evaluated["message"] and "runtime" not in evaluated["message"]
    result = server.classify(adapter, "Ann is in Rome")
    assert set(result) == {"spans", "truncated"}
    config = server.store.config(server.store.resolve(adapter).digest)
    shapes = {path: (spec.rank, spec.split, spec.scaling) for path, spec in config.modules.items()}
    assert {shape for path, shape in shapes.items() if path.endswith("q_proj")} == {(4, 4, 1.0)}
    assert {shape for path, shape in shapes.items() if path.endswith("v_proj")} == {(2, 2, 2.0)}
    assert config.training["method"] == "sera-freeze-a"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "shape", "fields", "metric"),
    [
        (TAGGED, {"task": "multi-label", "method": "melora"}, {"labels", "probabilities"}, "eval_micro_f1"),
        (SCORED, {"method": "lora", "pooling": "mean"}, {"score"}, "eval_pearson"),
        (ALIKE, {"task": "regress", "method": "sera-freeze-b"}, {"score"}, "eval_spearman"),
        (PAIRS, {"method": "sera-c-only"}, {"label", "probabilities"}, "eval_accuracy"),
        (PAIRS, {"budget": 2.0, "split": 2, "budget_warmup": 0.0}, {"label", "probabilities"}, "eval_accuracy"),
        (NAMED, {"method": "moslora", "train_factors": ["c", "b"]}, {"spans", "truncated"}, "eval_f1"),
    ],
)
def test_each_task_is_trained_and_served_at_once(
    server: Server, rows: list[dict[str, Any]], shape: dict[str, Any], fields: set[str], metric: str
) -> None:
    # One epoch has too few steps for ranks, which a note after the evaluation would say.
    epochs = 2 if "budget" in shape else 1
    made = server.create(rows, LAYERS | shape, hyperparameters={"n_epochs": epochs, "batch_size": 4}).json()
    adapter, events = server.run(made["id"])
    assert metric in events[-1]
    asked = {name: rows[0][name] for name in ("text", "text_pair") if name in rows[0]}
    result = server.classify(adapter, asked if "text_pair" in asked else asked["text"])
    assert fields <= set(result)
    if "budget" in shape:
        config = server.store.config(server.store.resolve(adapter).digest)
        assert sum(spec.rank for spec in config.modules.values()) <= 2 * 2


def test_a_job_goes_on_from_an_adapter_of_its_kind_alone(server: Server) -> None:
    adapter, _ = server.run(server.create(TAGGED, LAYERS | {"method": "sera-freeze-b"}).json()["id"])
    error = refusal_of(server.create(SORTED, {}, model=adapter))
    assert error["param"] == "model" and "is for task multi-label, and the rows are for classify" in error["message"]
    error = refusal_of(server.create(TAGGED, {"alpha_pattern": {"q_proj": 2.0}}, model=adapter))
    assert error["param"] == "adapter.alpha_pattern" and "keeps its alpha_pattern" in error["message"]
    error = refusal_of(server.create(TAGGED, {"lora_plus_ratio": 2.0}, model=adapter))
    assert error["param"] == "adapter.lora_plus_ratio" and "sera-freeze-b" in error["message"]
    made = server.create(TAGGED, {"budget": 2.0}, model=adapter, hyperparameters={"learning_rate_multiplier": 0.5})
    spec = server.app.state.training.jobs.get(made.json()["id"], None).spec
    options = spec.train_settings("embedded", Path("store"), device="cpu", dtype="auto")
    assert (options["init_from"], options["multi_label"], options["budget"]) == (f"{adapter}@v1", True, 2.0)
    # The rate is that of the adapter's own method.
    assert options["learning_rate"] == 0.5 * 1e-2
    assert json.loads(spec.as_json())["options"] == {"budget": 2.0}


@pytest.mark.parametrize(("method", "rate"), [("lora", 3e-3), ("sera", 1e-2), (None, 1e-2)])
def test_the_multiplier_is_a_factor_of_the_methods_rate(server: Server, method: str | None, rate: float) -> None:
    for multiplier in (2.0, 1.0):
        made = server.create(
            SORTED,
            {} if method is None else {"method": method},
            hyperparameters={"learning_rate_multiplier": multiplier},
        )
        spec = server.app.state.training.jobs.get(made.json()["id"], None).spec
        options = spec.train_settings("embedded", Path("store"), device="cpu", dtype="auto")
        assert options.get("learning_rate", rate) == rate * multiplier
