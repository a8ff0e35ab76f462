from pathlib import Path
from typing import Any

import pytest

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.settings import TrainSettings, load_options

REQUIRED: dict[str, Any] = {
    "base": "embedded",
    "store": "store",
    "name": "acme/spam",
    "task": "classify",
    "train": "rows.csv",
}


@pytest.mark.parametrize(
    ("method", "split", "use_mixer", "train_factors"),
    [
        ("sera", 16, True, ("a", "c", "b")),
        ("lora", 1, False, ("a", "b")),
        ("melora", 16, False, ("a", "b")),
        ("moslora", 1, True, ("a", "c", "b")),
        ("lora-fa", 1, False, ("b",)),
    ],
)
def test_a_method_sets_the_shape(method: str, split: int, use_mixer: bool, train_factors: tuple[str, ...]) -> None:
    config = load_options(None, REQUIRED | {"method": method, "rank": 16}).adapter_config()
    assert config is not None
    assert (config.split, config.use_mixer, config.train_factors) == (split, use_mixer, train_factors)
    assert config.scaling == 2.0


@pytest.mark.parametrize(("method", "rate"), [("sera", 1e-2), ("lora", 3e-3)])
def test_the_learning_rate_is_the_methods_unless_given(method: str, rate: float) -> None:
    assert load_options(None, REQUIRED | {"method": method}).peak_learning_rate == rate
    assert load_options(None, REQUIRED | {"method": method, "learning_rate": 0.5}).peak_learning_rate == 0.5


def test_head_only_has_no_adapter() -> None:
    assert load_options(None, REQUIRED | {"method": "head-only"}).adapter_config() is None


def test_targets_and_factors_from_one_flag() -> None:
    settings = load_options(None, REQUIRED | {"target_modules": "q_proj, v_proj", "train_factors": "c,b"})
    config = settings.adapter_config()
    assert config is not None
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.train_factors == ("c", "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora", "split": 4}, "leave --split out, or take method melora"),
        ({"method": "sera", "rank": 1}, "take a rank of at least 2 and a split above 1, or method moslora"),
        ({"method": "sera", "split": 1}, "or method moslora"),
        ({"rank": 16, "split": 3}, r"split 3 does not divide rank 16; choose one of \[1, 2, 4, 8, 16\]"),
        ({"method": "lora", "train_factors": "c"}, "this method trains a,b"),
        ({"train_factors": []}, "train_factors is empty; this method trains a,c,b"),
        ({"method": "head-only", "rank": 8}, "--rank has no meaning for method head-only"),
        (
            {"method": "head-only", "learning_rate": 0.01, "head_learning_rate": 0.1},
            "--learning-rate is not read by method head-only beside --head-learning-rate; leave it out",
        ),
        ({"method": "head-only", "task": "generate"}, "no head to train for task generate"),
        ({"prompt_column": "p", "completion_column": "c"}, "--prompt-column is for task generate"),
        ({"task": "generate", "label_column": "x"}, "--label-column is for tasks classify, regress"),
        ({"task": "generate", "prompt_column": "p"}, "--prompt-column needs --completion-column"),
        (
            {"task": "generate", "messages_column": "m", "completion_column": "c"},
            "excludes --prompt-column and --completion-column",
        ),
        ({"chat_template": "t.jinja"}, "--chat-template is for task generate"),
        (
            {"task": "generate", "chat_template": "t.jinja", "completion_column": "c"},
            "--chat-template needs a question for each answer; give --prompt-column too",
        ),
        (
            {"task": "token-classify", "tokens_column": "words", "text_column": "sentence"},
            "--text-column is not read beside --tokens-column and --tags-column; leave it out",
        ),
        ({"task": "generate", "select_by": "accuracy"}, "no metric of task generate; take loss"),
        (
            {"eval": "e.csv", "eval_fraction": 0.2},
            "--eval-fraction holds a part of --train out without --eval; leave one of the two out",
        ),
        ({"name": "acme"}, "--name 'acme': adapter id is 'acme'; write tenant/name"),
        ({"name": "../evil"}, "--name"),
        ({"epochs": 0}, "--epochs 0: input should be greater than or equal to 1"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"method": "lorra"}, "--method 'lorra': input should be 'sera', 'lora'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        load_options(None, REQUIRED | options)


@pytest.mark.parametrize("encoding", ["utf-7", "UTF7", "unicode_escape", "raw-unicode-escape"])
def test_encodings_that_write_halves_of_characters_are_refused(encoding: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"--encoding .*half of a surrogate pair.*save the file as UTF-8"):
        load_options(None, REQUIRED | {"encoding": encoding})


def test_null_in_a_file_is_an_option_that_is_left_out(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("budget: null\nsplit: null\nlora_alpha: null\nlora_plus_ratio: null\nrank_pattern: null\n")
    assert load_options(config, REQUIRED).identity() == load_options(None, REQUIRED).identity()
    assert load_options(config, REQUIRED | {"method": "head-only"}).budget is None
    assert load_options(config, REQUIRED | {"init_from": "acme/other"}).split is None
    config.write_text("budget: null\nbudget_warmup: 0.2\n")
    with pytest.raises(InvalidConfiguration, match="--budget-warmup belongs to --budget"):
        load_options(config, REQUIRED)


def test_a_yaml_file_is_overridden_by_flags(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("rank: 32\nepochs: 5\ntarget_modules: [q_proj, v_proj]\nresume: false\n")
    settings = load_options(config, REQUIRED | {"epochs": 7, "rank": None})
    assert (settings.rank, settings.epochs, settings.target_modules) == (32, 7, ("q_proj", "v_proj"))
    assert settings.resume is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rankk: 3", "unknown option 'rankk'; did you mean 'rank'?"),
        ("learning-rate: 3", "unknown option 'learning-rate'; did you mean 'learning_rate'?"),
        ("zzzz: 3", "unknown option 'zzzz'; the options are base, store, name"),
        ("- a\n- b", "must hold `option: value` lines"),
        ("a: [", "is not valid YAML"),
        ("description: 2024-13-45", "is not valid YAML"),
    ],
)
def test_a_wrong_yaml_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(InvalidConfiguration) as caught:
        load_options(config, REQUIRED)
    assert message in caught.value.message


def test_missing_options_are_named_together() -> None:
    with pytest.raises(InvalidConfiguration, match=r"missing --store, --task; give it as a flag or in --config"):
        load_options(None, {"base": "embedded", "name": "a/b", "train": "rows.csv"})


def test_where_a_run_is_kept_does_not_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = TrainSettings(**REQUIRED)
    other = TrainSettings(**(REQUIRED | {"store": "elsewhere", "train": "copy.csv", "work_dir": "w"}))
    assert one.identity() == other.identity()
    assert one.identity() != TrainSettings(**(REQUIRED | {"seed": 1})).identity()
    assert one.default_work_dir() == Path("store.training/acme/spam").absolute()
    monkeypatch.chdir(tmp_path)
    for store, folder in (("", tmp_path), (".", tmp_path), ("..", tmp_path.parent), ("a/../b/", tmp_path / "b")):
        beside = one.model_copy(update={"store": Path(store)}).default_work_dir()
        assert beside == Path(f"{folder}.training/acme/spam")
