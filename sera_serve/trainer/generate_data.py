"""Rows of task generate: prompt and completion, plain text, or chat turns, checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sera_serve.trainer.holdout import draw, hold_out
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.table import InvalidData, Problems, Row, Table, read_table

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Passage:
    """One checked row: either `completion` after an optional `prompt`, or chat `messages`."""

    row: Row
    completion: str = ""
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] = ()

    @property
    def group(self) -> str:
        """Rows of one group must not be on both sides of a held-out split."""
        if self.messages:
            return repr(self.messages[:-1])
        return self.completion if self.prompt is None else self.prompt


@dataclass(frozen=True)
class GenerateData:
    """Checked rows by use; `digests` has the sha256 of each file read, by use."""

    train: list[Passage]
    eval: list[Passage]
    test: list[Passage]
    digests: dict[str, str]


def load_generate_data(settings: TrainSettings) -> GenerateData:
    """Read and check the files of `settings`.

    A single long text (a `.txt` file) cannot be split by rows: its last `eval_fraction` of characters is held out.

    Raises:
        InvalidData: A file or some of its rows cannot be used.
    """
    uses = {"train": settings.train, "eval": settings.eval, "test": settings.test}
    rows: dict[str, list[Passage]] = {use: [] for use in uses}
    digests = {}
    for use, path in uses.items():
        if path is not None:
            table = read_table(path)
            rows[use] = _checked(table, settings)
            digests[use] = table.digest
    train = draw(rows["train"], settings.train_limit, settings.seed)
    if settings.eval is None and settings.eval_fraction:
        if len(train) == 1 and not train[0].messages and train[0].prompt is None:
            train, rows["eval"] = _cut_text(train[0], settings.eval_fraction)
        else:
            train, rows["eval"] = hold_out(
                train, settings.eval_fraction, settings.seed, key=lambda r: r.group, stratum=lambda r: ""
            )
    return GenerateData(train, rows["eval"], rows["test"], digests)


def _cut_text(passage: Passage, fraction: float) -> tuple[list[Passage], list[Passage]]:
    text = passage.completion
    cut = text.rfind("\n", 0, int(len(text) * (1 - fraction))) + 1 or int(len(text) * (1 - fraction))
    parts = [Passage(passage.row, part) for part in (text[:cut], text[cut:])]
    if not all(part.completion.strip() for part in parts):
        raise InvalidData("the one text is too short to hold a part out; give --eval or --eval-fraction 0")
    return parts[:1], parts[1:]


def _checked(table: Table, settings: TrainSettings) -> list[Passage]:
    problems, checked = Problems(table.path), []
    if settings.messages_column is not None:
        table.require(settings.messages_column, "--messages-column")
        for row in table.rows:
            messages = _messages(row, settings.messages_column, problems)
            checked.append(Passage(row, messages=messages))
    else:
        prompt, completion = settings.columns
        assert completion is not None
        if prompt is not None:
            table.require(prompt, "--prompt-column")
        table.require(completion, "--completion-column")
        for row in table.rows:
            before = _string(row, prompt, problems) if prompt is not None else None
            text = _string(row, completion, problems)
            if text is not None and not text.strip():
                problems.add(row, f"{completion} is empty: there is nothing to learn; fill it in or delete the row")
            checked.append(Passage(row, text or "", before))
    problems.raise_if_any()
    return checked


def _string(row: Row, column: str, problems: Problems) -> str | None:
    value = row.values.get(column)
    if isinstance(value, str):
        return value
    kind = "missing" if value is None else f"{type(value).__name__} {value!r}, not text"
    problems.add(row, f"{column} is {kind}; write a string or delete the row")
    return None


def _messages(row: Row, column: str, problems: Problems) -> tuple[dict[str, str], ...]:
    value = row.values.get(column)
    if not isinstance(value, list) or not value:
        problems.add(row, f'{column} must be a list such as [{{"role": "user", "content": "..."}}, ...]')
        return ()
    messages = [_message(row, f"{column}[{i}]", turn, problems) for i, turn in enumerate(value)]
    if not any(message.get("role") == "assistant" for message in messages):
        problems.add(row, f"{column} has no turn of the assistant, so nothing to learn; add one or delete the row")
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
