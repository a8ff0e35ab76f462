"""Whole runs on small bases: what is learned, what stays untouched, what is published."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_samples import beginning_rule, ending_rule, settings_for, write_csv, write_jsonl
from transformers import TrainingArguments

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import attached_layers, count_adapter_parameters
from sera_serve.trainer.data.targets import load_classify_data
from sera_serve.trainer.loop import training_arguments
from sera_serve.trainer.parallel import Processes
from sera_serve.trainer.run import TrainingFailed, train_adapter
from sera_serve.trainer.tasks import ClassifyTask
from support.factories import encoded


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "rows.csv", ending_rule(120))


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


@pytest.mark.parametrize("seen", [0, 1, 4])
def test_a_process_trains_on_one_gpu_however_many_it_sees(
    seen: int, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: seen))
    settings = settings_for(Path("tiny"), tmp_path, rows, batch_size=16)
    arguments = training_arguments(settings, tmp_path, evaluates=False, processes=Processes(), leaves_out=None)
    assert (arguments.n_gpu, arguments.train_batch_size) == (min(seen, 1), 16)


METHODS: list[dict[str, Any]] = [
    {"method": "sera"},
    {"method": "sera", "rank": 8, "split": 4, "target_modules": "q_proj,v_proj", "train_factors": "b,c"},
    {"method": "lora"},
    {"method": "melora"},
    {"method": "moslora"},
    {"method": "lora-fa"},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_base_stays_bit_for_bit_and_parameters_are_counted(
    base: FrozenBase, rows: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    settings = settings_for(Path("tiny"), tmp_path, rows, epochs=1, dropout=0.1, **options)
    config = settings.adapter_config()
    assert config is not None
    result = train_adapter(settings, base=base)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert result.parameters == count_adapter_parameters(base.model, config)
    assert result.head_parameters == 2 * 32 + 2
    stored = AdapterStore(settings.store).load(result.digest)
    moved = {name.rpartition(".")[2] for name, tensor in stored.tensors.items() if tensor.any()}
    assert {"sera_b", "weight", "bias"} <= moved
    assert stored.config.method == options["method"]


def test_factors_that_do_not_train_keep_their_values(base: FrozenBase, rows: Path, tmp_path: Path) -> None:
    settings = settings_for(Path("tiny"), tmp_path, rows, method="lora-fa", epochs=1)
    store = AdapterStore(settings.store)
    one = store.load(train_adapter(settings, base=base).digest)
    other = store.load(train_adapter(settings.model_copy(update={"epochs": 2}), base=base).digest)
    for name in one.tensors:
        same = torch.equal(one.tensors[name], other.tensors[name])
        assert same == name.endswith("sera_a"), name


@pytest.mark.slow
def test_sera_learns_where_a_head_alone_cannot(stories: Path, tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "rows.csv", beginning_rule(300))
    test = write_csv(tmp_path / "test.csv", beginning_rule(200, seed=1))
    base = load_base(str(stories))
    options: dict[str, Any] = {"test": test, "epochs": 4, "learning_rate": 1e-2}
    sera = train_adapter(settings_for(stories, tmp_path, rows, **options), base=base)
    head = train_adapter(settings_for(stories, tmp_path, rows, method="head-only", **options), base=base)
    assert sera.metrics["test_accuracy"] > 0.9
    assert sera.metrics["test_matthews"] > 0.8
    assert sera.metrics["test_accuracy"] > head.metrics["test_accuracy"] + 0.1


def test_a_generator_learns_and_says_how_well(stories: Path, tmp_path: Path) -> None:
    pairs = {"red": "apples", "blue": "waters", "green": "leaves", "gray": "stones"}
    rows = [
        {"prompt": f"{key} things number {i}:", "completion": value} for i in range(30) for key, value in pairs.items()
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = settings_for(stories, tmp_path, path, task="generate", learning_rate=2e-2, epochs=6)
    base = load_base(str(stories))
    # Its end-of-text embedding is near zero and tied to the output, so no adapter can make this base end a text.
    base.tokenizer.eos_token = None
    result = train_adapter(settings, base=base)
    assert result.head_parameters == 0
    # Who ignores the prompt pays log 4 nats a row for 4 equally likely completions, 0.35 a token.
    assert result.metrics["loss"] < 0.15
    assert result.metrics["perplexity"] == pytest.approx(torch.tensor(result.metrics["loss"]).exp().item(), rel=1e-5)
    config = AdapterStore(settings.store).load(result.digest).config
    assert config.training["metrics"] == result.metrics
    assert (config.task, config.labels, config.pooling, config.max_length) == ("generate", None, None, None)


def test_the_stored_adapter_scores_what_was_reported(base: FrozenBase, rows: Path, tmp_path: Path) -> None:
    settings = settings_for(Path("tiny"), tmp_path, rows, eval=rows, epochs=3, learning_rate=1e-2)
    result = train_adapter(settings, base=base)
    bundle = AdapterStore(settings.store).load(result.digest)
    # By hand, as a server would: base with the dense updates merged, one text at a time.
    modules = dict(base.model.named_modules())
    for path, spec in bundle.config.modules.items():
        a, c, b = (bundle.tensors[f"{path}.sera_{factor}"] for factor in "acb")
        dense_a = torch.block_diag(*a.view(spec.split, -1, spec.segment_rank))
        dense_b = torch.block_diag(*b.view(spec.segment_rank, spec.split, -1).transpose(0, 1))
        modules[path].weight.data += spec.scaling * (dense_a @ c @ dense_b).T  # type: ignore[operator]
    correct = 0
    texts = load_classify_data(settings).eval
    for item in texts:
        assert bundle.config.max_length is not None and bundle.config.pooling is not None
        tokens = encoded(base, [item.text], bundle.config.max_length)
        state = base.pooled_states(*tokens, bundle.config.pooling)
        logits = state @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]
        assert bundle.config.labels is not None
        correct += bundle.config.labels[int(logits.argmax())] == item.target
    assert correct / len(texts) == result.metrics["accuracy"] > 0.6


def test_the_best_epoch_is_kept(base: FrozenBase, rows: Path, tmp_path: Path) -> None:
    # Labels of the evaluation rows turned round: every epoch of learning makes them worse.
    turned = [[text, "other" if label == "animal" else "animal"] for text, label in ending_rule(60)]
    other = write_csv(tmp_path / "eval.csv", turned)
    settings = settings_for(Path("tiny"), tmp_path, rows, eval=other, epochs=4, learning_rate=1e-2, select_by="loss")
    result = train_adapter(settings, base=base)
    training = AdapterStore(settings.store).load(result.digest).config.training
    assert training["chosen_step"] == 15
    assert training["metrics"] == result.metrics


def test_equal_runs_give_one_version(base: FrozenBase, rows: Path, tmp_path: Path) -> None:
    settings = settings_for(Path("tiny"), tmp_path, rows, dropout=0.2)
    results = [train_adapter(settings, base=base) for _ in range(2)]
    other = train_adapter(settings.model_copy(update={"seed": 1}), base=base)
    assert results[0].digest == results[1].digest != other.digest
    assert [result.version for result in [*results, other]] == [1, 1, 2]
    assert not (tmp_path / "store.training").exists()
    assert not attached_layers(base.model)


def test_cached_states_give_what_the_base_gives(base: FrozenBase, rows: Path, tmp_path: Path) -> None:
    settings = settings_for(Path("tiny"), tmp_path, rows, pooling="last_token")
    data = load_classify_data(settings)
    tasks = []
    for method in ("sera", "head-only"):
        torch.manual_seed(5)
        tasks.append(ClassifyTask(settings.model_copy(update={"method": method}), base, data, 64))
    torch.testing.assert_close(tasks[0].logits(tasks[0].eval_rows), tasks[1].logits(tasks[1].eval_rows))
    assert tasks[0].evaluate(tasks[0].eval_rows)["accuracy"] == tasks[1].evaluate(tasks[1].eval_rows)["accuracy"]


@pytest.mark.parametrize("method", ["sera", "head-only"])
def test_an_encoder_pools_its_first_token(tiny_encoder: Path, rows: Path, tmp_path: Path, method: str) -> None:
    options = {"target_modules": "query,value"} if method == "sera" else {}
    settings = settings_for(tiny_encoder, tmp_path, rows, method=method, epochs=1, max_length=16, **options)
    result = train_adapter(settings)
    config = AdapterStore(settings.store).load(result.digest).config
    assert (config.pooling, config.max_length) == ("cls", 16)
    assert any("training rows were cut to 16 tokens" in note for note in result.notes)


def test_no_evaluation_keeps_the_last_epoch(base: FrozenBase, rows: Path, tmp_path: Path) -> None:
    result = train_adapter(
        settings_for(Path("tiny"), tmp_path, rows, eval_fraction=0, head_learning_rate=0.1), base=base
    )
    assert result.metrics == {}
    assert AdapterStore(tmp_path / "store").load(result.digest).config.training["chosen_step"] == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, "--max-length 65 exceeds the 64 tokens"),
        ({"rank": 64, "split": 64}, "split 64 does not divide the widths"),
        ({"target_modules": "q_prj"}, "matches no linear layer of this base; it has q_proj"),
    ],
)
def test_settings_that_do_not_fit_the_base(
    base: FrozenBase, rows: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        train_adapter(settings_for(Path("tiny"), tmp_path, rows, **options), base=base)
    assert not attached_layers(base.model)


def test_an_encoder_cannot_generate(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    with pytest.raises(InvalidConfiguration, match="is an encoder, which cannot generate"):
        train_adapter(settings_for(tiny_encoder, tmp_path, rows, task="generate", target_modules="query"))


def test_a_metric_that_is_no_number_is_told_before_anything_is_published(
    base: FrozenBase, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassifyTask, "evaluate", lambda task, rows: {"loss": math.nan, "accuracy": 0.5})
    settings = settings_for(Path("tiny"), tmp_path, rows, epochs=1, eval_fraction=0.0, test=rows)
    with pytest.raises(
        TrainingFailed, match=r"test_loss of the trained adapter is nan; lower --learning-rate"
    ) as found:
        train_adapter(settings, base=base)
    assert found.value.param == "learning_rate"
    assert not AdapterStore(settings.store).count_adapters()


def test_a_run_that_diverges_says_so(base: FrozenBase, rows: Path, tmp_path: Path) -> None:
    base.model.lm_head.weight.data.fill_(0)
    base.model.model.norm.weight.data.fill_(float("inf"))
    rates = r"lower --learning-rate \(now 0.01\) or --head-learning-rate \(now 0.1\)"
    with pytest.raises(TrainingFailed, match=rf"the loss is nan at step \d+; {rates}"):
        train_adapter(settings_for(Path("tiny"), tmp_path, rows, head_learning_rate=0.1), base=base)
    assert list(AdapterStore(tmp_path / "store").iter_adapters()) == []
