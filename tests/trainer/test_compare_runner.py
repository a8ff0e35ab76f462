"""Running a plan: what is made, in which order, what a kill and a failure leave, and the table. The runs are faked."""

import fcntl
import json
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from test_compare_plan import plan_of

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.checkpoint import RunInProgress
from sera_serve.trainer.compare.plan import ComparePlan
from sera_serve.trainer.compare.plot import plot_scores
from sera_serve.trainer.compare.report import as_csv, as_markdown, summarise
from sera_serve.trainer.compare.results import ResultsFile
from sera_serve.trainer.compare.runner import CompareRunner

# It answers as the worker does. The score is highest at the rate 0.003; VeRA fails, and rank 13 kills the worker.
FAKE = """#!{python}
import json, os, sys
print("ready", flush=True)
for line in sys.stdin:
    run = json.loads(line)
    with open({log!r}, "a") as file:
        file.write(line)
    options = run["settings"]
    if options.get("rank") == 13:
        os.kill(os.getpid(), 9)
    rate = options.get("learning_rate", 0.003)
    score = 0.9 - abs(rate - 0.003) + options["seed"] / 500
    metrics = {{"loss": 1 - score, "accuracy": score, "matthews": score, "test_accuracy": score - 0.1}}
    result = {{"metrics": metrics, "parameters": 10 * options.get("rank", 0), "head_parameters": 4,
              "peak_memory_mb": 5.0, "step_ms": 2.0, "base_probe": {probe}}}
    if (run["baseline"] or {{}}).get("method") == "vera":
        result = {{"error": "no room"}}
    print(json.dumps(result), flush=True)
"""


class Fake:
    """A Python that answers instead of training, and the runs that it was asked for."""

    def __init__(self, folder: Path, name: str = "python", probe: float = 1.0) -> None:
        self.log = folder / f"{name}.log"
        self.path = folder / name
        self.path.write_text(FAKE.format(python=sys.executable, log=str(self.log), probe=probe))
        self.path.chmod(self.path.stat().st_mode | stat.S_IEXEC)

    def runs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def runner_of(fake: Fake, results: Path, plan: dict[str, Any], **options: Any) -> CompareRunner:
    """A runner over the fake Python."""
    console = Console(quiet=True)
    compared = ComparePlan.model_validate(plan)
    return CompareRunner(compared, ResultsFile(results), console, python=str(fake.path), **options)


def test_every_run_is_made_once_and_kept(fake: Fake, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    runner_of(fake, results, plan_of()).run(5)
    assert len(fake.runs()) == len(results.read_text().splitlines()) == 5
    again = runner_of(fake, results, plan_of())
    assert len(again.pending()) == 11
    again.run()
    assert len(fake.runs()) == 16
    assert again.pending() == []
    runner_of(fake, results, plan_of()).run()
    assert len(fake.runs()) == 16


def test_a_torn_line_is_dropped_and_its_run_made_again(fake: Fake, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    runner_of(fake, results, plan_of()).run(2)
    results.write_bytes(results.read_bytes()[:-9])
    runner_of(fake, results, plan_of()).run()
    assert len(fake.runs()) == 17
    assert all(json.loads(line) for line in results.read_text().splitlines())
    assert len(results.read_text().splitlines()) == 16


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"run": "a"}\n[1]\n')
    with pytest.raises(InvalidConfiguration, match=r"r.jsonl line 2 is not a result"):
        ResultsFile(tmp_path / "r.jsonl")


def test_two_comparisons_do_not_share_a_file(fake: Fake, tmp_path: Path) -> None:
    runner = runner_of(fake, tmp_path / "r.jsonl", plan_of())
    with ResultsFile(tmp_path / "r.jsonl").exclusive(), pytest.raises(RunInProgress, match="another comparison"):
        runner.run()
    assert fake.runs() == []


def test_what_another_comparison_has_run_meanwhile_is_not_made_again(fake: Fake, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    first, second = (runner_of(fake, results, plan_of()) for _ in range(2))
    first.run(5)
    second.run(3)
    assert len(fake.runs()) == 8
    first.run()
    assert len(fake.runs()) == len(results.read_text().splitlines()) == 16
    assert first.pending() == [] and len(second.pending()) == 8
    second.run()
    assert second.pending() == [] and len(fake.runs()) == 16


def test_a_run_that_fails_is_in_the_table_and_ends_no_other(fake: Fake, tmp_path: Path) -> None:
    plan = plan_of(methods=[{"method": "lora", "rank": [13, 8]}, {"method": "vera"}])
    runner = runner_of(fake, tmp_path / "r.jsonl", plan)
    runner.run()
    cells = {(cell.method, cell.data): cell for cell in summarise(runner)}
    killed, good, failed = (cells[label, "one"] for label in ("lora r=13", "lora r=8", "vera r=8"))
    assert (killed.runs, killed.failed) == (0, 2)
    assert killed.error is not None and "ended with status -9" in killed.error
    assert (good.runs, good.failed) == (2, 0)
    assert (failed.failed, failed.error) == (2, "no room")
    markdown = as_markdown(summarise(runner))
    assert "| tiny | vera r=8 |  | failed | failed |" in markdown
    assert "- tiny one vera r=8: 2 of 2 runs failed: no room" in markdown
    # Failed runs are made again only when that is asked for.
    made = len(fake.runs())
    runner_of(fake, tmp_path / "r.jsonl", plan).run()
    assert len(fake.runs()) == made
    runner_of(fake, tmp_path / "r.jsonl", plan, retry_failed=True).run()
    assert len(fake.runs()) == made + 8


def test_rates_are_chosen_before_the_runs_that_count(fake: Fake, tmp_path: Path) -> None:
    rule = {"ladder": [1e-4, 1e-3, 3e-3, 1e-2], "start": [1e-4, 1e-3], "seed": 7, "data": ["two"]}
    plan = plan_of(methods=[{"method": "lora", "rank": 8}, {"method": "sera", "learning_rate": 0.5}])
    runner_of(fake, tmp_path / "r.jsonl", plan | {"learning_rates": rule}).run()
    made = [(run["settings"]["seed"], run["settings"].get("learning_rate")) for run in fake.runs()]
    assert made[:5] == [(7, 1e-4), (7, 1e-3), (7, 3e-3), (7, 1e-2), (0, 3e-3)]
    assert sorted(made[5:]) == sorted([(0, 0.5), (0, 0.5), (0, 3e-3), (1, 0.5), (1, 0.5), (1, 3e-3), (1, 3e-3)])
    assert all("test" not in run["settings"] for run in fake.runs()[:4])


def test_rows_to_test_on_need_no_option(fake: Fake, tmp_path: Path) -> None:
    """The folder of the training images may have a split of them. A choice of the rate scores none of them."""
    rule = {"ladder": [3e-3], "start": [3e-3], "seed": 7}
    plan = plan_of(data={"one": {"train": "one.csv"}}, methods=[{"method": "lora", "rank": 8}], seeds=[0])
    runner_of(fake, tmp_path / "r.jsonl", plan | {"learning_rates": rule}).run()
    assert [run["test_rows"] for run in fake.runs()] == [0, None]
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(record["purpose"], round(record["score"], 3)) for record in records] == [("rate", 0.914), ("score", 0.8)]


def test_the_table_has_mean_and_deviation(fake: Fake, tmp_path: Path) -> None:
    runner = runner_of(fake, tmp_path / "r.jsonl", plan_of(methods=[{"method": "lora", "rank": 8}]))
    runner.run()
    one, two = summarise(runner)
    assert (one.score, two.score) == ("accuracy", "matthews")
    # The score of the test rows where the data set has them, that of the evaluation rows elsewhere.
    assert one.mean == pytest.approx(0.801)
    assert two.mean == pytest.approx(0.901)
    assert one.deviation == pytest.approx(0.002 / 2**0.5)
    assert (one.parameters, one.head_parameters, one.step_ms, one.peak_memory_mb) == (80, 4, 2.0, 5.0)
    assert "| tiny | lora r=8 | 80 | 80.1 ± 0.1 | 90.1 ± 0.1 | 85.1 | 5 | 2.0 |" in as_markdown([one, two])
    # Of a method that has not run on every data set, memory and time would be those of other rows.
    assert "| tiny | lora r=8 | 80 |  | 90.1 ± 0.1 |  |  |  |" in as_markdown([replace(one, method="other"), two])
    header, first, *_ = as_csv([one, two]).splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=True))["method"] == "lora r=8"


def test_baselines_of_another_environment_run_in_it(fake: Fake, tmp_path: Path) -> None:
    other = Fake(tmp_path, "other")
    plan = plan_of(methods=[{"method": "houlsby"}, {"method": "lora"}])
    runner_of(fake, tmp_path / "r.jsonl", plan, adapters_python=str(other.path)).run()
    assert [run["baseline"]["method"] for run in other.runs()] == ["houlsby"] * 4
    assert [run["settings"]["method"] for run in fake.runs()] == ["lora"] * 4


def test_an_environment_that_computes_another_base_is_refused(fake: Fake, tmp_path: Path) -> None:
    other = Fake(tmp_path, "other", probe=1.01)
    plan = plan_of(methods=[{"method": "lora"}, {"method": "pfeiffer"}], seeds=[0])
    runner = runner_of(fake, tmp_path / "r.jsonl", plan, adapters_python=str(other.path))
    runner.run()
    errors = [cell.error for cell in summarise(runner) if cell.method.startswith("pfeiffer")]
    assert all(error is not None and "base tiny computes other states than in earlier" in error for error in errors)


def test_a_base_is_compared_with_that_of_earlier_commands(fake: Fake, tmp_path: Path) -> None:
    """A folder under the same name, or another environment that has the last runs."""
    plan = plan_of(methods=[{"method": "lora"}], seeds=[0])
    runner_of(fake, tmp_path / "r.jsonl", plan).run(1)
    runner = runner_of(Fake(tmp_path, "other", probe=1.01), tmp_path / "r.jsonl", plan)
    runner.run()
    assert [cell.runs for cell in summarise(runner)] == [1, 0]


def test_a_base_in_another_form_is_another_base(fake: Fake, tmp_path: Path) -> None:
    methods = [{"method": "lora", "name": f"over {form}", "quantize": form} for form in ("none", "int4")]
    runner_of(fake, tmp_path / "r.jsonl", plan_of(methods=methods[:1])).run()
    runner = runner_of(Fake(tmp_path, "other", probe=1.01), tmp_path / "r.jsonl", plan_of(methods=methods))
    runner.run()
    assert [(cell.runs, cell.failed) for cell in summarise(runner)] == [(2, 0)] * 4


def test_an_environment_that_cannot_run_is_no_failed_run(fake: Fake, tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    runner = runner_of(fake, results, plan_of(methods=[{"method": "pfeiffer"}]), adapters_python="false")
    with pytest.raises(InvalidConfiguration, match="false cannot make runs: its process ended with status 1 before"):
        runner.run()
    assert ResultsFile(results).records == {}


def test_a_run_waits_for_what_is_held(fake: Fake, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    runner = runner_of(fake, tmp_path / "r.jsonl", plan_of(), hold=f"flock {lock} cat")
    with lock.open("w") as file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(file, fcntl.LOCK_EX)
        made = pool.submit(runner.run, 2)
        time.sleep(0.3)
        assert fake.runs() == []
        fcntl.flock(file, fcntl.LOCK_UN)
        made.result()
        # Nothing holds the lock after the runs.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(fake.runs()) == 2


def test_a_hold_that_does_not_answer_is_refused(fake: Fake, tmp_path: Path) -> None:
    for command in ("true", "no-such-command-at-all"):
        runner = runner_of(fake, tmp_path / "r.jsonl", plan_of(), hold=command)
        with pytest.raises(InvalidConfiguration, match="--hold"):
            runner.run()
    assert fake.runs() == []


def test_the_plot_has_a_panel_for_each_data_set(fake: Fake, tmp_path: Path) -> None:
    plan = plan_of(methods=[{"method": "lora", "rank": [4, 8]}, {"method": "head-only"}])
    runner = runner_of(fake, tmp_path / "r.jsonl", plan)
    assert not plot_scores(tmp_path / "none.png", summarise(runner))
    runner.run()
    assert plot_scores(tmp_path / "plot.png", summarise(runner))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "none.png").exists()


def test_names_are_no_formulas_and_sizes_may_be_equal(fake: Fake, tmp_path: Path) -> None:
    methods = [{"method": "lora", "rank": [4, 8], "name": "costs $x_{$"}]
    runner = runner_of(fake, tmp_path / "r.jsonl", plan_of(bases={"a $x^{$": {"base": "embedded"}}, methods=methods))
    runner.run()
    one, two = (cell for cell in summarise(runner) if cell.data == "one")
    equal = replace(two, parameters=one.parameters, mean=one.mean, deviation=None)
    assert plot_scores(tmp_path / "plot.png", [one, equal])


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def test_a_point_without_all_its_seeds_is_hollow(fake: Fake, tmp_path: Path, shown: list[Figure]) -> None:
    runner = runner_of(fake, tmp_path / "r.jsonl", plan_of(methods=[{"method": "lora", "rank": [4, 8]}]))
    runner.run()
    whole, few = (cell for cell in summarise(runner) if cell.data == "one")
    few = replace(few, runs=1, failed=1)
    for cells in ([whole, few], [whole]):
        plot_scores(tmp_path / "plot.png", cells)
    drawn = [[line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"] for figure in shown]
    assert [[line.get_markevery() for line in lines] for lines in drawn] == [[[1]], [[]]]
    words = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in shown]
    assert words == [["lora", "hollow: some seeds failed or are left"], ["lora"]]


def test_the_legend_of_one_panel_fits_the_picture(fake: Fake, tmp_path: Path, shown: list[Figure]) -> None:
    methods: list[dict[str, Any]] = [
        *({"method": "lora", "rank": 4, "name": f"a method {number}"} for number in range(5)),
        {"method": "head-only"},
    ]
    plan = plan_of(methods=methods)
    runner = runner_of(fake, tmp_path / "r.jsonl", plan)
    runner.run()
    cells = summarise(runner)
    assert plot_scores(tmp_path / "plot.png", [cell for cell in cells if cell.data == cells[0].data])
    (legend,) = shown[0].legends
    extent = legend.get_window_extent()
    assert shown[0].bbox.containsx(extent.x0) and shown[0].bbox.containsx(extent.x1)
