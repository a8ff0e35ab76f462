"""The benchmark on one small server, and that it gives no speed when an answer is wrong."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from rich.console import Console

from benchmarks.cold_start import cold_name
from benchmarks.fleet import SHAPES, Fleet, save_endless_base
from benchmarks.http_load import Answer
from benchmarks.many_adapters import COLUMNS, QUICK, report
from benchmarks.many_adapters_run import ManyAdapters
from benchmarks.plots import plot_many_adapters
from benchmarks.reference import wrong_answers
from benchmarks.server_process import REPOSITORY
from benchmarks.workload import TimedRequest
from sera_serve.base import FrozenBase
from support.factories import greedy, merged

TINY = replace(QUICK, sizes=(12,), pairs=2, clients=8, touch=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return save_endless_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def fleet(base: FrozenBase) -> Fleet:
    return Fleet(base)


# peft's import and its models warn of things that are transformers' own.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_small_run_has_every_figure(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    run = ManyAdapters(TINY, tmp_path, 0.6, console)
    result = run.run()
    assert not run.wrong
    report(run.wrong, result, console)
    json.dumps(result)
    rows = result["rows"]
    assert [(row["system"], row["adapters"]) for row in rows] == [("sera-serve", 12), ("peft-swap", 12)]
    for row in rows:
        assert set(COLUMNS) <= set(row)
        assert row["requests"] > 0
        assert all(row[key] > 0 for key in COLUMNS[2:-1])
        assert row["ttft_p50_s"] <= row["ttft_p95_s"] <= row["ttft_p99_s"]
    ours = rows[0]
    assert ours["failures"] == {}
    assert "saturated_tokens_per_s" in ours
    figures = result["figures"]
    assert figures["ttft_p50_ratio"] == figures["ttft_p99_ratio"] == 1
    assert "throughput_ratio" in figures and figures["capacity_requests_per_s"] > 0
    assert figures["cold_start"]["pairs"] == 2 and 0.8e6 < figures["cold_start"]["adapter_bytes"] < 1.2e6
    assert figures["cold_start"]["cold_s"] > 0 < figures["cold_start"]["resident_s"]
    assert figures["flood"]["ratio"] > 0
    assert figures["fairness"]["tenants"] == 8
    plot_many_adapters(tmp_path / "plots" / "a.png", rows, run.ttfts)
    assert matplotlib.image.imread(tmp_path / "plots" / "a.png").shape[:2] == (1020, 1320)


@pytest.mark.slow
def test_servers_of_another_checkout_take_the_same_rounds(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("sera_serve", "kernels", "adapters_store", "benchmarks"):
        (other / name).symlink_to(REPOSITORY / name)
    run = ManyAdapters(replace(TINY, sizes=(10, 12)), tmp_path / "run", 0.6, Console(file=io.StringIO()))
    result = run.compare(other)
    assert not run.wrong
    told = [(row["system"], row["adapters"], len(row["saturated_rounds"])) for row in result["rows"]]
    assert told == [(name, size, 1) for size in (10, 12) for name in ("sera-serve", "other")]
    assert {name for row in result["rows"] for name in COLUMNS} <= set(result["rows"][1])
    figures = result["figures"]
    assert set(figures) == {"10", "12"}
    ours, theirs = result["rows"][2:]
    assert figures["12"]["ttft_p50"] == pytest.approx(ours["ttft_p50_s"] / theirs["ttft_p50_s"], abs=1e-3)
    # Both ran code of their own.
    assert (tmp_path / "run" / "theirs" / "server-12.log").stat().st_size > 0


def test_no_speed_is_told_where_something_is_wrong() -> None:
    output = io.StringIO()
    report(["t00001/main: a token is wrong"], {"rows": [{"tokens_per_s": 9.0}], "figures": {}}, Console(file=output))
    assert output.getvalue() == "wrong: t00001/main: a token is wrong\n"


def test_the_reference_tells_right_answers_from_wrong_ones(base: FrozenBase, fleet: Fleet) -> None:
    prompt = (65, 66, 67, 68)
    for index in range(len(SHAPES)):
        tokens = greedy(merged(base, fleet.bundle(index)), list(prompt), 12)

        def answer(tokens: list[int], adapter: int, length: int = 12) -> Answer:
            asked = TimedRequest(0, adapter, prompt, length)
            return Answer(asked, "t/x", 0, status=200, tokens=tokens, answered_by="t/x", complete=True)

        assert wrong_answers(fleet, [answer(tokens, index)]) == []
        assert len(wrong_answers(fleet, [answer([*tokens[:6], tokens[6] ^ 1, *tokens[7:]], index)])) == 1
        assert len(wrong_answers(fleet, [answer(tokens, index + len(SHAPES))])) == 1, (
            "the same shape with other weights"
        )
        assert len(wrong_answers(fleet, [answer(tokens[:-1], index)])) == 1
        assert len(wrong_answers(fleet, [replace(answer(tokens, index), answered_by="t/y")])) == 1


def test_adapters_of_a_fleet_are_distinct_repeatable_and_of_mixed_shapes(fleet: Fleet) -> None:
    bundles = [fleet.bundle(index) for index in range(3 * len(SHAPES))]
    assert len({bundle.digest for bundle in bundles}) == len(bundles)
    assert [fleet.bundle(index).digest for index in range(3)] == [bundle.digest for bundle in bundles[:3]]
    specs = {
        (spec.rank, spec.split, spec.use_mixer, len(bundle.config.modules))
        for bundle in bundles
        for spec in bundle.config.modules.values()
    }
    assert len(specs) == len(SHAPES)
    assert all(torch.isfinite(tensor).all() for bundle in bundles for tensor in bundle.tensors.values())


def test_a_published_fleet_is_found_by_its_names(tmp_path: Path, fleet: Fleet) -> None:
    store = fleet.publish(tmp_path / "store", 7)
    assert [info.adapter for info in store.iter_adapters()] == [f"t0000{index}/main" for index in range(7)]
    assert store.resolve("t00003/main").digest == fleet.bundle(3).digest
    assert cold_name(3).startswith("cold/")
