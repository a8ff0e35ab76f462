"""The curves of a run: the picture, TensorBoard's events, and that neither changes the adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainer_samples import ending_rule, settings_for, write_csv
from transformers import TrainerCallback

from adapters_store import AdapterStore
from sera_serve.base import load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer import run
from sera_serve.trainer.curves import check_plot, evaluations, plot_curves
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import load_options

HISTORY: list[dict[str, Any]] = [
    {"epoch": 0.5, "step": 5, "loss": 2.0, "learning_rate": 0.1},
    {"epoch": 1.0, "step": 10, "eval_loss": 1.5, "eval_accuracy": 0.5},
    {"epoch": 1.5, "step": 15, "loss": 1.0},
    {"epoch": 2.0, "step": 20, "eval_loss": 1.0, "eval_accuracy": float("nan")},
    {"epoch": 2.0, "step": 20, "train_runtime": 3.0, "train_loss": 1.5},
]


def test_evaluations_of_a_history() -> None:
    assert evaluations(HISTORY) == [
        {"epoch": 1, "loss": 1.5, "accuracy": 0.5},
        {"epoch": 2, "loss": 1.0, "accuracy": None},
    ]
    many = [{"epoch": float(i), "eval_loss": 1.0} for i in range(1, 1001)]
    assert [entry["epoch"] for entry in evaluations(many)] == list(range(1, 1001, 10))
    assert evaluations([]) == []


def test_a_run_draws_its_curves_and_writes_events(tiny_base: Path, tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(40))
    base = load_base(str(tiny_base))
    plain = train_adapter(settings_for(tiny_base, tmp_path, rows, log_steps=1), base=base)
    picture, events = tmp_path / "made" / "curves.png", tmp_path / "events"
    options = settings_for(tiny_base, tmp_path, rows, log_steps=1, plot=picture, tensorboard=events)
    assert train_adapter(options, base=base).digest == plain.digest
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    # Training, evaluation, the chosen epoch.
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (pixels == colour).all(-1).sum() > 50
    (folder,) = (events / "acme" / "tiny").iterdir()
    read = EventAccumulator(str(folder))
    read.Reload()
    assert {"train/loss", "eval/loss", "eval/accuracy"} <= set(read.Tags()["scalars"])
    assert [event.step for event in read.Scalars("train/loss")] == list(range(1, 11))
    assert [event.step for event in read.Scalars("eval/loss")] == [5, 10]
    assert read.Scalars("eval/loss")[-1].value == pytest.approx(plain.metrics["loss"], rel=1e-5)


def test_a_picture_that_cannot_be_written_stops_nothing_but_itself(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_csv(tmp_path / "rows.csv", ending_rule(40))
    (tmp_path / "file").write_bytes(b"")
    store = AdapterStore(tmp_path / "store")
    options = settings_for(tiny_base, tmp_path, rows, plot=tmp_path / "file" / "curves.png")
    with pytest.raises(InvalidConfiguration, match=r"--plot .*curves.png cannot be written: (File exists|Not a dir)"):
        train_adapter(options)
    assert list(store.iter_adapters()) == [], "before the training"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "plot_curves", full)
    result = train_adapter(settings_for(tiny_base, tmp_path, rows, plot=tmp_path / "curves.png"))
    assert result.version == 1 and result.metrics
    assert any("could not be drawn" in note and "No space left" in note for note in result.notes)
    assert not (tmp_path / "curves.png").exists()


def test_the_look_at_a_picture_s_place_leaves_it_as_it_was(tmp_path: Path) -> None:
    empty, full, new = tmp_path / "empty.png", tmp_path / "full.png", tmp_path / "folder" / "new.png"
    empty.write_bytes(b"")
    full.write_bytes(b"a picture")
    for path in (empty, full, new):
        check_plot(path)
    assert (empty.read_bytes(), full.read_bytes(), new.exists()) == (b"", b"a picture", False)


def test_a_run_without_evaluations_has_a_curve(tmp_path: Path) -> None:
    plot_curves(HISTORY[:1], tmp_path / "curves.png", title="t", metric="loss", chosen_epoch=1)
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("history", "lines"),
    [
        ([{**HISTORY[0], "epoch": 1.0}], [("training", "o")]),
        ([HISTORY[0], HISTORY[2]], [("training", "")]),
        (HISTORY[:2], [("training", "o"), ("evaluation", "o"), ("chosen epoch", "")]),
    ],
)
def test_a_short_run_has_a_readable_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: list[dict[str, Any]], lines: list[tuple[str, str]]
) -> None:
    drawn: list[Figure] = []
    original = Figure.savefig

    def kept(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        original(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    plot_curves(history, tmp_path / "curves.png", title="t", metric="loss", chosen_epoch=1)
    panel = drawn[0].axes[0]
    shown = {None: "", "None": ""}
    assert [(line.get_label(), shown.get(str(line.get_marker()), line.get_marker())) for line in panel.lines] == lines
    for each in drawn[0].axes:
        left, right = each.get_xlim()
        assert all(place % 1 == 0 for place in each.get_xticks() if left <= place <= right), "whole epochs"


def test_each_epoch_has_a_loss_of_training(tiny_base: Path, tmp_path: Path) -> None:
    """Of steps that are fewer than `log_steps` too."""
    told: list[tuple[int, float]] = []

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                told.append((state.global_step, logs["loss"]))

    rows = write_csv(tmp_path / "rows.csv", ending_rule(40))
    for log_steps in (1, 3):
        train_adapter(settings_for(tiny_base, tmp_path, rows, log_steps=log_steps), callbacks=[Told()])
    each, (third, rest, sixth, ninth, tenth) = told[:10], told[10:]
    assert [step for step, _ in (third, rest, sixth, ninth, tenth)] == [3, 5, 6, 9, 10]
    # Each is the mean of the steps since the figure before.
    assert rest[1] == pytest.approx((each[3][1] + each[4][1]) / 2)
    assert tenth[1] == pytest.approx(each[9][1])


def test_a_picture_is_a_png() -> None:
    options = {"base": "embedded", "store": "s", "name": "acme/a", "task": "classify", "train": "t.csv"}
    with pytest.raises(InvalidConfiguration, match=r"--plot .*name a file that ends in \.png"):
        load_options(None, {**options, "plot": Path("curves.pdf")})
