"""The command as a user runs it: its JSON line, its summary, its errors and exit codes."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_samples import ending_rule, write_csv, write_jsonl

from adapters_store import AdapterStore
from sera_serve.trainer import packages
from sera_serve.trainer.cli import main
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.settings import TrainSettings


@pytest.fixture
def command(tiny_base: Path, tmp_path: Path) -> dict[str, str]:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(40))
    return {
        "--base": str(tiny_base),
        "--store": str(tmp_path / "store"),
        "--name": "acme/tiny",
        "--task": "classify",
        "--train": str(rows),
        "--text-column": "text",
        "--label-column": "label",
        "--rank": "4",
        "--epochs": "1",
    }


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train_adapter", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def flat(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


def test_json_is_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: dict[str, str]
) -> None:
    assert run(monkeypatch, *flat(command), "--json") == 0
    out = capsys.readouterr().out
    (line,) = out.splitlines()
    result: dict[str, Any] = json.loads(line)
    assert (result["adapter"], result["version"], result["store"]) == ("acme/tiny", 1, command["--store"])
    assert result["parameters"] > 0 and result["head_parameters"] == 66
    assert set(result["metrics"]) == {"loss", "accuracy", "macro_f1", "matthews"}
    assert result["train_seconds"] > 0
    assert AdapterStore(Path(command["--store"])).resolve("acme/tiny").digest == result["digest"]


def test_a_missing_package_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: dict[str, str]
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda module: None)
    for arguments in (flat(command), ["--jobs", "plan.yaml"], ["compare", "plan.yaml"]):
        assert run(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert "accelerate, datasets, scikit-learn, scipy are missing" in error
        assert "pip install 'sera-serve[train]'" in error


def test_the_summary_says_how_to_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: dict[str, str], tmp_path: Path
) -> None:
    # A shell would part them, or run one.
    base, store = tmp_path / "tom's base", tmp_path / "a store $(id)"
    base.symlink_to(command["--base"])
    assert run(monkeypatch, *flat(command | {"--base": str(base), "--store": str(store)})) == 0
    captured = capsys.readouterr()
    assert "acme/tiny version 1 is published" in captured.out
    [line] = [line for line in captured.out.splitlines() if "sera-serve serve" in line]
    assert shlex.split(line) == ["sera-serve", "serve", "--base", str(base), "--store", str(store)]
    [line] = [line for line in captured.out.splitlines() if "curl" in line]
    *words, body = shlex.split(line)
    # In double quotes, so that the shell puts the key in.
    assert '"Authorization: Bearer $SERA_KEY"' in line
    assert words[:4] == ["curl", "-H", "Authorization: Bearer $SERA_KEY", "http://localhost:8000/v1/classify"]
    assert json.loads(body) == {"adapter": "acme/tiny", "inputs": ["some text"]}
    assert "accuracy" in captured.out
    assert "epoch 1 of 1: loss" in captured.err


@pytest.mark.parametrize(
    ("row_format", "row", "body"),
    [
        ("prompt-completion", {"prompt": "ab", "completion": "cd"}, '{"adapter": "acme/tiny", "prompt": "some text"}'),
        *(
            (kind, row, '{"model": "acme/tiny", "messages": [{"role": "user", "content": "some text"}]}')
            for kind, row in [
                ("alpaca", {"instruction": "add", "input": "ab", "output": "cd"}),
                ("chatml", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
            ]
        ),
    ],
)
def test_the_summary_asks_as_the_rows_do(
    row_format: str,
    row: dict[str, Any],
    body: str,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, template = write_jsonl(tmp_path / "rows.jsonl", [row] * 4), tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] }}: {{ m.content }}|{% endfor %}")
    arguments = ["--base", str(tiny_base), "--store", str(tmp_path / "store"), "--name", "acme/tiny", "--rank", "4"]
    arguments += ["--task", "generate", "--train", str(rows), "--format", row_format, "--epochs", "1"]
    arguments += ["--eval-fraction", "0"]
    if row_format != "prompt-completion":
        arguments += ["--chat-template", str(template)]
    assert run(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    path = "generate" if row_format == "prompt-completion" else "chat/completions"
    assert f"/v1/{path} -H 'Content-Type: application/json' -d '{body}'" in out


def test_options_from_a_file(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: dict[str, str],
    tmp_path: Path,
) -> None:
    config = tmp_path / "run.yaml"
    values = {name[2:].replace("-", "_"): value for name, value in command.items()} | {"name": "acme/other"}
    config.write_text(json.dumps(values))
    assert run(monkeypatch, "--config", str(config), "--name", "acme/flag", "--method", "lora", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["adapter"] == "acme/flag"
    assert AdapterStore(Path(command["--store"])).load(result["digest"]).config.method == "lora"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"--train": "absent.csv"}, 1, "absent.csv cannot be read: No such file or directory; check the path"),
        ({"--text-column": "body"}, 1, "has no column 'body'; it has text, label; name one with --text-column"),
        ({"--base": "/no/such/base"}, 1, "base '/no/such/base' could not be loaded"),
        ({"--target-modules": "qq"}, 1, "target module 'qq' matches no linear layer"),
        ({"--store": "/dev/null/store"}, 1, "/dev/null"),
        ({"--split": "3"}, 2, "split 3 does not divide rank 4; choose one of [1, 2, 4]"),
        ({"--name": "tiny"}, 2, "--name 'tiny': adapter id is 'tiny'; write tenant/name"),
        ({"--config": "absent.yaml"}, 2, "--config absent.yaml cannot be read"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: dict[str, str],
    options: dict[str, str],
    status: int,
    message: str,
) -> None:
    assert run(monkeypatch, *flat(command | options)) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("train_adapter: ")]
    assert message in line
    assert captured.err.endswith(line + "\n")


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["--rank", "many"], ["--method", "lorra"]])
def test_usage_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_missing_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--task", "classify") == 2
    assert "missing --base, --store, --name, --train" in capsys.readouterr().err


def test_help_waits_for_no_model_library() -> None:
    program = "import sys, sera_serve.trainer.cli; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_help_has_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert run(monkeypatch, "--help") == 0
        shown = capsys.readouterr().out
        assert "…" not in shown
        for field in [*TrainSettings.model_fields, "config", "json"]:
            assert f"{flag(field)} " in shown
        for group in ("What to train", "Data", "Adapter", "Optimisation", "Run"):
            assert f"\n{group}:\n" in shown


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sera_serve.cli", "sera_serve.trainer.cli"])
def test_a_module_of_a_command_line_runs_it(module: str) -> None:
    found = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "Usage: " in found.stdout


def test_a_refusal_does_not_act_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: dict[str, str]
) -> None:
    assert run(monkeypatch, *flat(command | {"--train": "rows\x07.csv"})) == 1
    told = capsys.readouterr().err
    assert "rows\\x07.csv cannot be read" in told and "\x07" not in told
