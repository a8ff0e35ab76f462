"""Formats by name: the tokens that carry loss, against masks made by hand, for training, evaluation and test rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_samples import settings_for, write_jsonl

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.passages import load_generate_data
from sera_serve.trainer.model import IGNORED
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import load_options
from sera_serve.trainer.tables.faults import InvalidData
from sera_serve.trainer.tasks import GenerateTask

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}|"
    "{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
ALPACA = (
    "below is an instruction that describes a task. "
    "write a response that appropriately completes the request.\n\n"
    "### instruction:\nadd\n\n### response:"
)
CHATML = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "no"},
    {"role": "assistant", "content": "ok"},
]
SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yo"},
    {"from": "Human", "value": "no"},
    {"from": "chatgpt", "value": "ok"},
]
# Of each format: a row, options, and the whole text with the learned parts in [ ]; "$" is the end-of-text token.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "prompt-completion": ({"prompt": "ab", "completion": "cd"}, {}, "ab[cd$]"),
    "prompt-completion as chat": ({"prompt": "ab", "completion": "cd"}, {"template": True}, "u: ab|a: [cd$|]"),
    "prompt-completion of other columns": (
        {"q": "ab", "r": "cd"},
        {"prompt_column": "q", "completion_column": "r"},
        "ab[cd$]",
    ),
    "text": ({"text": "abc"}, {}, "[abc$]"),
    "text of another column": ({"story": "abc"}, {"completion_column": "story"}, "[abc$]"),
    "chatml": ({"messages": CHATML}, {"template": True}, "s: be|u: hi|a: [yo$|]u: no|a: [ok$|]"),
    "chatml by the base's template": ({"messages": CHATML[1:3]}, {"base_template": True}, "u: hi|a: [yo$|]"),
    "chatml of another column": (
        {"chat": CHATML[1:3]},
        {"template": True, "messages_column": "chat"},
        "u: hi|a: [yo$|]",
    ),
    "sharegpt": ({"conversations": SHAREGPT}, {"template": True}, "u: hi|a: [yo$|]u: no|a: [ok$|]"),
    "sharegpt with a system column": (
        {"conversations": SHAREGPT[:2], "system": "be"},
        {"template": True},
        "s: be|u: hi|a: [yo$|]",
    ),
    "alpaca as chat": (
        {"instruction": "add", "input": "ab", "output": "cd"},
        {"template": True},
        "u: add\n\nab|a: [cd$|]",
    ),
    "alpaca by the base's template": (
        {"instruction": "add", "input": "", "output": "cd"},
        {"base_template": True},
        "u: add|a: [cd$|]",
    ),
}


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


def by_hand(base: FrozenBase, marked: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of a text with its learned parts in brackets, one token a character."""
    ids, labels, learned = [1], [IGNORED], False
    for character in marked:
        if character in "[]":
            learned = character == "["
            continue
        token = 2 if character == "$" else base.tokenizer.convert_tokens_to_ids(character)
        ids.append(token)
        labels.append(token if learned else IGNORED)
    return ids, labels


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_on_what_must_be_written(base: FrozenBase, tmp_path: Path, name: str) -> None:
    row, options, marked = CASES[name]
    options = {"format": name.split()[0], "task": "generate", **options}
    if options.pop("base_template", False):
        base.tokenizer.chat_template = TEMPLATE
    if options.pop("template", False):
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        options["chat_template"] = tmp_path / "chat.jinja"
    files = {use: write_jsonl(tmp_path / f"{use}.jsonl", [row]) for use in ("train", "eval", "test")}
    settings = settings_for(Path("tiny"), tmp_path, files["train"], eval=files["eval"], test=files["test"], **options)
    task = GenerateTask(base, load_generate_data(settings), max_length=64)
    ids, labels = by_hand(base, marked)
    for rows in (task.train_rows, task.eval_rows, task.test_rows):
        assert len(rows) == 1
        assert rows[0]["input_ids"] == ids
        assert rows[0]["labels"] == labels


def test_alpacas_prompt_is_the_known_one(base: FrozenBase, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "add", "input": None, "output": "cd"}])
    settings = settings_for(Path("tiny"), tmp_path, rows, task="generate", format="alpaca", eval_fraction=0)
    data = load_generate_data(settings)
    assert str(data.train[0].prompt).lower() == ALPACA
    task = GenerateTask(base, data, max_length=512)
    (row,) = task.train_rows
    prompt = base.tokenizer(str(data.train[0].prompt))["input_ids"]
    learned = base.tokenizer.convert_tokens_to_ids(["c", "d", "</s>"])
    assert row["input_ids"] == prompt + learned
    assert row["labels"] == [IGNORED] * len(prompt) + learned


def test_the_bundle_carries_the_template_of_a_format(base: FrozenBase, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"conversations": SHAREGPT}] * 8)
    options = {"task": "generate", "format": "sharegpt", "chat_template": tmp_path / "chat.jinja", "epochs": 1}
    result = train_adapter(settings_for(Path("tiny"), tmp_path, rows, **options), base=base)
    config = AdapterStore(tmp_path / "store").config(result.digest)
    assert config.chat_template == TEMPLATE
    assert config.training["settings"]["format"] == "sharegpt"


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"instruction": "a", "output": "b"}, {}, "has no column 'prompt'; it has instruction, output; give --format"),
        ({"conversations": SHAREGPT}, {}, "give --format sharegpt"),
        ({"messages": CHATML}, {"format": "sharegpt"}, "has no column 'conversations'; it has messages; give --format"),
        ({"prompt": "a", "completion": "b"}, {"format": "alpaca"}, "give --format prompt-completion"),
        ({"text": "a"}, {}, "give --format text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "preference pairs, which no task learns"),
        ({"instruction": "a", "input": 5, "output": "b"}, {"format": "alpaca"}, "row 1 (line 1): input is int 5"),
        ({"instruction": " ", "output": "b"}, {"format": "alpaca"}, "row 1 (line 1): instruction is empty"),
        ({"instruction": "a", "output": ""}, {"format": "alpaca"}, "output is empty: there is nothing to learn"),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            {"format": "sharegpt"},
            "conversations[0] has the role 'alien'; use one of system, user, assistant, tool",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 1}]},
            {"format": "chatml"},
            'messages[0] must have exactly the keys "role" and "content" (or "from" and "value"); \'weight\' is not',
        ),
    ],
)
def test_rows_that_are_no_rows_of_a_format(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [columns])
    with pytest.raises(InvalidData) as caught:
        load_generate_data(settings_for(Path("tiny"), tmp_path, rows, task="generate", **options))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "alpaca", "prompt_column": "p", "completion_column": "c"},
            "--prompt-column is not for --format alpaca",
        ),
        ({"format": "chatml", "completion_column": "c"}, "--completion-column is not for --format chatml"),
        (
            {"format": "prompt-completion", "completion_column": "c"},
            "needs both --prompt-column and --completion-column",
        ),
        ({"format": "text", "chat_template": "t.jinja"}, "which --format text has not"),
        ({"format": "csv"}, "--format 'csv': input should be 'alpaca'"),
        ({"task": "classify", "format": "alpaca"}, "--format is for task generate"),
        ({"task": "classify", "packing": True}, "--packing is for task generate"),
        ({"delimiter": ";;"}, "it must be one ASCII character"),
        ({"encoding": "klingon"}, "--encoding 'klingon': it is no encoding of text that Python knows"),
        ({"encoding": "hex"}, "it is no encoding of text that Python knows"),
        ({"encoding": "IDNA"}, "it is no encoding of text that Python knows"),
    ],
)
def test_options_of_formats_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    required = {"base": "tiny", "store": "store", "name": "a/b", "task": "generate", "train": "rows.csv"}
    with pytest.raises(InvalidConfiguration) as caught:
        load_options(None, required | options)
    assert message in caught.value.message
    assert load_options(None, required | {"delimiter": "tab", "encoding": "utf-16"}).delimiter == "\t"
