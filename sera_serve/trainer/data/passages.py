"""Rows of the task generate: the formats that people keep them in, and one passage for each row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from adapters_store import MAX_CHAT_TEMPLATE_BYTES, AdapterConfig
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.labelled import Examples, read_uses
from sera_serve.trainer.data.splits import draw, hold_out_for
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tables.faults import InvalidData, Problems, Row
from sera_serve.trainer.tables.fields import messages_of, string_of
from sera_serve.trainer.tables.table import Table

# The prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py), with which its many copies were trained.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_ALONE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA = ("instruction", "input", "output")
_SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Passage:
    """One checked row of task generate: `completion` after an optional `prompt`, or chat `messages`.

    Attributes:
        row: Where the row is, for messages.
        completion: The text to learn.
        prompt: The text before it, or None.
        messages: The turns of a chat; then there are no other texts.
        question: What a user asks where the row becomes a chat; None takes the prompt.
    """

    row: Row
    completion: str = ""
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] = ()
    question: str | None = None

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
        question = self.prompt if self.question is None else self.question
        turns = {"role": "user", "content": question}, {"role": "assistant", "content": self.completion}
        return Passage(self.row, messages=turns)


def checked_passages(table: Table, settings: TrainSettings) -> list[Passage]:
    """Make a passage of each row, by the format or the columns of `settings`.

    Raises:
        InvalidData: A column is missing, or some rows cannot be learned from.
    """
    problems = Problems(table.path)
    _require(table, settings)
    if settings.format == "alpaca":
        passages = [_alpaca(row, "input" in table.columns, problems) for row in table.rows]
    elif (column := settings.chat_column) is not None:
        with_system = settings.format == "sharegpt" and _SYSTEM in table.columns
        passages = [_chat(row, column, with_system, problems) for row in table.rows]
    else:
        prompt, completion = settings.columns
        assert completion is not None
        passages = [_completion(row, prompt, completion, problems) for row in table.rows]
    problems.raise_if_any()
    return passages


def _require(table: Table, settings: TrainSettings) -> None:
    prompt, completion = settings.columns
    needed = {"messages_column": settings.chat_column, "prompt_column": prompt, "completion_column": completion}
    if settings.format == "alpaca":
        for column in ("instruction", "output"):
            if column not in table.columns:
                raise InvalidData(
                    f"{table.path} has no column {column!r}, which the format alpaca needs; it has "
                    f"{', '.join(table.columns) or 'none'}{_other_format(table)}",
                    param="format",
                )
        return
    for option, wanted in needed.items():
        if wanted is None or wanted in table.columns:
            continue
        if hint := _other_format(table):
            raise InvalidData(
                f"{table.path} has no column {wanted!r}; it has {', '.join(table.columns)}{hint}", param="format"
            )
        table.require(wanted, option)


def _other_format(table: Table) -> str:
    """The option for what a table's columns look like."""
    columns = set(table.columns)
    if {"instruction", "output"} <= columns:
        return "; give --format alpaca"
    if "conversations" in columns:
        return "; give --format sharegpt"
    if "messages" in columns:
        return "; give --format chatml"
    if {"prompt", "completion"} <= columns:
        return "; give --format prompt-completion"
    if {"chosen", "rejected"} <= columns:
        return "; these are preference pairs, which no task learns: to learn the chosen answers, name that column"
    if columns == {"text"}:
        return "; give --format text"
    return ""


def _completion(row: Row, prompt: str | None, completion: str, problems: Problems) -> Passage:
    before = string_of(row, prompt, problems) if prompt is not None else None
    return Passage(row.place(), _learned(row, completion, problems), before)


def _learned(row: Row, column: str, problems: Problems) -> str:
    text = string_of(row, column, problems)
    if text is not None and not text.strip():
        problems.add(row, f"{column} is empty: there is nothing to learn; fill it in or delete the row")
    return text or ""


def _chat(row: Row, column: str, with_system: bool, problems: Problems) -> Passage:
    messages = messages_of(row, column, problems)
    if with_system and row.values.get(_SYSTEM) and (text := string_of(row, _SYSTEM, problems)):
        if messages and messages[0].get("role") == _SYSTEM:
            problems.add(row, f"{column} begins with a system turn, and {_SYSTEM} has another one; keep one of them")
        messages = ({"role": _SYSTEM, "content": text}, *messages)
    return Passage(row.place(), messages=messages)


def _alpaca(row: Row, has_inputs: bool, problems: Problems) -> Passage:
    """The row with Alpaca's prompt; as a chat, the user sends the instruction, an empty line, and the input."""
    instruction = string_of(row, _ALPACA[0], problems) or ""
    # Copies of the data set leave out the input, or have null in its place.
    given = has_inputs and row.values.get(_ALPACA[1]) is not None
    more = (string_of(row, _ALPACA[1], problems) or "") if given else ""
    output = _learned(row, _ALPACA[2], problems)
    if not instruction.strip() and isinstance(row.values.get(_ALPACA[0]), str):
        problems.add(row, f"{_ALPACA[0]} is empty; fill it in or delete the row")
    if more.strip():
        prompt = _ALPACA_WITH_INPUT.format(instruction=instruction, input=more)
        return Passage(row.place(), output, prompt, question=f"{instruction}\n\n{more}")
    return Passage(row.place(), output, _ALPACA_ALONE.format(instruction=instruction), question=instruction)


@dataclass(frozen=True, kw_only=True)
class GenerateData(Examples[Passage]):
    """Checked rows of task generate, by use; no labels.

    Attributes:
        chat_template: The template of the rows, all of which are chats then, or None.
        prefers_chat: Whether the rows become chats where the base has a template of its own.
    """

    chat_template: str | None = None
    prefers_chat: bool = False


def load_generate_data(settings: TrainSettings, initial: AdapterConfig | None = None) -> GenerateData:
    """Read and check the files of `settings`.

    Args:
        settings: Options of the run.
        initial: The adapter that the run goes on from: its chat template is kept.

    A single long text (a `.txt` file) has no rows to split. The last `eval_fraction` of its characters is held out,
    and at most half as much again, so that the cut is after a line or else a word.

    Raises:
        InvalidConfiguration: There are two templates.
        InvalidData: A file or some of its rows cannot be used.
    """
    template = initial.chat_template if initial is not None else None
    if template is not None and settings.chat_template is not None:
        raise InvalidConfiguration(
            f"--init-from keeps the chat template of {settings.init_from}; leave --chat-template out",
            param="chat_template",
        )
    rows, digests, notes = read_uses(settings, checked_passages)
    if settings.chat_template is not None:
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
            train, rows["eval"] = hold_out_for(settings, train, notes, key=lambda r: r.group, stratum=lambda r: "")
    prefers_chat = settings.format == "alpaca"
    return GenerateData(
        train, rows["eval"], rows["test"], digests, notes, chat_template=template, prefers_chat=prefers_chat
    )


def _check_chats(passages: list[Passage], settings: TrainSettings) -> None:
    if any(not passage.messages and passage.prompt is None for passage in passages):
        raise InvalidData(
            f"{settings.train} has texts without a prompt, and {settings.init_from} answers chats; give rows with "
            "messages, or a prompt and a completion"
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
    wanted = int(len(text) * (1 - fraction))
    # A newline far before the wanted place would take most of the text from training: a title may be the only line.
    nearest = wanted - int(len(text) * fraction / 2)
    cut = text.rfind("\n", nearest, wanted) + 1
    cut = cut or next((i + 1 for i in range(wanted - 1, nearest - 1, -1) if text[i].isspace()), wanted)
    parts = [Passage(passage.row, part) for part in (text[:cut], text[cut:])]
    if not all(part.completion.strip() for part in parts):
        raise InvalidData("the one text is too short to hold a part out; give --eval or --eval-fraction 0")
    return parts[:1], parts[1:]
