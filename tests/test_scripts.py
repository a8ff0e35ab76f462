"""The console scripts: an interrupt while they import what they run ends them, without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# Tests that were started in the background may ignore interrupts, and so would their programs.
TAKES_IT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
# Sends itself an interrupt where a module is looked for, as a terminal does.
INTERRUPT = """
import signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            # To this very thread: another one would leave it to this one for later, where it may be lost.
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""
ARGUMENTS = {
    "sera-serve": ["serve", "--base", "embedded", "--store", "store", "--port", "0"],
    "train_adapter": [
        *("--base", "embedded", "--store", "store", "--name", "a/b"),
        *("--task", "classify", "--train", "rows.csv"),
    ],
}


def run(program: str, arguments: list[str], folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", before + program, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


def program(name: str) -> str:
    module, _, function = SCRIPTS[name].partition(":")
    return f"import {module}; {module}.{function}()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("sera-serve", "typer"),
        # Within the command.
        ("sera-serve", "uvicorn"),
        ("train_adapter", "typer"),
        ("train_adapter", "sera_serve.trainer.settings"),
        ("train_adapter", "sera_serve.trainer.run"),
    ],
)
def test_an_interrupt_during_imports_is_quiet(name: str, module: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n" + "one,a\ntwo,b\n" * 4)
    ended = run(program(name), ARGUMENTS[name], tmp_path, TAKES_IT + INTERRUPT.format(module=module))
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_the_trainer_as_a_module(tmp_path: Path) -> None:
    as_module = "import runpy; runpy.run_module('sera_serve.trainer', run_name='__main__', alter_sys=True)"
    ended = run(as_module, ["--help"], tmp_path, TAKES_IT + INTERRUPT.format(module="typer"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    ended = run(program("sera-serve"), ["--help"], tmp_path, ignored + INTERRUPT.format(module="typer"))
    assert ended.returncode == 0 and "Usage" in ended.stdout


def test_python_takes_the_signal_again_for_the_command(tmp_path: Path) -> None:
    look = "import signal, typer; typer.Typer.__call__ = lambda self: print(signal.getsignal(signal.SIGINT).__name__)\n"
    ended = run(program("sera-serve"), [], tmp_path, TAKES_IT + look)
    assert ended.stdout.strip() == signal.default_int_handler.__name__
