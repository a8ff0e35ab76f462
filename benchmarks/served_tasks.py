"""Served equals trained: what the trainer measured on test rows is what every one of these rows gives over HTTP.

    python -m benchmarks.served_tasks [--data DIR] [--encoder DIR] [--rows N] [--epochs N] [--quick]

Each text task trains a SeRA adapter on a part of a real data set (spans: of generated texts), and scores its test rows.
Then a server process answers the same rows, 32 a request, and the metrics are computed anew from the answers. Counts
must be equal. Correlations, errors and losses are sums of float32 numbers in another order; they must agree in the four
decimals that the trainer prints. The last line is one JSON object.
"""

from __future__ import annotations

import csv
import json
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from benchmarks.last_line import tell
from benchmarks.minilm import minilm
from benchmarks.server_process import ServerProcess
from sera_serve.base import EMBEDDED, FrozenBase, Span, load_base
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks.multi_label import label_set_metrics
from sera_serve.trainer.tasks.regress import regression_metrics
from sera_serve.trainer.tasks.token_classify import span_metrics

REQUEST = 32
TOLERANCE = 5e-5
Rows = list[dict[str, Any]]
Results = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A task on a data set.

    Attributes:
        name: What the table calls it.
        options: Of the training run.
        load: Makes (training rows, test rows) from the folder of data and their numbers.
        metrics: What the answers to the test rows score.
        exact: The metrics that are counts.
        decoder: Whether the base is the embedded decoder, not the encoder.
    """

    name: str
    options: dict[str, Any]
    load: Callable[[Path, int, int], tuple[Rows, Rows]]
    metrics: Callable[[Rows, Results], dict[str, float]]
    exact: tuple[str, ...]
    decoder: bool = False


def read_csv(path: Path, count: int) -> Rows:
    """The first rows of a CSV file in an order drawn once, so that sorted files give all their labels."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    return list(rows[:count])


def _sst2(data: Path, train: int, test: int) -> tuple[Rows, Rows]:
    return read_csv(data / "glue/sst2/train.csv", train), read_csv(data / "glue/sst2/dev.csv", test)


def _stsb(data: Path, train: int, test: int) -> tuple[Rows, Rows]:
    return read_csv(data / "glue/stsb/train.csv", train), read_csv(data / "glue/stsb/test.csv", test)


def _hwu64(data: Path, train: int, test: int) -> tuple[Rows, Rows]:
    """Intents such as alarm_set become two labels, scenario and action."""
    found = []
    for use, count in (("train", train), ("test", test)):
        rows = read_csv(data / f"tenants/hwu64/{use}.csv", count)
        found.append([{"text": row["text"], "label": row["label"].split("_")} for row in rows])
    known = {label for row in found[0] for label in row["label"]}
    return found[0], [row for row in found[1] if known.issuperset(row["label"])]


def _e2e(data: Path, train: int, test: int) -> tuple[Rows, Rows]:
    found = []
    for use, count in (("train", train), ("test", test)):
        with (data / f"generate/e2e/{use}.jsonl").open(encoding="utf-8") as lines:
            found.append([json.loads(line) for _, line in zip(range(count), lines, strict=False)])
    return found[0], found[1]


PEOPLE = ["Ann", "Bob Lee", "Mia Novak", "Tom Ray", "Zoë", "Li Wei", "Omar Haddad", "Ada"]
PLACES = ["Rome", "New Delhi", "Oslo", "Lima", "Cape Town", "São Paulo", "Kyoto", "Łódź"]
TEMPLATES = [
    "{person} lives in {place}.",
    "In {place}, {person} met {person}.",
    "The train from {place} to {place} is late again.",
    "Ask {person} about it.",
    "It rained all day, and nobody came.",
    "{person} and {person} flew to {place} last May.",
]


def _marked(data: Path, train: int, test: int) -> tuple[Rows, Rows]:
    """Names and places in templates, from a fixed seed."""
    draw = random.Random(0)
    rows = []
    for _ in range(train + test):
        text, spans, rest = "", [], draw.choice(TEMPLATES)
        while "{" in rest:
            before, _, rest = rest.partition("{")
            kind, _, rest = rest.partition("}")
            text += before
            name = draw.choice(PEOPLE if kind == "person" else PLACES)
            spans.append({"start": len(text), "end": len(text) + len(name), "label": kind})
            text += name
        rows.append({"text": text + rest, "spans": spans})
    return rows[:train], rows[train:]


def label_metrics(rows: Rows, results: Results) -> dict[str, float]:
    """Accuracy, macro F1, Matthews and mean loss of single labels."""
    expected = [row["label"] for row in rows]
    predicted = [result["label"] for result in results]
    losses = [-math.log(result["probabilities"][label]) for result, label in zip(results, expected, strict=True)]
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=math.nan)),
        "matthews": float(matthews_corrcoef(expected, predicted)),
        "loss": sum(losses) / len(losses),
    }


def set_metrics(rows: Rows, results: Results) -> dict[str, float]:
    """Micro and macro F1, and the part of rows whose labels are all right."""
    labels = list(results[0]["probabilities"])
    expected = np.array([[label in row["label"] for label in labels] for row in rows])
    predicted = np.array([[label in result["labels"] for label in labels] for result in results])
    return label_set_metrics(expected, predicted)


def number_metrics(rows: Rows, results: Results) -> dict[str, float]:
    """Pearson, Spearman and the mean squared error."""
    return regression_metrics([float(row["label"]) for row in rows], [result["score"] for result in results])


def spans_metrics(rows: Rows, results: Results) -> dict[str, float]:
    """Precision, recall and F1 of whole spans."""

    def spans(items: Sequence[dict[str, Any]], text: str) -> list[Span]:
        return [Span(s["start"], s["end"], s["label"], 1.0, text[s["start"] : s["end"]]) for s in items]

    for row, result in zip(rows, results, strict=True):
        assert all(span["text"] == row["text"][span["start"] : span["end"]] for span in result["spans"])
    expected = [spans(row["spans"], row["text"]) for row in rows]
    predicted = [spans(result["spans"], row["text"]) for row, result in zip(rows, results, strict=True)]
    return span_metrics(expected, predicted)


def passage_metrics(rows: Rows, results: Results) -> dict[str, float]:
    """Mean loss of a token of the completions, and perplexity."""
    loss = sum(result["nats"] for result in results) / sum(result["tokens"] for result in results)
    return {"loss": loss, "perplexity": math.exp(loss)}


CASES = [
    Case(
        "classify (SST-2)",
        {"task": "classify", "text_column": "sentence"},
        _sst2,
        label_metrics,
        ("accuracy", "macro_f1", "matthews"),
    ),
    Case(
        "classify --multi-label (HWU64, scenario and action)",
        {"task": "classify", "multi_label": True},
        _hwu64,
        set_metrics,
        ("micro_f1", "macro_f1", "subset_accuracy"),
    ),
    Case(
        "regress (STS-B, pairs)",
        {"task": "regress", "text_column": "sentence1", "text_pair_column": "sentence2"},
        _stsb,
        number_metrics,
        (),
    ),
    Case(
        "token-classify (generated names and places)",
        {"task": "token-classify"},
        _marked,
        spans_metrics,
        ("precision", "recall", "f1"),
    ),
    Case("generate (E2E)", {"task": "generate", "max_length": 256}, _e2e, passage_metrics, (), decoder=True),
]


def prepare(case: Case, data: Path, folder: Path, train: int, test: int) -> tuple[TrainSettings, Rows]:
    """Write the rows of a case into a folder; the settings of its run, without base and store, and its test rows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = case.load(data, train, test)
    paths = []
    for name, rows in zip(("train", "test"), parts, strict=True):
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"train": paths[0], "test": paths[1], "name": f"acme/{folder.name}", "base": "x", "store": folder}
    options |= {"max_length": 128}
    return TrainSettings.model_validate(options | case.options), parts[1]


def inputs_of(case: Case, rows: Rows) -> list[Any]:
    """What `/v1/classify` takes for the rows."""
    text, pair = (case.options.get(f"text{kind}_column", default) for kind, default in (("", "text"), ("_pair", None)))
    if pair is None:
        return [row[text] for row in rows]
    return [{"text": row[text], "text_pair": row[pair]} for row in rows]


def ask(client: httpx.Client, name: str, case: Case, rows: Rows, base: FrozenBase) -> list[dict[str, Any]]:
    """The server's results for the rows, in their order."""
    if case.options["task"] == "generate":
        return [_completion(client, name, row, base) for row in rows]
    found: list[dict[str, Any]] = []
    inputs = inputs_of(case, rows)
    for start in range(0, len(inputs), REQUEST):
        answer = client.post("/v1/classify", json={"adapter": name, "inputs": inputs[start : start + REQUEST]})
        answer.raise_for_status()
        found += answer.json()["results"]
    return found


def _completion(client: httpx.Client, name: str, row: dict[str, Any], base: FrozenBase) -> dict[str, Any]:
    """The log-likelihood of a completion, from the log-probabilities of the tokens of a prompt."""
    tokenizer: Any = base.tokenizer
    prompt = tokenizer(row["prompt"])["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
    body = {"adapter": name, "token_ids": prompt + completion, "max_new_tokens": 1, "prompt_logprobs": 0}
    answer = client.post("/v1/generate", json=body)
    answer.raise_for_status()
    scored = answer.json()["prompt_logprobs"][-len(completion) :]
    return {"nats": -sum(token["logprob"] for token in scored), "tokens": len(completion)}


def differences(trained: dict[str, float], served: dict[str, float]) -> dict[str, float]:
    """How far each metric of the answers is from the trainer's."""
    return {name: abs(served[name] - trained[f"test_{name}"]) for name in served}


def are_equal(case: Case, distances: dict[str, float]) -> bool:
    """Whether counts are equal, and the other metrics are in the decimals that the trainer prints."""
    return all(distance == 0 if name in case.exact else distance < TOLERANCE for name, distance in distances.items())


def main(
    data: Annotated[Path, typer.Option(help="Folder of real data.", exists=True, file_okay=False)] = Path(
        "../shared/data"
    ),
    encoder: Annotated[Path | None, typer.Option(help="Folder of an encoder; MiniLM by default.")] = None,
    rows: Annotated[int, typer.Option(help="Training rows of each task.")] = 2000,
    test_rows: Annotated[int, typer.Option(help="Most test rows of each task.")] = 1379,
    epochs: Annotated[int, typer.Option()] = 3,
    quick: Annotated[bool, typer.Option(help="64 rows, one epoch.")] = False,
) -> None:
    """Train, serve, compare."""
    if quick:
        rows, test_rows, epochs = 64, 64, 1
    console = Console(stderr=True)
    table = Table("task", "base", "test rows", "metric", "trained", "served", "difference")
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for base_name, is_decoder in ((str(encoder or minilm()), False), (EMBEDDED, True)):
            base = load_base(base_name)
            store = folder / ("decoder" if is_decoder else "encoder")
            trained = []
            for number, case in enumerate(CASES):
                if case.decoder != is_decoder:
                    continue
                # A generation of a token takes as long as a hundred rows of a pass.
                most = min(test_rows, 200) if is_decoder else test_rows
                settings, test = prepare(case, data, folder / f"task{number}", rows, most)
                update = {"base": base_name, "store": store, "epochs": epochs, "rank": 8}
                result = train_adapter(settings.model_copy(update=update), base=base, console=console)
                trained.append((case, settings.name, result.metrics, test))
            with ServerProcess(Path(base_name), store, folder / "log.txt", pool_mib=64, kv_cache_tokens=4096) as server:
                server.wait_until_ready()
                with httpx.Client(base_url=server.url, timeout=120) as client:
                    for case, name, metrics, test in trained:
                        served = case.metrics(test, ask(client, name, case, test, base))
                        distances = differences(metrics, served)
                        for metric, value in served.items():
                            shown = f"{metrics[f'test_{metric}']:.6f}", f"{value:.6f}", f"{distances[metric]:.1e}"
                            table.add_row(case.name, base.name, str(len(test)), metric, *shown)
                        found.append(
                            {"task": case.name, "base": base.name, "test_rows": len(test), "served": served}
                            | {"differences": distances, "equal": are_equal(case, distances)}
                        )
    console.print(table)
    tell("served_tasks", found, correct=all(row["equal"] for row in found), is_check=True)


if __name__ == "__main__":
    typer.run(main)
