"""Rows of task classify: a text and a label each, checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sera_serve.trainer.holdout import draw, hold_out
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.table import InvalidData, Problems, Row, Table, read_table

_LEAST_ROWS = 4
_LONGEST_LABEL = 512


@dataclass(frozen=True)
class LabelledText:
    """One checked row."""

    text: str
    label: str
    row: Row


@dataclass(frozen=True)
class ClassifyData:
    """Checked rows by use; `labels` are those of the training file, sorted.

    `digests` has the sha256 of each file read, by use.
    """

    labels: list[str]
    train: list[LabelledText]
    eval: list[LabelledText]
    test: list[LabelledText]
    digests: dict[str, str]


def load_classify_data(settings: TrainSettings) -> ClassifyData:
    """Read and check the files of `settings`.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    table = read_table(settings.train)
    rows = _checked(table, settings)
    labels = sorted({row.label for row in rows})
    _check_labels(settings.train, rows, labels)
    digests = {"train": table.digest}
    others: dict[str, list[LabelledText]] = {"eval": [], "test": []}
    for use, path in (("eval", settings.eval), ("test", settings.test)):
        if path is not None:
            other = read_table(path)
            others[use] = _checked(other, settings)
            _check_known(path, others[use], labels)
            digests[use] = other.digest
    train = draw(rows, settings.train_limit, settings.seed)
    if settings.eval is None and settings.eval_fraction:
        train, others["eval"] = hold_out(
            train, settings.eval_fraction, settings.seed, key=lambda r: r.text, stratum=lambda r: r.label
        )
    return ClassifyData(labels, train, others["eval"], others["test"], digests)


def _checked(table: Table, settings: TrainSettings) -> list[LabelledText]:
    table.require(settings.text_column, "--text-column")
    table.require(settings.label_column, "--label-column")
    pair = settings.text_pair_column
    if pair is not None:
        table.require(pair, "--text-pair-column")
    problems, checked = Problems(table.path), []
    for row in table.rows:
        texts = [_text(row, column, problems) for column in (settings.text_column, pair) if column is not None]
        label = _label(row, settings.label_column, problems)
        checked.append(LabelledText("\n".join(texts), label, row))
    problems.raise_if_any()
    return checked


def _text(row: Row, column: str, problems: Problems) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{type(value).__name__} {value!r}, not text"
        problems.add(row, f"{column} is {kind}; write a string or delete the row")
        return ""
    if not value.strip():
        problems.add(row, f"{column} is empty; fill it in or delete the row")
    return value


def _label(row: Row, column: str, problems: Problems) -> str:
    value = row.values.get(column)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{type(value).__name__} {value!r}"
        problems.add(row, f"{column} is {kind}; a label is a name or a whole number")
        return ""
    label = value.strip()
    if not label:
        problems.add(row, f"{column} is empty; fill it in or delete the row")
    elif len(label) > _LONGEST_LABEL:
        problems.add(row, f"{column} has {len(label)} characters, at most {_LONGEST_LABEL} are allowed; is it a text?")
    return label


def _check_labels(path: Path, rows: list[LabelledText], labels: list[str]) -> None:
    if len(rows) < _LEAST_ROWS:
        raise InvalidData(f"{path} has {len(rows)} rows; at least {_LEAST_ROWS} are needed", param="train")
    if len(labels) == 1:
        raise InvalidData(
            f"{path}: every row has the label {labels[0]!r}; add rows of another label, or check --label-column",
            param="label_column",
        )
    if len(labels) > len(rows) // 2:
        raise InvalidData(
            f"{path} has {len(labels)} different labels in {len(rows)} rows; labels must repeat: check --label-column, "
            "or put numbers into ranges",
            param="label_column",
        )


def _check_known(path: Path, rows: list[LabelledText], labels: list[str]) -> None:
    problems, known = Problems(path), set(labels)
    shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    for item in rows:
        if item.label not in known:
            problems.add(
                item.row,
                f"label {item.label!r} is not in the training data, which has {shown}; "
                "correct it, delete the row, or add training rows of that label",
            )
    problems.raise_if_any()
