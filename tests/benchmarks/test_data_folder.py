"""Programs that read data sets, which are no part of the project, say so at once where the folder is not there."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["benchmarks/dry_run.py"],
        ["benchmarks/packing.py"],
        ["benchmarks/quantized_base.py", "--quick"],
        ["benchmarks/rank_allocation.py"],
        ["benchmarks/served_tasks.py", "--quick"],
        ["examples/images_experiment.py"],
        ["examples/pretrain_embedded_base.py", "train", "--work", "WORK"],
        ["examples/pretrain_small_images.py", "vit", "--out", "WORK"],
        ["examples/pretrain_small_images.py", "clip", "--out", "WORK"],
        ["examples/tenants_experiment.py", "--work", "WORK"],
    ],
    ids=" ".join,
)
def test_a_folder_that_is_not_there_is_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program, *options = [str(tmp_path / "work") if argument == "WORK" else argument for argument in arguments]
    monkeypatch.setattr("sys.argv", [program, *options, "--data", str(tmp_path / "none")])
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert ended.value.code == 2
    assert f"{tmp_path / 'none'}' does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
