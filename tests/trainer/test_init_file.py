"""`train_adapter init`: the file that it writes is read back to equal settings; and the table of options."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic_core import to_jsonable_python

from sera_serve.commands.settings_table import options_document
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.cli import main
from sera_serve.trainer.init_file import settings_yaml
from sera_serve.trainer.settings import TrainSettings, load_options
from sera_serve.trainer.task_options import TASK_OPTIONS, Task

TASKS: tuple[Task, ...] = get_args(Task)
EXAMPLES = {"base": "embedded", "store": "store", "name": "acme/first", "train": "train.csv"}
GIVEN: dict[str, Any] = {
    "name": "acme/other",
    "description": "colons: and 'quotes' #1",
    "target_modules": "q_proj,v_proj",
    "train_factors": "c,b",
    "rank": 8,
    "split": 4,
    "learning_rate": 1e-5,
    "resume": False,
    "work_dir": Path("a folder"),
}


def read(tmp_path: Path, text: str) -> TrainSettings:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_options(path, {})


@pytest.mark.parametrize("task", TASKS)
def test_the_file_reads_back_to_equal_settings(tmp_path: Path, task: Task) -> None:
    plain = read(tmp_path, settings_yaml(task, {}))
    expected = load_options(None, {**EXAMPLES, "task": task})
    assert plain == expected
    assert plain.model_fields_set == expected.model_fields_set
    given = read(tmp_path, settings_yaml(task, {**GIVEN, "rank": 8}))
    expected = load_options(None, {**EXAMPLES, **GIVEN, "task": task})
    assert given == expected
    assert given.model_fields_set == expected.model_fields_set


@pytest.mark.parametrize("task", TASKS)
def test_the_file_teaches_every_option_of_its_task(tmp_path: Path, task: Task) -> None:
    text = settings_yaml(task, {})
    names = re.findall(r"^(?:# )?([a-z_]+):(?: |$)", text, re.MULTILINE)
    foreign = {name for other in TASK_OPTIONS.values() for name in other} - set(TASK_OPTIONS[task])
    fields = TrainSettings.model_fields
    for name in fields:
        assert (name in names) == (name not in foreign), name
    # All defaults, made lines of their own, are what a run without the option has.
    plain = load_options(None, {**EXAMPLES, "task": task})
    opened = re.sub(rf"^# ({'|'.join(fields)}): ", r"\1: ", text, flags=re.MULTILINE)
    values = yaml.safe_load(opened)
    for name, value in values.items():
        if name not in EXAMPLES and name != "task":
            default = to_jsonable_python(getattr(plain, name))
            assert value == default or str(value) == str(default), name
    words = " ".join(line.removeprefix("# ") for line in text.splitlines())
    assert str(fields["eval_fraction"].description) in words
    assert max(map(len, text.splitlines())) <= 120


def test_impossible_values_are_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="split 3 does not divide rank 8"):
        settings_yaml("classify", {"rank": 8, "split": 3})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train_adapter", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "tom's run.yaml"
    assert run(monkeypatch, "init", str(path), "--task", "classify", "--rank", "4", "--name", "acme/a") == 0
    assert capsys.readouterr().out.endswith(f"train with: {shlex.join(['train_adapter', '--config', str(path)])}\n")
    settings = load_options(path, {})
    assert (settings.rank, settings.name, settings.task) == (4, "acme/a", "classify")
    assert run(monkeypatch, "init", str(path), "--task", "classify") == 2
    assert "exists; name another file" in capsys.readouterr().err
    assert run(monkeypatch, "init", "-", "--task", "generate") == 0
    assert yaml.safe_load(capsys.readouterr().out) == {**EXAMPLES, "task": "generate"}
    assert run(monkeypatch, "init", str(tmp_path / "no" / "run.yaml"), "--task", "classify") == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
    assert run(monkeypatch, "--rank", "4", "init", str(tmp_path / "x"), "--task", "classify") == 2
    assert "put the options of init after it" in capsys.readouterr().err
    assert run(monkeypatch, "init", str(tmp_path / "x"), "--task", "classify", "--messages-column", "m") == 2
    assert "--messages-column is for task generate" in capsys.readouterr().err


def test_the_table_of_options_is_the_one_that_the_code_makes() -> None:
    written = Path(__file__).parents[2] / "docs" / "training" / "options.md"
    assert written.read_text(encoding="utf-8") == options_document(), "run `make settings`"
