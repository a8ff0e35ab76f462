"""Sections of the GPU benchmark on the fake GPU: what they do where there is one runs, down to every launch."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu.plan import FIRST, SECOND
from benchmarks.gpu.record import Record
from benchmarks.gpu.setting import Options
from benchmarks.gpu.supervisor import run_section
from support.fake_gpu import Graph, fake_gpu

SECTIONS = {section.name: section for section in (*FIRST, *SECOND)}
# The others run an engine or a server, or hold hundreds of adapters, which take too long under the interpreter.
TIMED = ("decode step", "sampling time", "attention time", "kernel time", "prefill time", "peers", "capacity")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("name", TIMED)
def test_section(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No figure means anything, and graphs hold hundreds of launches.
    monkeypatch.setattr(Graph, "replay", lambda graph: None)
    # torch's profiler looks for CUDA itself.
    monkeypatch.setattr("benchmarks.gpu.decode_step._profile", lambda name, replay: iter(()))
    record = tmp_path / "rows"
    Record(record).add("machine", {"memory_bytes_per_s": 1e12, "empty_launch_us": 1.0})
    options = Options(
        command="first",
        record=str(record),
        log=str(tmp_path / "log"),
        small=True,
        layers=1,
        peer_kernels=None,
        started=time.monotonic(),
        budget_s=3600,
        has_gpu=True,
    )
    with fake_gpu() as gpu:
        run_section(SECTIONS[name], options, options.deadline)
    rows = [row for row in Record(record).rows() if row["section"] == name]
    assert rows[-1]["status"] == "done", rows[-1]
    assert len(rows) > 1 and (gpu.launches or name == "capacity")
    assert gpu.found == {}
