"""`benchmarks.peft_import` checks its argument before it measures anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import peft_import


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["EMPTY"], 2), (["a", "b"], 2)])
def test_a_wrong_call_measures_nothing(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peft_import, "time_import", lambda: pytest.fail("it measures"))
    given = [str(tmp_path) if argument == "EMPTY" else argument for argument in arguments]
    monkeypatch.setattr("sys.argv", ["peft_import", *given])
    with pytest.raises(SystemExit) as ended:
        peft_import.main()
    assert ended.value.code == status
