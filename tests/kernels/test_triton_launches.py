"""Launch parameters: their choice, their measurement, and the compilation of the kernel without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from sera_kernels import tune
from sera_kernels.grouped import path_for
from sera_kernels.launches import Launch, choose_launch, pick_row
from sera_kernels.torch_path import grouped_sera_torch
from sera_kernels.triton_path import grouped_sera_triton

LAUNCH = Launch(1, 512, 2048, 64, 32, 64, 4, 2, 128)


def test_a_gpu_uses_triton_and_a_cpu_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert path_for(torch.device("cuda", 0)) is grouped_sera_triton
    assert path_for(torch.device("cpu")) is grouped_sera_torch
    path_for.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert path_for(torch.device("cuda", 0)) is grouped_sera_torch
    path_for.cache_clear()


def test_every_shipped_row_is_a_launch_and_says_whether_it_was_measured() -> None:
    table = json.loads(resources.files("sera_kernels").joinpath("launches.json").read_text())
    assert set(table) == {"note", "devices"}
    for device in table["devices"].values():
        assert isinstance(device["tuned"], bool)
        for row in device["rows"]:
            Launch(**row["launch"])
            assert row.keys() >= {"element_bytes", "tokens", "d_in", "d_out"}
            assert device["tuned"] == ("microseconds" in row)
    assert {row["element_bytes"] for row in table["devices"]["any"]["rows"]} == {2, 4}


def test_pick_row_takes_enough_tokens_and_then_the_nearest_widths() -> None:
    def row(tokens: int, d_in: int, d_out: int, columns: int, element_bytes: int = 2) -> dict[str, object]:
        launch = asdict(replace(LAUNCH, columns=columns))
        return {"element_bytes": element_bytes, "tokens": tokens, "d_in": d_in, "d_out": d_out, "launch": launch}

    rows = [row(64, 4096, 4096, 64), row(64, 4096, 16384, 128), row(256, 4096, 4096, 256), row(64, 8, 8, 512, 4)]
    assert pick_row(rows, 64, 4096, 4096, 2).columns == 64
    assert pick_row(rows, 1, 4096, 14336, 2).columns == 128
    assert pick_row(rows, 65, 4096, 14336, 2).columns == 256
    assert pick_row(rows, 9999, 64, 64, 2).columns == 256
    assert pick_row(rows, 9999, 4096, 4096, 4).columns == 512


def test_few_tokens_use_programs_of_their_own_and_many_tokens_use_tiles() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert choose_launch(16, 4096, 4096, dtype, cpu).block_m == 1
        assert choose_launch(2048, 4096, 4096, dtype, cpu).block_m >= 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": 500}, "columns must be a power of two of at least 16, not 500"),
        ({"columns": 2048}, "elements must be a power of two of at least 4096, not 2048"),
        ({"block_m": 8}, "block_m must be 1 or at least 16, not 8"),
        ({"block_r": 8}, "block_r must be a power of two of at least 16, not 8"),
    ],
)
def test_parameters_that_cannot_be_compiled_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LAUNCH, **change)


def test_search_finds_the_best_of_each_parameter() -> None:
    best = replace(LAUNCH, block_m=32, columns=1024, block_r=16, num_warps=8)

    def seconds(launch: Launch) -> float:
        if launch.num_warps == 4 and launch.block_r == 16:
            return float("inf")
        return 1.0 + sum(getattr(launch, name) != value for name, value in asdict(best).items())

    assert tune.search(seconds, LAUNCH) == (best, 1.0)


def test_the_result_of_a_measured_launch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tune.operands(3, 64, [128, 64], torch.float32, "cpu")
    launch = replace(LAUNCH, columns=128)
    assert tune.is_right(launch, case)
    monkeypatch.setattr(tune, "launch_grouped", lambda *arguments: None)
    assert not tune.is_right(launch, case)


def test_many_tokens_are_measured_as_runs_and_single_tokens() -> None:
    slots = tune.operands(1000, 64, [64], torch.float32, "cpu")[3].token_slots
    assert slots[:64].tolist() == list(range(64))
    assert slots[64:].unique().tolist() == list(range(8))


def test_tuning_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    output = tmp_path / "launches.json"
    assert tune.main(["--output", str(output)]) == 1
    assert "torch finds none" in capsys.readouterr().err
    assert not output.exists()


def test_the_kernel_compiles_for_gpus() -> None:
    # Programs of one token and of tiles, every dtype, with and without 16-byte accesses, two generations of GPUs.
    tile = replace(LAUNCH, block_m=16, num_warps=8)
    cases = [(90, "bf16", 8, asdict(LAUNCH)), (80, "fp32", 4, asdict(LAUNCH)), (80, "fp16", 1, asdict(tile))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_triton.py"
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(cases), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    token, single, tiles = json.loads(done.stdout)
    assert token["wide_loads"] >= 16 and single["wide_loads"] >= 16 and tiles["wide_loads"] == 0
    assert token["products"] == single["products"] == 0 and tiles["products"] > 0
    # Two programs of tiles, or four programs of single tokens, fit the shared memory of a multiprocessor of sm_80.
    assert tiles["shared"] <= 163 * 1024 // 2 and token["shared"] <= 163 * 1024 // 4
