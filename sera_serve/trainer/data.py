"""Training data of both tasks: rows read from files, checked before training, and split for evaluation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from adapters_store import MAX_CHAT_TEMPLATE_BYTES
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.table import InvalidData, Problems, Row, Table, read_table

_LEAST_ROWS = 4
_LONGEST_LABEL = 512
_ROLES = ("system", "user", "assistant", "tool")

T = TypeVar("T")


@dataclass(frozen=True)
class LabelledText:
    """One checked row of task classify."""

    text: str
    label: str
    row: Row


@dataclass(frozen=True)
class ClassifyData:
    """Checked rows of task classify, by use.

    Attributes:
        labels: The labels of the training file, sorted.
        digests: sha256 of each file, by use.
    """

    labels: list[str]
    train: list[LabelledText]
    eval: list[LabelledText]
    test: list[LabelledText]
    digests: dict[str, str]


def load_classify_data(settings: TrainSettings, labels: list[str] | None = None) -> ClassifyData:
    """Read and check the files of `settings`.

    Args:
        settings: Options of the run.
        labels: The labels of the adapter that the run goes on from, which it keeps; None takes those of the rows.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    table = read_table(settings.train)
    rows = _checked_texts(table, settings)
    if labels is None:
        labels = sorted({row.label for row in rows})
        _check_labels(settings.train, rows, labels)
    else:
        _check_count(settings.train, rows)
        _check_known(settings.train, rows, labels, f"a label of {settings.init_from}")
    digests = {"train": table.digest}
    others: dict[str, list[LabelledText]] = {"eval": [], "test": []}
    for use, path in (("eval", settings.eval), ("test", settings.test)):
        if path is not None:
            other = read_table(path)
            others[use] = _checked_texts(other, settings)
            _check_known(path, others[use], labels)
            digests[use] = other.digest
    train = draw(rows, settings.train_limit, settings.seed)
    if settings.eval is None and settings.eval_fraction:
        train, others["eval"] = hold_out(
            train, settings.eval_fraction, settings.seed, key=lambda r: r.text, stratum=lambda r: r.label
        )
    return ClassifyData(labels, train, others["eval"], others["test"], digests)


def _checked_texts(table: Table, settings: TrainSettings) -> list[LabelledText]:
    table.require(settings.text_column, "--text-column")
    table.require(settings.label_column, "--label-column")
    pair = settings.text_pair_column
    if pair is not None:
        table.require(pair, "--text-pair-column")
    problems, checked = Problems(table.path), []
    for row in table.rows:
        texts = [text_of(row, column, problems) for column in (settings.text_column, pair) if column is not None]
        label = label_of(row, settings.label_column, problems)
        checked.append(LabelledText("\n".join(texts), label, row))
    problems.raise_if_any()
    return checked


def text_of(row: Row, column: str, problems: Problems) -> str:
    """Return the text of a column. A text that is missing, no string or blank is added to `problems`."""
    value = row.values.get(column)
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{type(value).__name__} {value!r}, not text"
        problems.add(row, f"{column} is {kind}; write a string or delete the row")
        return ""
    if not value.strip():
        problems.add(row, f"{column} is empty; fill it in or delete the row")
    return value


def label_of(row: Row, column: str, problems: Problems) -> str:
    """Return the label of a column as text. A value that is no label is added to `problems`."""
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


def _check_count(path: Path, rows: list[LabelledText]) -> None:
    if len(rows) < _LEAST_ROWS:
        raise InvalidData(f"{path} has {len(rows)} rows; at least {_LEAST_ROWS} are needed", param="train")


def _check_labels(path: Path, rows: list[LabelledText], labels: list[str]) -> None:
    _check_count(path, rows)
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


def _check_known(path: Path, rows: list[LabelledText], labels: list[str], kept: str | None = None) -> None:
    problems, known = Problems(path), set(labels)
    shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
    for item in rows:
        if item.label not in known:
            if kept is not None:
                fault = f"is not {kept}, which has {shown}; correct it, delete the row, or train a new adapter"
            else:
                fault = f"is not in the training data, which has {shown}; "
                fault += "correct it, delete the row, or add training rows of that label"
            problems.add(item.row, f"label {item.label!r} {fault}")
    problems.raise_if_any()


@dataclass(frozen=True)
class Passage:
    """One checked row of task generate: `completion` after an optional `prompt`, or chat `messages`."""

    row: Row
    completion: str = ""
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] = ()

    @property
    def group(self) -> str:
        """Key of the row's group. A held-out split keeps the rows of a group on one side."""
        if self.messages:
            return repr(self.messages[:-1])
        return self.completion if self.prompt is None else self.prompt

    def as_chat(self) -> Passage:
        """The row as messages: the prompt as the user's, the completion as the assistant's."""
        if self.messages:
            return self
        assert self.prompt is not None
        turns = {"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion}
        return Passage(self.row, messages=turns)


@dataclass(frozen=True)
class GenerateData:
    """Checked rows of task generate, by use.

    Attributes:
        train: What is learned.
        eval: What chooses the epoch.
        test: What is scored at the end.
        digests: The sha256 of each file, by use.
        chat_template: The template of the rows, all of which are chats then, or None.
    """

    train: list[Passage]
    eval: list[Passage]
    test: list[Passage]
    digests: dict[str, str]
    chat_template: str | None = None


def load_generate_data(settings: TrainSettings, template: str | None = None) -> GenerateData:
    """Read and check the files of `settings`.

    Args:
        settings: Options of the run.
        template: The chat template of the adapter that the run goes on from, which it keeps, or None.

    A single long text (a `.txt` file) has no rows to split. The last `eval_fraction` of its characters is held out.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    uses = {"train": settings.train, "eval": settings.eval, "test": settings.test}
    rows: dict[str, list[Passage]] = {use: [] for use in uses}
    digests = {}
    for use, path in uses.items():
        if path is not None:
            table = read_table(path)
            rows[use] = _checked_passages(table, settings)
            digests[use] = table.digest
    if template is None and settings.chat_template is not None:
        template = _read_template(settings.chat_template)
    if template is not None:
        _check_chats(rows["train"], settings)
        digests["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        rows = {use: [passage.as_chat() for passage in passages] for use, passages in rows.items()}
    train = draw(rows["train"], settings.train_limit, settings.seed)
    if settings.eval is None and settings.eval_fraction:
        if len(train) == 1 and not train[0].messages and train[0].prompt is None:
            train, rows["eval"] = _cut_text(train[0], settings.eval_fraction)
        else:
            train, rows["eval"] = hold_out(
                train, settings.eval_fraction, settings.seed, key=lambda r: r.group, stratum=lambda r: ""
            )
    return GenerateData(train, rows["eval"], rows["test"], digests, template)


def _check_chats(passages: list[Passage], settings: TrainSettings) -> None:
    if any(not passage.messages and passage.prompt is None for passage in passages):
        raise InvalidData(
            f"{settings.train} has texts without a prompt, and {settings.init_from} answers chats; give rows with "
            "messages, or a prompt and a completion",
            param="train",
        )


def _read_template(path: Path) -> str:
    """Read a chat template: UTF-8, not empty, and as long as a bundle may have it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CHAT_TEMPLATE_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror}; check the path", param="chat_template") from error
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} is not UTF-8; save the chat template as UTF-8", param="chat_template") from error
    if not text.strip() or len(data) > MAX_CHAT_TEMPLATE_BYTES:
        raise InvalidData(
            f"{path} must have a chat template of 1 to {MAX_CHAT_TEMPLATE_BYTES} bytes", param="chat_template"
        )
    return text


def _cut_text(passage: Passage, fraction: float) -> tuple[list[Passage], list[Passage]]:
    text = passage.completion
    cut = text.rfind("\n", 0, int(len(text) * (1 - fraction))) + 1 or int(len(text) * (1 - fraction))
    parts = [Passage(passage.row, part) for part in (text[:cut], text[cut:])]
    if not all(part.completion.strip() for part in parts):
        raise InvalidData("the one text is too short to hold a part out; give --eval or --eval-fraction 0")
    return parts[:1], parts[1:]


def _checked_passages(table: Table, settings: TrainSettings) -> list[Passage]:
    problems, checked = Problems(table.path), []
    if settings.messages_column is not None:
        table.require(settings.messages_column, "--messages-column")
        for row in table.rows:
            messages = messages_of(row, settings.messages_column, problems)
            checked.append(Passage(row, messages=messages))
    else:
        prompt, completion = settings.columns
        assert completion is not None
        if prompt is not None:
            table.require(prompt, "--prompt-column")
        table.require(completion, "--completion-column")
        for row in table.rows:
            before = string_of(row, prompt, problems) if prompt is not None else None
            text = string_of(row, completion, problems)
            if text is not None and not text.strip():
                problems.add(row, f"{completion} is empty: there is nothing to learn; fill it in or delete the row")
            checked.append(Passage(row, text or "", before))
    problems.raise_if_any()
    return checked


def string_of(row: Row, column: str, problems: Problems) -> str | None:
    """Return the string of a column, which may be empty. Anything else is added to `problems`."""
    value = row.values.get(column)
    if isinstance(value, str):
        return value
    kind = "missing" if value is None else f"{type(value).__name__} {value!r}, not text"
    problems.add(row, f"{column} is {kind}; write a string or delete the row")
    return None


def messages_of(row: Row, column: str, problems: Problems) -> tuple[dict[str, str], ...]:
    """Return the turns of a column. A chat that cannot be learned from is added to `problems`."""
    value = row.values.get(column)
    if not isinstance(value, list) or not value:
        problems.add(row, f'{column} must be a list such as [{{"role": "user", "content": "..."}}, ...]')
        return ()
    messages = [_message(row, f"{column}[{i}]", turn, problems) for i, turn in enumerate(value)]
    if not any(message.get("role") == "assistant" for message in messages):
        problems.add(
            row, f"{column} has no turn of the assistant, so there is nothing to learn; add one or delete the row"
        )
    return tuple(messages)


def _message(row: Row, where: str, turn: Any, problems: Problems) -> dict[str, str]:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        problems.add(row, f'{where} must have exactly the keys "role" and "content"')
        return {}
    if turn["role"] not in _ROLES:
        problems.add(row, f"{where} has the role {turn['role']!r}; use one of {', '.join(_ROLES)}")
    if not isinstance(turn["content"], str) or not turn["content"].strip():
        problems.add(row, f"{where} has no text as its content; fill it in or delete the turn")
    return turn


def draw(rows: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """Draw at most `limit` rows without replacement, and keep their order."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(f"limit {seed}").sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]


def hold_out(
    rows: Sequence[T], fraction: float, seed: int, *, key: Callable[[T], str], stratum: Callable[[T], str]
) -> tuple[list[T], list[T]]:
    """Split rows into (kept, held out), each in the file's order.

    Rows of equal `key` stay on one side; otherwise a prompt with several completions could be on both sides. About
    `fraction` of each stratum is held out, and at least one group of it is kept.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    strata: dict[str, list[list[int]]] = {}
    for members in groups.values():
        strata.setdefault(stratum(rows[members[0]]), []).append(members)
    shuffle = random.Random(f"hold out {seed}")
    held: set[int] = set()
    owed = 0.0
    for name in sorted(strata):
        candidates = strata[name]
        shuffle.shuffle(candidates)
        # The rounding error of a stratum is carried to the next stratum, so that the total is right.
        owed += fraction * len(candidates)
        count = min(round(owed), len(candidates) - 1)
        owed -= count
        held.update(i for members in candidates[:count] for i in members)
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
