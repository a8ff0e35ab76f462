"""The benchmark of single loads, on adapters of one small layer: it tells no time where a load is wrong."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import typer

from benchmarks import adapter_loads
from benchmarks.gpu.capacity import large_bundle
from sera_serve.residency import DevicePool


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_loads, "large_bundle", partial(large_bundle, small=True))
    monkeypatch.setattr(adapter_loads, "_ADAPTERS", 3)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


@pytest.mark.slow
def test_right_loads_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    adapter_loads.main(rounds=1)
    told = last_line(capsys)
    assert (told["benchmark"], told["correct"]) == ("adapter_loads", True)
    assert [(row["adapter"], row["kinds"]) for row in told["rows"]] == [
        (case, kinds) for case in adapter_loads.CASES for kinds in ("one kind", "own kinds")
    ]
    assert all(0 < row["median_ms"] <= row["most_ms"] for row in told["rows"])


@pytest.mark.slow
def test_a_wrong_load_is_told_without_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = DevicePool.fill

    def spoiled(pool: DevicePool, placement: Any, data: Any) -> None:
        fill(pool, placement, data)
        pool.data[placement.locate(0)] += 1

    monkeypatch.setattr(DevicePool, "fill", spoiled)
    with pytest.raises(typer.Exit) as ended:
        adapter_loads.main(rounds=1)
    captured = capsys.readouterr()
    assert ended.value.exit_code == 1
    assert json.loads(captured.out.splitlines()[-1]) == {"benchmark": "adapter_loads", "correct": False, "rows": []}
    assert " ms" not in captured.err and "no speed is reported" in captured.err
