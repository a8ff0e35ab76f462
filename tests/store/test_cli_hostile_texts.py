"""Texts of whoever published an adapter, in what the commands print: no markup, and nothing acts on a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from bundle_factory import BASE, MODULE, make_classifier
from click.testing import Result
from rich.table import Table
from typer.testing import CliRunner

from adapters_store import AdapterStore
from sera_serve.access import AccessDatabase, Keys
from sera_serve.cli import build_cli
from sera_serve.commands.output import console
from sera_serve.terminal import PlainConsole, printable

# Each is shown as the second says.
TEXTS = {
    "markup that closes nothing": ("[/b]", "[/b]"),
    "a style": ("[red]x[/red]", "[red]x[/red]"),
    "an emoji's code": (":warning:", ":warning:"),
    "an escape sequence": ("\x1b[31mx\x1b]0;y\x07", r"\x1b[31mx\x1b]0;y\x07"),
    "an escape sequence in one character": ("\x9b2Jx", r"\x9b2Jx"),
    "a change of direction": ("a\u202eb", r"a\u202eb"),
    "further lines": ("a\nb\r\u2028c", r"a\nb\r\u2028c"),
}


def run(store: AdapterStore, *arguments: object) -> Result:
    return CliRunner().invoke(build_cli(), [*map(str, arguments), "--store", str(store.root)])


def bundle_of(text: str) -> Any:
    return make_classifier(
        labels=[text, "x"],
        base={**BASE, "name": text, "architecture": text},
        training={"description": text, "notes": [text], text: text, "metrics": {text: 1.0}},
    )


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.mark.parametrize("case", TEXTS)
def test_what_a_publisher_wrote_is_shown_as_it_is(case: str, store: AdapterStore) -> None:
    text, shown = TEXTS[case]
    store.publish(bundle_of(text), "evil/one")
    for command in (("adapters", "list"), ("adapters", "inspect", "evil/one"), ("analyze", "evil/one")):
        result = run(store, *command)
        assert result.exit_code == 0, (command, result.exception)
        assert shown in result.stdout, command
        assert all(printable(line) == line for line in result.stdout.splitlines()), command
        as_json = run(store, *command, "--json")
        assert as_json.exit_code == 0 and printable(as_json.stdout) == as_json.stdout
        # The JSON has the text itself.
        assert json.dumps(text) in json.dumps(json.loads(as_json.stdout)), command


def test_a_refusal_is_shown_as_it_is(store: AdapterStore, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m[b]"
    result = run(store, "adapters", "import", path, "--name", "evil/one")
    assert result.exit_code == 1
    assert printable(result.stderr) == result.stderr and r"\x1b[31m[b]" in result.stderr


def test_names_of_keys_are_shown_as_they_are(store: AdapterStore) -> None:
    Keys(AccessDatabase(store.root)).create("acme", ["infer"], name="[/b] :warning:")
    result = run(store, "keys", "list")
    assert result.exit_code == 0 and "[/b] :warning:" in result.stdout


@pytest.mark.parametrize("case", TEXTS)
def test_a_console_of_ours_prints_cells_and_lines_as_they_are(case: str) -> None:
    text, shown = TEXTS[case]
    output = io.StringIO()
    text, shown = text.replace("\n", ""), shown.replace(r"\n", "")
    table = Table(text)
    table.add_row(text)
    plain = PlainConsole(file=output, force_terminal=True, width=100, color_system=None)
    plain.print(table)
    plain.print(text, highlight=False)
    assert output.getvalue().count(shown) == 3 and "\x1b" not in output.getvalue()
    assert isinstance(console(), PlainConsole)


def test_other_alphabets_and_layers_are_printed_unchanged(store: AdapterStore) -> None:
    text = "Grüße　世界 \u00a0é 🙂"
    assert printable(text) == text
    store.publish(make_classifier(labels=[text, "x"], modules={"model.q": dict(MODULE)}), "good/one")
    result = run(store, "adapters", "inspect", "good/one")
    assert result.exit_code == 0 and text in result.stdout
