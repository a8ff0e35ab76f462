"""Each way for data to be wrong is told by row, line and remedy; each format reads the same."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from trainer_samples import ending_rule, settings_for, write_csv, write_jsonl

from sera_serve.trainer.data.passages import load_generate_data
from sera_serve.trainer.data.spans import load_spans
from sera_serve.trainer.data.splits import draw, hold_out
from sera_serve.trainer.data.targets import load_classify_data, load_numbers
from sera_serve.trainer.tables.faults import InvalidData

GOOD = [["a text", "x"], ["b text", "y"], ["c text", "x"], ["d text", "y"]]


def classify(path: Path, **options: Any) -> Any:
    return load_classify_data(settings_for(Path("base"), path.parent, path, **options))


def generate(path: Path, **options: Any) -> Any:
    return load_generate_data(settings_for(Path("base"), path.parent, path, task="generate", **options))


def refusal(loader: Any, path: Path, **options: Any) -> str:
    with pytest.raises(InvalidData) as caught:
        loader(path, **options)
    assert caught.value.code == "invalid_training_data"
    return caught.value.message


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [['a, "text"\nof two lines', "x"], ["déjà vu", "y"], ["c", "x"], ["d", "y"]]
    path = tmp_path / f"rows{suffix}"
    records = [{"text": text, "label": label} for text, label in rows]
    if suffix == ".jsonl":
        write_jsonl(path, records)
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        write_csv(path, rows)
    data = classify(path, eval_fraction=0)
    assert [[row.text, row.target] for row in data.train] == rows
    assert data.labels == ["x", "y"]


def test_whole_numbers_and_booleans_are_labels(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 2 if i < 4 else bool(i % 2)} for i in range(8)]
    data = classify(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert data.labels == ["0", "1", "false", "true"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; its first line must name the columns"),
        (b"text,label\n", "has no rows"),
        (b"texts,label\na,x\n", "has no column 'text'; it has texts, label; did you mean --text-column texts?"),
        (b"body,Label\na,x\n", "has no column 'text'; it has body, Label; name one with --text-column"),
        (b"text,Label\na,x\n", "has no column 'label'; it has text, Label; did you mean --label-column Label?"),
        (b"text,text\na,x\n", "line 1: column 'text' appears twice; rename one"),
        (b"text,label\na,x\nb,y\nc\xe9,x\n", "line 4: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (b"text,label\na,x\n \t,y\nc,x\nd,y\n", "row 2 (line 3): text is empty; fill it in or delete the row"),
        (b"text,label\na,x\nb,\nc,x\nd,y\n", "row 2 (line 3): label is empty; fill it in or delete the row"),
        (b"text,label\na,x\nb,c,y\n", "row 2 (line 3): 3 fields where the header has 2; put a text that holds"),
        (b'text,label\n"a\nb",x\n,y\nc,x\nd,y\n', "row 2 (line 4): text is empty"),
        (b'text,label\n"a,x\nb,y\n', "unexpected end of data; check the quotes around that text"),
        (b"text,label\na,x\nb,x\nc,x\nd,x\n", "every row has the label 'x'; add rows of another label"),
        (b"text,label\na,x\nb,y\n", "has 2 rows; at least 4 are needed"),
        (b"text,label\na,x\n", "has 1 row; at least 4 are needed"),
        (b"text,label\na,1.2\nb,1.3\nc,1.4\nd,1.5\n", "4 different labels in 4 rows; labels must repeat"),
    ],
)
def test_faults_of_a_csv_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    assert message in refusal(classify, path)


@pytest.mark.parametrize(
    ("content", "options", "param"),
    [
        (b"", {}, "train"),
        (b"text,text\na,x\n", {}, "train"),
        (b'text,label\n"a,x\n', {}, "train"),
        (b"text,label\n", {}, "train"),
        (b"text,label\na,x\n", {"label_column": "rating"}, "label_column"),
        (b"text,label\na,\xe9\n", {}, "encoding"),
        (b"a\x00b", {"encoding": "utf-16"}, "encoding"),
    ],
)
def test_a_refusal_names_the_option_of_its_fault(
    tmp_path: Path, content: bytes, options: dict[str, Any], param: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(InvalidData) as caught:
        classify(path, **options)
    assert caught.value.param == param


@pytest.mark.parametrize("use", ["eval", "test"])
@pytest.mark.parametrize("content", [b"text,label\na,z\n", b"text,label\n,x\n", b"", b"text,tag\na,x\n"])
def test_a_fault_of_another_file_than_the_training_rows_names_that_file(
    tmp_path: Path, use: str, content: bytes
) -> None:
    other = tmp_path / "other.csv"
    other.write_bytes(content)
    train = write_csv(tmp_path / "train.csv", [*GOOD, *GOOD])
    for multi_label in (False, True):
        settings = settings_for(Path("base"), tmp_path, train, multi_label=multi_label, **{use: other})
        with pytest.raises(InvalidData, match=r"other\.csv") as caught:
            load_classify_data(settings)
        assert caught.value.param == ("label_column" if b"tag" in content else use)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5, "label": "x"}, "row 5 (line 5): text is int 5, not text; write a string or delete the row"),
        ({"label": "x"}, "row 5 (line 5): text is missing"),
        ({"text": "a"}, "row 5 (line 5): label is missing; a label is a name or a whole number"),
        ({"text": "a", "label": 1.5}, "row 5 (line 5): label is float 1.5"),
        (["a"], 'row 5 (line 5): not an object; each line must look like {"column": value, ...}'),
        ({"text": "a", "label": "x" * 600}, "label has 600 characters"),
    ],
)
def test_faults_of_a_jsonl_row(tmp_path: Path, row: Any, message: str) -> None:
    rows = [{"text": text, "label": label} for text, label in GOOD]
    assert message in refusal(classify, write_jsonl(tmp_path / "rows.jsonl", [*rows, row]))


def test_whole_numbers_that_are_not_read_exactly_are_no_labels(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": 10**20 + i % 2} for i in range(8)]
    message = refusal(classify, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "label is 1e+20, too large a number to be read exactly; write it in quotes, as text" in message
    named = write_jsonl(tmp_path / "named.jsonl", [row | {"label": str(row["label"])} for row in rows])
    assert classify(named).labels == ["100000000000000000000", "100000000000000000001"]


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n\n{"text": \n')
    assert "row 2 (line 3): not JSON" in refusal(classify, path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.csv", "cannot be read: No such file or directory; check the path"),
        (
            "rows.xlsx",
            "the suffix '.xlsx' is not one of .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .txt; save the",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, message: str) -> None:
    assert message in refusal(classify, tmp_path / name)


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 not really PAR1")
    assert "is not a readable Parquet file" in refusal(classify, path)


def test_several_faults_are_told_at_once(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [*GOOD, *[["", "x"]] * 7])
    message = refusal(classify, path)
    assert message.startswith(f"{path} has 7 problems:\n  row 5 (line 6): text is empty")
    assert message.count("\n  row") == 5
    assert message.endswith("and 2 more")


def test_a_label_keeps_a_training_row_whatever_text_it_shares(tmp_path: Path) -> None:
    """The only row of a label may have the text of another label's row, with which it would be held out."""
    rows = [*([f"text {i}", "x" if i % 2 else "y"] for i in range(6)), ["shared", "x"], ["shared", "rare"]]
    path = write_csv(tmp_path / "rows.csv", rows)
    for seed in range(8):
        data = classify(path, seed=seed, eval_fraction=0.5)
        assert {row.target for row in data.train} == {"x", "y", "rare"}
        assert data.eval


def test_a_label_of_the_evaluation_rows_must_be_known(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", GOOD)
    other = write_csv(tmp_path / "eval.csv", [["a", "x"], ["b", "z"]])
    message = refusal(classify, train, eval=other)
    assert message == (
        f"{other}, row 2 (line 3): label 'z' is not in the training data, which has x, y; "
        "correct or remove it, or add training rows of that label"
    )


def test_a_pair_keeps_both_texts(tmp_path: Path) -> None:
    rows = [["a", "b", "x"], ["c", "d", "y"]] * 2
    path = write_csv(tmp_path / "rows.csv", rows, ("text", "second", "label"))
    assert classify(path, text_pair_column="second").train[0].text == ("a", "b")
    assert "has no column 'secnd'; it has text, second, label; did you mean --text-pair-column second?" in refusal(
        classify, path, text_pair_column="secnd"
    )


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a", "completion": " "}, {}, "row 2 (line 2): completion is empty: there is nothing to learn"),
        ({"prompt": "a", "completion": 7}, {}, "row 2 (line 2): completion is int 7, not text"),
        ({"completion": "a"}, {}, "row 2 (line 2): prompt is missing"),
        ({"messages": "hi"}, {"messages_column": "messages"}, "messages must be a list such as"),
        ({"messages": CHAT[:1]}, {"messages_column": "messages"}, "messages has no turn of the assistant"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            {"messages_column": "messages"},
            "has the role 'robot'; use one",
        ),
        ({"messages": [{"role": "user"}]}, {"messages_column": "messages"}, "messages[0] must have exactly the keys"),
        ({"messages": [{"role": "user", "content": ""}]}, {"messages_column": "messages"}, "messages[0] has no text"),
    ],
)
def test_faults_of_generation_rows(tmp_path: Path, row: Any, options: Any, message: str) -> None:
    first = {"messages": CHAT} if options else {"prompt": "p", "completion": "c"}
    assert message in refusal(generate, write_jsonl(tmp_path / "rows.jsonl", [first, row]), **options)


def test_a_faulty_turn_of_the_assistant_is_no_missing_one(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert refusal(generate, path, messages_column="messages").endswith(
        'row 2 (line 2): messages[1] must have exactly the keys "role" and "content" (or "from" and "value"); '
        "'weight' is not used: delete it"
    )


def test_prompts_with_several_completions_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 4}", "completion": f"c{i}"} for i in range(80)]
    data = generate(write_jsonl(tmp_path / "rows.jsonl", rows), eval_fraction=0.2)
    kept, held = ({row.prompt for row in part} for part in (data.train, data.eval))
    assert len(data.eval) == 16
    assert not kept & held


def test_one_long_text_is_cut_at_a_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    data = generate(path, completion_column="text")
    assert data.train[0].completion + data.eval[0].completion == path.read_text()
    assert re.match(r"line 9\d\n", data.eval[0].completion)


def test_a_text_with_its_only_line_end_at_the_beginning_is_cut_near_the_wanted_place(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("My Book\n" + "the sea was calm and we sailed " * 300)
    data = generate(path, format="text")
    kept, held = data.train[0].completion, data.eval[0].completion
    assert kept + held == path.read_text()
    assert kept.endswith(" ") and not held.startswith(" ")
    assert len(path.read_text()) // 10 <= len(held) <= len(path.read_text()) // 10 + 10
    # Without white space the cut is at the wanted character.
    path.write_text("My Book\n" + "x" * 992)
    assert len(generate(path, format="text").train[0].completion) == 900


def test_holding_out_keeps_the_shares_of_labels() -> None:
    rows = [("a", i) for i in range(900)] + [("b", i) for i in range(95)] + [("c", i) for i in range(5)]
    kept, held = hold_out(rows, 0.1, 0, key=lambda r: f"{r}", stratum=lambda r: r[0])
    assert sorted(kept + held) == rows
    assert [sum(r[0] == label for r in held) for label in "abc"] in ([90, 9, 1], [90, 10, 0])
    assert (kept, held) == hold_out(rows, 0.1, 0, key=lambda r: f"{r}", stratum=lambda r: r[0])
    assert (kept, held) != hold_out(rows, 0.1, 1, key=lambda r: f"{r}", stratum=lambda r: r[0])


def test_strata_of_one_group_do_not_take_their_share_from_the_next_stratum() -> None:
    rows = [("a", i) for i in range(60)] + [(f"{i}", i) for i in range(60)] + [("zz", i) for i in range(10)]
    for keep_single, single in ((True, 0), (False, 6)):
        _, held = hold_out(
            rows, 0.1, 0, key=lambda r: f"{r}", stratum=lambda r: f"{len(r[0])}{r[0]}", keep_single=keep_single
        )
        counts = [sum(r[0] == label for r in held) for label in ("a", "zz")]
        assert [*counts, len(held) - sum(counts)] == [6, 1, single]


def test_a_set_of_labels_with_many_rows_stays_in_the_training_rows(tmp_path: Path) -> None:
    names = [f"t{i:02d}" for i in range(12)]
    sets = [list(labels) for labels in combinations(names, 3)][:200] + [["urgent"]] * 30
    rows = [{"text": f"text {i}", "label": labels} for i, labels in enumerate(sets)]
    found = load_classify_data(
        settings_for(Path("base"), tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows), multi_label=True)
    )
    assert len(found.eval) == 23
    assert sum(item.target == {"urgent"} for item in found.eval) == 3


def test_each_of_several_labels_keeps_a_training_row(tmp_path: Path) -> None:
    rare = [f"rare{i:02d}" for i in range(30)]
    rows: list[dict[str, Any]] = [{"text": f"text {i}", "label": ["often", name]} for i, name in enumerate(rare)]
    # A text that comes twice stays on one side, with all of its labels.
    rows += [{"text": "twice", "label": ["first"]}, {"text": "twice", "label": ["second"]}]
    rows += [{"text": f"more {i}", "label": ["often"]} for i in range(40)]
    options = settings_for(
        Path("base"), tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows), multi_label=True, eval_fraction=0.4
    )
    found = load_classify_data(options)
    assert {label for item in found.train for label in item.target} == set(found.labels)
    assert len(found.eval) == 16 and all(item.target == {"often"} for item in found.eval)
    assert any("32 labels 'first', 'rare00'" in note and "a single row each" in note for note in found.notes)
    path = write_jsonl(
        tmp_path / "spans.jsonl",
        [
            {"text": f"{i:02d} here", "spans": [{"start": 0, "end": 2, "label": rare[i] if i < 9 else "often"}]}
            for i in range(30)
        ],
    )
    spans = load_spans(settings_for(Path("base"), tmp_path, path, task="token-classify", eval_fraction=0.5))
    assert {span.label for item in spans.train for span in item.target} == {"often", *rare[:9]}
    assert spans.eval and any("9 labels 'rare00'" in note for note in spans.notes)


def test_a_limit_that_leaves_a_label_without_rows_is_told(tmp_path: Path) -> None:
    rows = [[f"t{i}", "common"] for i in range(400)] + [[f"u{i}", "seldom"] for i in range(2)]
    data = classify(write_csv(tmp_path / "rows.csv", rows), train_limit=8)
    assert data.labels == ["common", "seldom"]
    assert "label 'seldom': no row of it is among the 8 drawn ones; raise --train-limit" in data.notes


@pytest.mark.parametrize("task", ["classify", "token-classify"])
@pytest.mark.parametrize("evaluates", [True, False])
def test_a_limit_keeps_the_labels_of_all_rows_of_sets_and_spans(tmp_path: Path, task: str, evaluates: bool) -> None:
    def rows(count: int) -> list[dict[str, Any]]:
        kinds = ["seldom" if i < 8 else "common" for i in range(count)]
        return [
            {"text": f"{i:03d}", "label": [kind], "spans": [{"start": 0, "end": 3, "label": kind}]}
            for i, kind in enumerate(kinds)
        ]

    options: dict[str, Any] = {"task": task, "train_limit": 8} | ({"multi_label": True} if task == "classify" else {})
    if evaluates:
        options["eval"] = write_jsonl(tmp_path / "eval.jsonl", rows(9))
    settings = settings_for(Path("base"), tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows(800)), **options)
    if task == "classify":
        sets = load_classify_data(settings)
        labels, notes, train = sets.labels, sets.notes, len(sets.train)
    else:
        spans = load_spans(settings)
        labels, notes, train = spans.labels, spans.notes, len(spans.train)
    assert labels == ["common", "seldom"]
    assert train <= 8
    assert "label 'seldom': no row of it is among the 8 drawn ones; raise --train-limit" in notes


@pytest.mark.parametrize(
    ("first", "step", "is_refused"),
    [(1.75e9, 1, True), (1.75e12, 1000, True), (1.7e9, 86_400, False), (-1e6, 1, False)],
)
def test_numbers_that_float32_cannot_tell_apart_are_refused(
    tmp_path: Path, first: float, step: float, is_refused: bool
) -> None:
    rows = [{"text": f"t{i}", "label": first + i * step} for i in range(60)]
    settings = settings_for(Path("base"), tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows), task="regress")
    if is_refused:
        assert re.search(r"lie near 17500000\d+.* subtract 17500000", refusal(load_numbers, settings))
    else:
        assert len(load_numbers(settings).train) == 54


def test_a_column_that_is_text_and_label_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", GOOD)
    assert "--text-column and --label-column are both 'label'; name two" in refusal(classify, path, text_column="label")


def test_a_few_rows_hold_one_out(tmp_path: Path) -> None:
    data = classify(write_csv(tmp_path / "rows.csv", GOOD), patience=1)
    assert (len(data.train), len(data.eval), data.notes) == (3, 1, [])
    rows = [{"text": f"t{i}", "label": i / 2} for i in range(4)]
    numbers = load_numbers(
        settings_for(Path("base"), tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows), task="regress")
    )
    assert (len(numbers.train), len(numbers.eval)) == (3, 1)


def test_of_few_groups_the_smallest_is_held_out() -> None:
    rows = ["one"] * 7 + ["two"]
    kept, held = hold_out(rows, 0.1, 0, key=lambda r: r, stratum=lambda r: "")
    assert (kept, held) == (rows[:7], ["two"])


def test_rows_that_stay_together_cannot_be_held_out(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "Write a poem.", "completion": f"poem {i}"} for i in range(100)]
    )
    data = generate(path)
    assert (len(data.train), len(data.eval)) == (100, 0)
    fault = "no row can be held out, because rows of the same input stay together"
    assert data.notes == [f"{fault}: the last epoch is kept; give --eval to choose the best one"]
    assert f"{path}: {fault}, and --patience needs evaluations; give --eval" in refusal(generate, path, patience=1)
    same = write_csv(tmp_path / "same.csv", [["same", label] for label in "xy" * 5])
    fault += " and each label needs a training row"
    assert classify(same).notes == [f"{fault}: the last epoch is kept; give --eval to choose the best one"]
    assert f"{same}: {fault}, and --patience needs" in refusal(classify, same, patience=1)


def test_a_limit_draws_the_same_rows_again() -> None:
    rows = list(range(100))
    assert draw(rows, 10, 3) == draw(rows, 10, 3) == sorted(draw(rows, 10, 3))
    assert draw(rows, 10, 3) != draw(rows, 10, 4)
    assert draw(rows, 200, 3) == rows


def test_real_files_read_whole(shared_data: Path) -> None:
    data = classify(shared_data / "tenants" / "hwu64" / "train.csv")
    assert len(data.labels) == 64
    assert len(data.train) + len(data.eval) == 8954
    assert {row.target for row in data.eval} <= {row.target for row in data.train}
    assert len(ending_rule(5)) == 5
