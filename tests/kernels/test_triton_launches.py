"""Launch parameters of the Triton kernels: their choice and their measurement. Kinds of shapes."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from sera_kernels import MOST_RANK, AdapterBatch, AdapterTables, ShapeClasses, cells, triton_path, tune, workspace_bytes
from sera_kernels.decode_kernels import MIXER_ELEMENTS
from sera_kernels.grouped import path_for
from sera_kernels.launches import Launch, choose_launch
from sera_kernels.shape_classes import RANK_BUCKETS
from sera_kernels.torch_path import grouped_sera_torch
from sera_kernels.triton_path import grouped_sera_triton

LAUNCH = Launch(
    reduce_elements=4096, reduce_thread=16, expand_columns=1024, expand_warps=4, run_tokens=16, run_inputs=32
)


def test_a_gpu_uses_triton_and_a_cpu_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert path_for(torch.device("cuda", 0)) is grouped_sera_triton
    assert path_for(torch.device("cpu")) is grouped_sera_torch
    path_for.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert path_for(torch.device("cuda", 0)) is grouped_sera_torch
    path_for.cache_clear()


def test_every_shipped_entry_is_a_launch_and_says_whether_it_was_measured() -> None:
    table = json.loads(resources.files("sera_kernels").joinpath("launches.json").read_text())
    assert set(table) == {"note", "devices"}
    for device in table["devices"].values():
        assert isinstance(device["tuned"], bool)
        for size in {"2", "4"} & device.keys():
            Launch(**device[size])
            assert device["tuned"] == (f"microseconds_{size}" in device)
    assert table["devices"]["any"].keys() >= {"2", "4"}


def test_every_dtype_has_a_launch() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert choose_launch(dtype, torch.device("cpu")).expand_columns >= 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expand_columns": 500}, "expand_columns must be a power of two of at least 16, not 500"),
        ({"reduce_elements": 512}, "reduce_elements must be a power of two of at least 1024, not 512"),
        ({"reduce_thread": 0}, "reduce_thread must be a power of two of at least 1, not 0"),
        ({"run_tokens": 2}, "run_tokens must be a power of two of at least 4, not 2"),
        ({"run_inputs": 16}, "run_inputs must be a power of two of at least 32, not 16"),
    ],
)
def test_parameters_that_cannot_be_compiled_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LAUNCH, **change)


def test_search_finds_the_best_of_each_phase_within_24_variants() -> None:
    best = replace(LAUNCH, reduce_elements=16384, reduce_thread=8, expand_columns=4096, expand_warps=2)
    measured: list[Launch] = []

    def microseconds(launch: Launch) -> float:
        measured.append(launch)
        if launch.expand_columns == 4096 and launch.expand_warps == 8:
            return float("inf")
        return 1.0 + sum(getattr(launch, name) != value for name, value in asdict(best).items())

    assert tune.search(microseconds, LAUNCH) == (best, 1.0)
    assert len(measured) == len(set(measured)) <= 24


def test_search_finds_the_best_for_a_prompt() -> None:
    best = replace(LAUNCH, run_tokens=8, run_inputs=64)
    assert tune.search(lambda launch: float(launch != best), LAUNCH, tune.PROMPT) == (best, 0.0)


def test_the_result_of_a_measured_launch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tune.operands(3, 64, [128, 64], torch.float32, "cpu")
    launch = replace(LAUNCH, expand_columns=128)
    assert tune.is_right(launch, case)
    monkeypatch.setattr(tune, "grouped_sera_triton", lambda *arguments: None)
    assert not tune.is_right(launch, case)


def test_a_fault_of_one_token_s_updates_is_seen_in_16_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tune.operands(3, 64, [128, 64], torch.bfloat16, "cpu")
    right = tune.grouped_sera_triton
    assert tune.is_right(LAUNCH, case)

    def without_the_first(x: torch.Tensor, outputs: list[torch.Tensor], modules: list[int], *others: Any) -> None:
        before = [y[0].clone() for y in outputs]
        right(x, outputs, modules, *others)
        for y, first in zip(outputs, before, strict=True):
            y[0] = first

    monkeypatch.setattr(tune, "grouped_sera_triton", without_the_first)
    assert not tune.is_right(LAUNCH, case)


def test_tuning_compiles_what_it_will_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: set[Launch] = set()
    operands = tune.operands
    monkeypatch.setattr(tune, "SHAPES", [(32, [32])])
    monkeypatch.setattr(tune, "operands", lambda *arguments: operands(*arguments, "cpu"))
    monkeypatch.setattr(tune, "grouped_sera_triton", lambda *arguments: compiled.add(arguments[-1]))
    monkeypatch.setattr(tune, "is_right", lambda launch, case: True)

    def measured(launch: Launch, cases: list[tune.Operands]) -> float:
        # A kernel's constants are those of one phase.
        reduces = {(known.reduce_elements, known.reduce_thread) for known in compiled}
        expands = {(known.expand_columns, known.expand_warps) for known in compiled}
        assert (launch.reduce_elements, launch.reduce_thread) in reduces
        assert (launch.expand_columns, launch.expand_warps) in expands
        runs = {(known.run_tokens, known.run_inputs) for known in compiled}
        assert (launch.run_tokens, launch.run_inputs) in runs
        return float(launch.expand_columns + launch.reduce_thread - launch.run_inputs)

    monkeypatch.setattr(tune, "measure", measured)
    entry = tune.tune([torch.bfloat16], lambda line: None)
    assert entry["2"]["expand_columns"] == 512 and entry["2"]["reduce_thread"] == 8
    assert entry["2"]["run_inputs"] == 64
    assert entry["tuned"] and (entry["microseconds_2"], entry["prompt_microseconds_2"]) == (488.0, 456.0)


def test_tuning_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    output = tmp_path / "launches.json"
    assert tune.main(["--output", str(output)]) == 1
    assert "torch finds none" in capsys.readouterr().err
    assert not output.exists()


def test_shapes_are_classified_by_segments_and_rank() -> None:
    classes = ShapeClasses.of([(64, 64), (8, 8), (1, 1), (64, 16), (17, 1), (300, 1)])
    assert classes == ShapeClasses(single=64, segmented=64, whole=1024)
    assert classes.width == 1024
    assert ShapeClasses.of([]).width == 0
    assert ShapeClasses(16, 0, 64) | ShapeClasses(64, 16, 0) == ShapeClasses(64, 16, 64)
    assert ShapeClasses(16, 0, 64) | ShapeClasses(vectors=True) == ShapeClasses(16, 0, 64, True)
    assert len({classes, ShapeClasses.of([(64, 64), (20, 4), (1000, 1)])}) == 1


def test_no_rank_is_above_what_kernels_are_compiled_for() -> None:
    # A program of the mixer holds whole columns.
    assert all(MIXER_ELEMENTS.value // bucket >= 1 for bucket in RANK_BUCKETS)
    assert ShapeClasses.of([(MOST_RANK, 1)]).whole == MOST_RANK == max(RANK_BUCKETS)
    with pytest.raises(ValueError, match=f"rank {MOST_RANK + 1} is above {MOST_RANK}"):
        ShapeClasses.of([(8, 8), (MOST_RANK + 1, 1)])


@pytest.mark.parametrize("tokens", [1, 256, 257, 512, 2048, 8192])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("bucket", RANK_BUCKETS)
def test_a_launch_takes_no_more_memory_than_is_planned(
    tokens: int, layers: int, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, sizes = triton_path._buffer, []

    def measured(*arguments: Any) -> torch.Tensor:
        made = buffer(*arguments)
        sizes.append(made.nbytes)
        return made

    class Kernel:
        """Takes a launch, and does nothing."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: None

    monkeypatch.setattr(triton_path, "_buffer", measured)
    for name in ("reduce_mix", "reduce_parts", "mix_parts", "reduce_runs", "reduce_tiles"):
        monkeypatch.setattr(triton_path, name, Kernel())
    monkeypatch.setattr(cells, "copy_cells", Kernel())
    tables = AdapterTables.empty(layers, 1, "meta")
    tables.set_classes(ShapeClasses(bucket, bucket, bucket))
    # Tensors without memory.
    batch = AdapterBatch(torch.empty(tokens, dtype=torch.int32, device="meta"))
    x = torch.empty(tokens, 14336, dtype=torch.bfloat16, device="meta")
    triton_path.reduce_updates(x, range(layers), batch, x[0], tables, launch=LAUNCH)
    assert len(sizes) == 2 and sum(sizes) <= workspace_bytes(tokens)
    if (tokens, layers, bucket) in [(2048, 4, MOST_RANK), (8192, 4, MOST_RANK)]:
        assert sum(sizes) == workspace_bytes(tokens)


@pytest.mark.parametrize(
    ("tokens", "layers", "classes", "parts"),
    [
        (2048, 1, ShapeClasses(single=64), 4),
        (2048, 2, ShapeClasses(single=64), 1),
        (682, 3, ShapeClasses(single=64, whole=64), 4),
        (683, 3, ShapeClasses(single=64), 1),
        # No blocks: few tokens, large ranks, no segments of rank 1.
        (256, 1, ShapeClasses(single=64), 1),
        (512, 1, ShapeClasses(single=1024), 1),
        (512, 1, ShapeClasses(whole=64), 1),
        # Rows of v that are as long as others need would take much memory.
        (512, 1, ShapeClasses(single=64, whole=1024), 1),
    ],
)
def test_programs_share_the_rounds_of_a_block_where_there_are_few_blocks(
    tokens: int, layers: int, classes: ShapeClasses, parts: int
) -> None:
    assert triton_path._run_parts(layers, tokens, classes) == parts


def vars_of(tables: AdapterTables) -> dict[str, torch.Tensor]:
    return {field.name: getattr(tables, field.name) for field in fields(tables)}


def test_tables_find_their_classes_or_are_told() -> None:
    tables = AdapterTables.empty(2, 3)
    tables.offset[1, 2], tables.rank[1, 2], tables.split[1, 2] = 0, 32, 8
    # A slot without an adapter does not count.
    tables.rank[0, 0] = 4096
    assert tables.classes == ShapeClasses(segmented=64)
    tables.vectors[0, 0] = 0
    assert AdapterTables(**vars_of(tables)).classes == ShapeClasses(segmented=64)
    tables.vectors[1, 2] = 0
    assert AdapterTables(**vars_of(tables)).classes == ShapeClasses(segmented=64, vectors=True)
    tables.set_classes(ShapeClasses(single=16))
    assert tables.classes == ShapeClasses(single=16)
