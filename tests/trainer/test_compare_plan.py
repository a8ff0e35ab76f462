"""The plan of a comparison: sizes, order, the rule for learning rates, the names of runs, and refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from trainer_samples import ending_rule, write_csv
from typer.testing import CliRunner

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.compare.command import compare_command
from sera_serve.trainer.compare.learning_rates import LearningRateRule
from sera_serve.trainer.compare.plan import Cell, ComparePlan, RunSpec, read_plan
from sera_serve.trainer.compare.runner import CompareRunner, judge

PLANS = Path(__file__).parents[2] / "examples" / "paper"
RULE = LearningRateRule(ladder=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], start=[3e-4, 1e-3], seed=9)


def plan_of(**changes: Any) -> dict[str, Any]:
    """A small plan as YAML would give it."""
    return {
        "bases": {"tiny": {"base": "embedded", "target_modules": "q_proj,v_proj"}},
        "data": {"one": {"train": "one.csv", "test": "one.csv"}, "two": {"train": "two.csv", "score": "matthews"}},
        "methods": [{"method": "sera", "rank": [8, 16]}, {"method": "vera", "rank": 64}, {"method": "head-only"}],
        "seeds": [0, 1],
        "settings": {"epochs": 1},
        **changes,
    }


def test_every_size_runs_on_every_data_set_with_every_seed() -> None:
    plan = ComparePlan.model_validate(plan_of())
    runs = [(cell.data, cell.variant.label, seed) for cell, seed in plan.ordered()]
    labels = ["sera r=8", "sera r=16", "vera r=64", "head-only"]
    assert runs == [(data, label, seed) for seed in (0, 1) for data in ("one", "two") for label in labels]


def test_the_order_of_the_loops_can_be_chosen() -> None:
    plan = ComparePlan.model_validate(plan_of(order=["method", "data", "base", "seed"]))
    first = [(cell.variant.label, cell.data, seed) for cell, seed in plan.ordered()][:3]
    assert first == [("sera r=8", "one", 0), ("sera r=8", "one", 1), ("sera r=8", "two", 0)]


def test_a_spec_has_the_options_of_base_data_method_and_plan() -> None:
    plan = ComparePlan.model_validate(plan_of())
    cell = plan.cells()[4]
    spec = plan.spec(cell, 1, 0.02, "score")
    assert (cell.data, cell.variant.label) == ("two", "sera r=8")
    assert spec.baseline is None
    assert spec.settings == {
        "base": "embedded",
        "task": "classify",
        "train": "two.csv",
        "method": "sera",
        "rank": 8,
        "target_modules": ["q_proj", "v_proj"],
        "epochs": 1,
        "learning_rate": 0.02,
        "select_by": "matthews",
        "seed": 1,
    }


def test_the_part_that_is_held_out_is_for_data_without_a_file_of_its_own() -> None:
    data = {
        "one": {"train": "one.csv", "eval": "e.csv", "task": "classify"},
        "two": {"train": "two.csv", "task": "classify"},
    }
    data["two"]["test"] = "test.csv"
    for fraction, chosen in ((0.3, "accuracy"), (0, None)):
        plan = ComparePlan.model_validate(plan_of(data=data, settings={"eval_fraction": fraction}))
        specs = {cell.data: plan.spec(cell, 0, None, "score").settings for cell in plan.cells()}
        assert "eval_fraction" not in specs["one"] and specs["one"]["select_by"] == "accuracy"
        assert specs["two"]["eval_fraction"] == fraction and specs["two"].get("select_by") == chosen


def test_a_run_for_a_rate_reads_no_test_rows() -> None:
    plan = ComparePlan.model_validate(plan_of())
    cell = plan.cells()[0]
    assert plan.spec(cell, 0, 0.1, "score").settings["test"] == "one.csv"
    assert "test" not in plan.spec(cell, 0, 0.1, "rate").settings


def test_head_only_has_no_targets() -> None:
    plan = ComparePlan.model_validate(plan_of())
    assert "target_modules" not in plan.spec(plan.cells()[3], 0, None, "score").settings


def test_the_name_of_a_run_depends_on_the_contents_of_its_files(tmp_path: Path) -> None:
    def digest(folder: str, seed: int) -> str:
        train = write_csv(tmp_path / folder / "one.csv", ending_rule(8, seed))
        plan = ComparePlan.model_validate(plan_of(data={"one": {"train": str(train)}}))
        return plan.spec(plan.cells()[0], 0, None, "score").digest

    for folder in "abc":
        (tmp_path / folder).mkdir()
    assert digest("a", 1) == digest("b", 1) != digest("c", 2)


def test_the_name_of_a_run_depends_on_the_contents_of_its_folders(tmp_path: Path) -> None:
    def digest(folder: str, content: bytes, option: str) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.arrow").write_bytes(content)
        data = {"train": "one.csv", "task": "image-classify", option: str(tmp_path / folder)}
        plan = ComparePlan.model_validate(plan_of(data={"one": data}))
        return plan.spec(plan.cells()[0], 0, None, "score").digest

    assert digest("a", b"0101", "train") == digest("b", b"0101", "train") != digest("c", b"1010", "train")
    assert digest("d", b"0101", "images") == digest("e", b"0101", "images") != digest("f", b"1010", "images")


@pytest.mark.parametrize("use", ["train", "test"])
@pytest.mark.parametrize("column", ["image", "file_name", "picture"])
def test_the_name_of_a_run_depends_on_the_images_that_its_tables_name(tmp_path: Path, column: str, use: str) -> None:
    def digest(folder: str, content: bytes, **options: str) -> str:
        (tmp_path / folder).mkdir()
        table = tmp_path / folder / "rows.csv"
        table.write_text(f"{column},label\na.png,x\nabsent.png,y\na.png,x\n")
        (table.parent / "a.png").write_bytes(content)
        data = {"train": "one.csv", "task": "image-classify", use: str(table), **options}
        if column == "picture":
            data["image_column"] = column
        plan = ComparePlan.model_validate(plan_of(data={"one": data}))
        return plan.spec(plan.cells()[0], 0, None, "score").digest

    assert digest("a", b"0101") == digest("b", b"0101") != digest("c", b"1010")
    (tmp_path / "pictures").mkdir()
    elsewhere = str(tmp_path / "pictures")
    assert digest("d", b"0101", images=elsewhere) == digest("e", b"1010", images=elsewhere)


def specs_of(**changes: Any) -> dict[str, RunSpec]:
    """The first run of each method on the first data set, by the label of the method."""
    plan = ComparePlan.model_validate(plan_of(**changes))
    return {cell.variant.label: plan.spec(cell, 0, None, "score") for cell in plan.cells() if cell.data == "one"}


def test_a_method_without_a_rank_has_that_of_the_other_options() -> None:
    methods = [{"method": "sera"}, {"method": "lora", "rank": 4}, {"method": "peft-lora"}, {"method": "head-only"}]
    for settings, rank in (({"epochs": 1, "rank": 32}, 32), ({"epochs": 1}, 8)):
        specs = specs_of(methods=methods, settings=settings)
        assert list(specs) == [f"sera r={rank}", "lora r=4", f"peft-lora r={rank}", "head-only"]
        own, given, baseline, head = specs.values()
        assert (own.settings["rank"], given.settings["rank"]) == (rank, 4)
        assert baseline.baseline is not None and baseline.baseline["rank"] == rank
        assert "rank" not in head.settings
    base = {"tiny": {"base": "embedded", "rank": 16}}
    specs = specs_of(methods=methods, bases=base, settings={"rank": 32})
    assert list(specs) == ["sera", "lora r=4", "peft-lora", "head-only"]
    assert (specs["sera"].settings["rank"], specs["lora r=4"].settings["rank"]) == (16, 4)
    assert specs["peft-lora"].baseline is not None and specs["peft-lora"].baseline["rank"] == 16
    # A run has the same name wherever its rank is given.
    given = specs_of(methods=[{"method": "sera", "rank": 16}], bases={"tiny": {"base": "embedded"}}, settings={})
    assert given["sera r=16"].digest == specs["sera"].digest


@pytest.mark.parametrize(
    ("task", "score", "expected"),
    [
        ("classify", None, "micro_f1"),
        ("image-classify", None, "micro_f1"),
        ("classify", "subset_accuracy", "subset_accuracy"),
    ],
)
def test_sets_of_labels_have_scores_of_their_own(task: str, score: str | None, expected: str) -> None:
    data = {"train": "one.csv", "task": task, "multi_label": True} | ({"score": score} if score else {})
    plan = ComparePlan.model_validate(plan_of(data={"one": data}))
    assert plan.score_of("one") == expected
    assert plan.spec(plan.cells()[0], 0, None, "score").settings["select_by"] == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({}, 3e-4),
        ({3e-4: 0.5}, 1e-3),
        ({3e-4: 0.5, 1e-3: 0.6}, 3e-3),
        ({3e-4: 0.6, 1e-3: 0.5}, 1e-4),
        ({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.5}, None),
        ({3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.7}, 1e-2),
        ({1e-4: 0.7, 3e-4: 0.6, 1e-3: 0.5}, None),
        ({3e-4: -math.inf, 1e-3: -math.inf}, 1e-4),
    ],
)
def test_rates_are_tried_until_the_best_has_neighbours(scores: dict[float, float], expected: float | None) -> None:
    assert RULE.next_rate({rate: (score, -1.0) for rate, score in scores.items()}) == expected


def test_of_equal_scores_the_lower_loss_and_then_the_lower_rate_wins() -> None:
    assert RULE.best({3e-4: (0.5, -0.7), 1e-3: (0.5, -0.6), 3e-3: (0.4, -0.1)}) == 1e-3
    assert RULE.best({3e-4: (0.5, -0.7), 1e-3: (0.5, -0.7)}) == 3e-4


def test_a_loss_is_better_when_it_is_lower() -> None:
    records = [{"score": 2.0, "metrics": {"loss": 2.0}}, {"score": 0.5, "metrics": {"loss": 1.0}}]
    assert judge(records, ["loss", "accuracy"]) == (-0.75, -1.5)
    assert judge([*records, {"error": "no"}], ["loss"] * 3) == (-math.inf, -math.inf)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"methods": [{"method": "loar"}]}, "method 'loar' is unknown; choose one of sera"),
        ({"methods": [{"method": "sera", "rnak": 8}]}, "unknown option 'rnak'"),
        ({"methods": [{"method": "lora", "data": []}]}, "methods.0.data: List should have at least 1 item"),
        (
            {"settings": {"learning_rate": 0.01}, "learning_rates": {"ladder": [1e-3], "start": [1e-3]}},
            "settings: learning_rate is chosen by learning_rates; take one of the two out",
        ),
        ({"methods": [{"method": "lora", "rank": [8, 8]}]}, "two methods have the name 'lora r=8'"),
        ({"methods": [{"method": "lora", "data": ["three"]}]}, "'three' is not in the plan; it has one, two"),
        ({"methods": [{"method": "sera", "rank": 8, "split": 3}]}, "sera r=8 split=3 on one over tiny: "),
        ({"methods": [{"method": "sera", "rank": []}]}, "at least 1 item"),
        ({"methods": [{"method": "sera", "rank": 0}]}, "greater than or equal to 1"),
        ({"methods": [{"method": "full", "rank": 8}]}, "rank has no meaning for method full; leave it out"),
        ({"methods": [{"method": "lora", "blocks": 8}]}, "blocks has no meaning for method lora; leave it out"),
        ({"methods": [{"method": "vera", "reduction_factor": 8}]}, "reduction_factor has no meaning for method vera"),
        ({"methods": [{"method": "peft-lora", "split": 4}]}, "split has no meaning for method peft-lora; leave it out"),
        ({"methods": [{"method": "dora", "budget": 4}]}, "budget has no meaning for method dora; leave it out"),
        ({"methods": [{"method": "bd-lora", "train_factors": "b"}]}, "train_factors has no meaning for method bd-lora"),
        ({"methods": [{"method": "adalora", "rank_pattern": "q_proj=2"}]}, "rank_pattern has no meaning for method"),
        ({"methods": [{"method": "vera", "lora_alpha": 4}]}, "lora_alpha has no meaning for method vera; leave it out"),
        ({"methods": [{"method": "vera", "lora_plus_ratio": 4}]}, "vera r=8: lora_plus_ratio sets the learning rate"),
        ({"settings": {"lora_plus_ratio": 4}}, "vera r=64: lora_plus_ratio sets the learning rate of B, and vera has"),
        ({"settings": {"task": "clasify"}}, "sera r=8 on one over tiny: task: "),
        ({"settings": {"seed": 3}}, "settings: seed is set by the comparison"),
        ({"settings": {"checkpoint_seconds": 9}}, "settings: checkpoint_seconds is set by the comparison"),
        ({"bases": {"tiny": {"base": "embedded", "plot": "a.png"}}}, "bases.tiny: plot is set by the comparison"),
        ({"settings": {"rank_pattern": "q_proj=2"}}, "vera r=64: rank_pattern has no meaning for method vera; give it"),
        ({"settings": {"budget": 4}}, "vera r=64: budget has no meaning for method vera; give it in the methods"),
        (
            {"methods": [{"method": "sera"}, {"method": "adalora"}], "settings": {"patience": 2}},
            "adalora r=8: patience could end a run before its ranks have fallen",
        ),
        (
            {"methods": [{"method": "sera"}, {"method": "full"}], "settings": {"quantize": "int8"}},
            "full: quantize is int8, and full fine-tuning trains every weight",
        ),
        (
            {"data": {"one": {"train": "one.csv", "eval_fraction": 0}}},
            "sera r=8 on one over tiny: eval_fraction is 0, and no row is left to score by; give eval, or",
        ),
        (
            {
                "data": {"one": {"train": "one.csv", "test": "one.csv", "eval_fraction": 0}},
                "learning_rates": {"ladder": [1e-3], "start": [1e-3]},
            },
            "sera r=8 on one over tiny: eval_fraction is 0, and no row is left to choose a learning rate by; give eval",
        ),
        ({"settings": {"epochs": "many"}}, "sera r=8 on one over tiny: epochs: "),
        ({"seeds": [0, 0]}, "seeds has a seed twice"),
        ({"seeds": []}, "seeds: "),
        (
            {"data": {"one": {"train": "one.csv", "score": "acuracy"}, "two": {"train": "two.csv"}}},
            "data.one.score is 'acuracy', and its runs have accuracy, loss, macro_f1, matthews; did you mean 'accur",
        ),
        ({"order": ["seed", "base"]}, "order must name each of seed, base, data, method once"),
        ({"learning_rates": {"ladder": [1e-3, 1e-2], "start": [1e-3], "seed": 1}}, "learning_rates.seed 1 is one of"),
        ({"learning_rates": {"ladder": [1e-2, 1e-3], "start": [1e-3]}}, "ladder must be ascending"),
        ({"learning_rates": {"ladder": [1e-3, 1e-2], "start": [1e-4]}}, "start must be neighbouring rates"),
        ({"learning_rates": {"ladder": [1e-3], "start": [1e-3], "data": ["x"]}}, "learning_rates.data: data set 'x'"),
        ({"bases": {"tiny": {"base": "package:no_such_package/model"}}}, "'no_such_package' is not installed"),
        ({"sedes": [1]}, "sedes: "),
    ],
)
def test_an_impossible_plan_is_refused_by_the_place_of_its_fault(
    tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan_of(**changes)))
    with pytest.raises(InvalidConfiguration) as caught:
        read_plan(path)
    assert fault in caught.value.message


def test_files_that_are_not_there_are_told_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("plan.yaml")
    train = write_csv(tmp_path / "one.csv", ending_rule(8))
    options = {"one": {"train": "one.csv", "eval": "hub:owner/name"}, "two": {"train": str(train), "test": "no.csv"}}
    path.write_text(yaml.safe_dump(plan_of(data=options, settings={"eval": "gone/eval.csv"})))
    done = CliRunner().invoke(_app(), ["compare", str(path)])
    assert done.exit_code == 2
    assert "plan plan.yaml: settings.eval is gone/eval.csv; data.two.test is no.csv: no such file or" in done.stderr
    assert not list(tmp_path.glob("*.jsonl"))
    plan = ComparePlan.model_validate(plan_of(data={"one": {"train": "one.csv"}, "two": {"train": "hub:owner/name"}}))
    plan.check_files(path)


def test_no_table_is_written_over_the_rows_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").symlink_to(tmp_path)
    rows = write_csv(tmp_path / "words.csv", ending_rule(8)).read_bytes()
    Path("words.yaml").write_text(yaml.safe_dump(plan_of(data={"one": {"train": "there/words.csv"}})))
    done = CliRunner().invoke(_app(), ["compare", "words.yaml", "--limit", "0"])
    assert done.exit_code == 2
    assert "words.csv would be written over data.one.train (there/words.csv); give another --output" in done.stderr
    assert Path("words.csv").read_bytes() == rows
    done = CliRunner().invoke(_app(), ["compare", "words.yaml", "--limit", "0", "--output", "tables"])
    assert done.exit_code == 0 and Path("tables/words.csv").is_file()
    # It is refused before the first run.
    Path("taken").touch()
    done = CliRunner().invoke(_app(), ["compare", "words.yaml", "--limit", "0", "--output", "taken"])
    assert done.exit_code == 2 and "taken" in done.stderr
    # In a folder of rows, it would change the names of all runs.
    folder = plan_of(data={"one": {"train": ".", "task": "image-classify"}})
    with pytest.raises(InvalidConfiguration, match=r"tables/x.md would be written into data.one.train"):
        ComparePlan.model_validate(folder).check_outputs(Path("words.yaml"), [Path("tables/x.md")])


def test_a_disk_that_is_full_is_told_by_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(runner: CompareRunner, limit: int | None = None) -> None:
        # As of a write: the system names no file.
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CompareRunner, "run", full)
    path = tmp_path / "plan.yaml"
    train = str(write_csv(tmp_path / "one.csv", ending_rule(8)))
    path.write_text(yaml.safe_dump(plan_of(data={"one": {"train": train}})))
    done = CliRunner().invoke(_app(), ["compare", str(path)])
    assert (done.exit_code, done.stderr) == (1, "train_adapter compare: No space left on device\n")


def test_a_script_hears_of_a_run_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    train = str(write_csv(tmp_path / "one.csv", ending_rule(8)))
    path.write_text(yaml.safe_dump(plan_of(data={"one": {"train": train}}, methods=[{"method": "head-only"}])))
    plan = read_plan(path)
    first, second = (plan.spec(plan.cells()[0], seed, None, "score") for seed in plan.seeds)
    figures = {"parameters": 0, "head_parameters": 9, "peak_memory_mb": 1.0, "step_ms": 1.0, "learning_rate": None}
    results = tmp_path / "plan.results.jsonl"
    results.write_text(json.dumps({"run": first.digest, "score": 0.5, **figures}) + "\n")
    app, asked = _app(), ["compare", str(path), "--limit", "0", "--json"]
    done = CliRunner().invoke(app, asked)
    assert (done.exit_code, done.stderr) == (0, ""), "a run that is left has not failed"
    with results.open("a") as file:
        file.write(json.dumps({"run": second.digest, "error": "no\nroom", "learning_rate": None}) + "\n")
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1
    which, last = done.stderr.splitlines()
    assert which == "tiny one head-only: 1 of 2 runs failed: no room"
    assert last.startswith("train_adapter compare: ") and "--retry-failed" in last
    assert json.loads(done.stdout.splitlines()[-1])["cells"][0]["failed"] == 1


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command("compare")(compare_command)
    # With a callback, the command keeps its name.
    app.callback()(lambda: None)
    return app


@pytest.mark.parametrize("text", ["- a", "", "bases: [", "\x00"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InvalidConfiguration, match="plan "):
        read_plan(path)


def test_a_base_can_be_taken_from_another_place(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan_of()))
    plan, moved = read_plan(path), read_plan(path, {"tiny": "/elsewhere"})
    runs = [p.spec(Cell("tiny", "one", p.variants()[0]), 0, None, "score") for p in (plan, moved)]
    assert runs[1].settings["base"] == "/elsewhere"
    assert runs[0].digest == runs[1].digest
    with pytest.raises(InvalidConfiguration, match="the plan has no base 'big'; it has tiny"):
        read_plan(path, {"big": "/elsewhere"})


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_of_the_paper_are_valid(path: Path) -> None:
    plan = yaml.safe_load(path.read_text())
    # A package need not be installed to check a plan.
    places = {name: "embedded" for name, base in plan["bases"].items() if base["base"].startswith("package:")}
    assert read_plan(path, places).ordered()
