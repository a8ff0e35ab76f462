"""Files as people's tools write them: what each one gives, compressed, in other encodings, and saved by `datasets`."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from trainer_samples import settings_for, write_jsonl

from sera_serve.trainer.data.labelled import Example, Examples
from sera_serve.trainer.data.passages import GenerateData, load_generate_data
from sera_serve.trainer.data.targets import load_classify_data, load_numbers
from sera_serve.trainer.tables.faults import InvalidData
from sera_serve.trainer.tables.table import read_table

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
CSV = b'text,label\n"a, b",NA\nnull,x\n"c\nd",x\ne,NA\n'
JSONL = b'{"text": "a", "label": 1}\n\n{"text": "b", "label": "x"}\n{"text": "c"}\n{"text": "d", "label": "x"}\n'


def classify(path: Path, folder: Path, **options: Any) -> Examples[Example[str]]:
    options = {"eval_fraction": 0, **options}
    return load_classify_data(settings_for(Path("base"), folder, path, **options))


def generate(path: Path, folder: Path, **options: Any) -> GenerateData:
    options = {"eval_fraction": 0, "task": "generate", **options}
    return load_generate_data(settings_for(Path("base"), folder, path, **options))


def refusal(load: Callable[[], Any]) -> str:
    with pytest.raises(InvalidData) as caught:
        load()
    return caught.value.message


@pytest.fixture
def cases(shared_data: Path) -> Path:
    return shared_data.parent / "cases" / "trainer"


@pytest.mark.parametrize("name", ["classlabel.parquet", "array.json", "semicolon.csv", "utf16.csv"])
def test_what_other_tools_write_gives_the_same_rows(cases: Path, tmp_path: Path, name: str) -> None:
    data = classify(cases / name, tmp_path)
    assert data.labels == ["neg", "pos"]
    assert len(data.train) == 40
    assert (data.train[0].text, data.train[0].target) == ("slow and unfriendly 0", "neg")
    assert (data.train[1].text, data.train[1].target) == ("best purchase this year 1", "pos")
    assert data.notes == ([f"{cases / name} was read with the delimiter ';', which its header has"] * (name[0] == "s"))


def test_labels_that_differ_in_case_are_told_with_their_counts(cases: Path, tmp_path: Path) -> None:
    data = classify(cases / "case_labels.csv", tmp_path)
    counts = {label: sum(row.target == label for row in data.train) for label in ("NEG", "neg", "POS", "pos")}
    assert len(data.notes) == 2
    for note, (large, small) in zip(data.notes, (("NEG", "neg"), ("POS", "pos")), strict=True):
        assert f"the labels {large!r} ({counts[large]} rows) and {small!r} ({counts[small]} rows)" in note


def test_alpaca_rows_have_instruction_and_input_in_their_prompt(cases: Path, tmp_path: Path) -> None:
    data = generate(cases / "alpaca.jsonl", tmp_path, format="alpaca", test=cases / "alpaca.jsonl")
    assert len(data.train) == len(data.test) == 40
    for word in ("### Instruction:\nsay the mood\n\n", "### Input:\nslow and unfriendly 0\n\n### Response:"):
        assert word in str(data.train[0].prompt)
    assert data.train[0].completion == "neg"
    chat = data.train[0].as_chat().messages
    assert chat[0] == {"role": "user", "content": "say the mood\n\nslow and unfriendly 0"}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(("name", "content"), [("rows.csv", CSV), ("rows.jsonl", JSONL)])
def test_compressed_files_are_read(tmp_path: Path, suffix: str, name: str, content: bytes) -> None:
    plain, packed = tmp_path / name, tmp_path / (name + suffix)
    plain.write_bytes(content)
    packed.write_bytes(COMPRESS[suffix](content))
    rows = [(row.values, row.number, row.line) for row in read_table(packed).rows]
    assert rows == [(row.values, row.number, row.line) for row in read_table(plain).rows]
    assert len(rows) == 4
    packed.write_bytes(packed.read_bytes()[:-12])
    assert "cannot be decompressed" in refusal(lambda: read_table(packed))


def test_texts_such_as_na_and_null_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(CSV)
    rows = read_table(path).rows
    assert [row.values for row in rows] == [
        {"text": "a, b", "label": "NA"},
        {"text": "null", "label": "x"},
        {"text": "c\nd", "label": "x"},
        {"text": "e", "label": "NA"},
    ]
    assert [row.line for row in rows] == [2, 3, 5, 6]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str, suffix: str) -> None:
    texts = {".csv": "text\ndéjà\n", ".jsonl": '{"text": "déjà"}\n', ".txt": "déjà"}
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(texts[suffix].encode(encoding))
    table = read_table(path)
    assert (table.columns, [row.values for row in table.rows]) == (["text"], [{"text": "déjà"}])


def test_an_encoding_and_a_delimiter_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text#label\ndéjà, vu#x\n".encode("cp1252"))
    assert "line 2: byte 0xe9 is not UTF-8" in refusal(lambda: read_table(path))
    rows = read_table(path, encoding="cp1252", delimiter="#").rows
    assert rows[0].values == {"text": "déjà, vu", "label": "x"}
    path.write_bytes("text,label\nä,x\n".encode("utf-16-le"))
    assert "give --encoding utf-16-le" in refusal(lambda: read_table(path))
    assert read_table(path, encoding="utf-16-le").rows[0].values["text"] == "ä"
    for other in (tmp_path, Path("hub:owner/name")):
        assert "has no delimiter; --delimiter is for" in refusal(partial(read_table, other, delimiter=";"))
        assert "has no encoding; --encoding is for" in refusal(partial(read_table, other, encoding="utf-16"))


@pytest.mark.parametrize(
    ("suffix", "option", "value"),
    [(".parquet", "delimiter", ";"), (".jsonl", "delimiter", ";"), (".parquet", "encoding", "utf-16")],
)
def test_what_a_file_has_not_cannot_be_named(tmp_path: Path, suffix: str, option: str, value: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    else:
        path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(read_table(path).rows) == 2
    with pytest.raises(InvalidData, match=f"has no {option}; --{option} is for") as refused:
        read_table(path, **{option: value})
    assert refused.value.param == option


@pytest.mark.parametrize("named", ["utf-8", "UTF8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_the_mark_of_a_named_encoding_is_no_character(tmp_path: Path, named: str, suffix: str) -> None:
    texts = {".csv": "text\ndéjà\n", ".jsonl": '{"text": "déjà"}\n', ".txt": "déjà"}
    path = tmp_path / f"rows{suffix}"
    for mark in ("\ufeff", ""):
        path.write_bytes((mark + texts[suffix]).encode(named))
        table = read_table(path, encoding=named)
        assert (table.columns, [row.values for row in table.rows]) == (["text"], [{"text": "déjà"}])
    # The mark of another encoding tells nothing against the name.
    path.write_bytes(texts[suffix].encode("utf-16"))
    assert "is not UTF-8; name the encoding" in refusal(lambda: read_table(path, encoding="utf-8"))


def test_columns_of_unknown_types_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    numbers = pyarrow.array([[("k", 1)]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    # A class column of `datasets`, whose names are in the schema's metadata.
    classes = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = pyarrow.table({"text": ["a", "b"], "label": [1, 0]}, classes.arrow_schema)
    pyarrow.parquet.write_table(rows.append_column("by", numbers), path)
    table = read_table(path)
    assert [row.values for row in table.rows] == [{"text": "a", "label": "y"}, {"text": "b", "label": "x"}]
    assert table.columns == ["text", "label"]
    (note,) = table.notes
    assert note.startswith("column 'by' of rows.parquet is left out, because its type map<string, int64")
    told = refusal(lambda: table.require("by", "label_column"))
    assert "column 'by' has the type map<string, int64" in told
    pyarrow.parquet.write_table(rows.slice(0, 0).append_column("by", numbers[:0]), path)
    assert "has no rows" in refusal(lambda: read_table(path))
    pyarrow.parquet.write_table(pyarrow.table({"by": numbers}), path)
    assert "map<string, int64" in refusal(lambda: read_table(path))


def test_json_values_are_not_changed(tmp_path: Path) -> None:
    # Dates alone in a column, blank lines, and several types in one column: datasets reads them in another way.
    rows: list[Any] = [{"text": "2020-01-01", "label": True}, {"text": "2021-01-01", "label": 10**20}]
    assert [row.values for row in read_table(write_jsonl(tmp_path / "a.jsonl", rows)).rows] == rows
    chats = [{"m": [{"role": "user", "content": "a"}]}, {"m": [{"role": "user", "content": "b", "name": "c"}]}]
    assert [row.values for row in read_table(write_jsonl(tmp_path / "b.jsonl", chats)).rows] == chats


@pytest.mark.parametrize("before", ["", "\n "])
def test_numbers_of_an_array_are_not_changed(tmp_path: Path, before: str) -> None:
    path = tmp_path / "rows.json"
    for rows in (
        [{"text": f"t{i}", "label": (i + 1) * 1.7e-11} for i in range(4)],
        [{"text": "a", "spans": [{"score": 1.23456789012e-6}]}],
        [{"text": "a", "label": 2**60 + 1}, {"text": "b", "label": None}],
    ):
        path.write_text(before + json.dumps(rows))
        assert [row.values for row in read_table(path).rows] == rows


PAIR = '{"text": "\\ud83d\\ude00", "label": "x"}'
FAULTS = {
    "twice": ('{"text": "a", "label": "x", "label": "x"}', "key 'label' appears twice in an object; keep one of the"),
    "twice within": ('{"text": "a", "more": [{"id": 1, "id": 2}]}', "key 'id' appears twice"),
    "half": (
        '{"text": "a \\ud83d b", "label": "x"}',
        "column 'text': a string holds half of a surrogate pair (an escape",
    ),
    "second half": ('{"text": "a", "label": "\\uDE00"}', "column 'label': a string holds half of a surrogate pair"),
    "half in a key": ('{"text": "a", "x\\ud83d": 1}', "column 'x\\ud83d': a string holds half of a surrogate pair"),
    "half within": ('{"text": "a", "more": {"m": ["\\ud83d"]}}', "column 'more': a string holds half of a surrogate"),
}


@pytest.mark.parametrize("rows_before", [[PAIR] * 4, [PAIR.replace('"x"', "1"), PAIR], []])
@pytest.mark.parametrize(("row", "message"), FAULTS.values(), ids=FAULTS)
def test_json_with_two_meanings_or_half_a_character_is_refused(
    tmp_path: Path, row: str, message: str, rows_before: list[str]
) -> None:
    # Rows of one type, of several types in a column, and a single row: datasets reads each of them in another way.
    number = len(rows_before) + 1
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("\n".join([*rows_before, row]) + "\n")
    array.write_text("[" + ",\n".join([*rows_before, row]) + "]")
    for path in (lines, array):
        assert f"{path}, row {number} (line {number}): {message}" in refusal(lambda path=path: read_table(path))


def test_several_rows_of_an_array_with_two_meanings_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1, "a": 2},\n{"a": 1},\n{"a": 1, "a": 1}]')
    message = refusal(lambda: read_table(path))
    assert "row 1 (line 1): key 'a' appears twice" in message
    assert "row 3 (line 3): key 'a' appears twice" in message
    assert "row 2" not in message


def test_a_single_row_of_chats_is_one_row(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": "x"}]}]
    assert [row.values for row in read_table(write_jsonl(tmp_path / "rows.jsonl", rows)).rows] == rows


@pytest.mark.parametrize("labels", [["1.00", "2.00"], ["3", "-4"], ["123456789012345678901234567890", "0"]])
def test_whole_decimals_are_labels(tmp_path: Path, labels: list[str]) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"text": f"t{i}", "label": Decimal(labels[i % 2])} for i in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert classify(path, tmp_path).labels == sorted(label.removesuffix(".00") for label in labels)


def test_decimals_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"text": f"t{i}", "label": Decimal(f"{i}.25")} for i in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    settings = settings_for(Path("base"), tmp_path, path, task="regress", eval_fraction=0)
    assert [item.target for item in load_numbers(settings).train] == [i + 0.25 for i in range(8)]
    rows[3]["label"] = Decimal("1234567890123456.25")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert "row 4: label is 1.23457e+15; give numbers of at most 1e+15" in refusal(lambda: load_numbers(settings))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.parquet.gz", "saved", "saved.test"])
def test_a_file_without_rows_says_so(tmp_path: Path, name: str) -> None:
    path, empty = tmp_path / name, datasets.Dataset.from_dict({"text": [], "label": []})
    if name == "saved":
        empty.save_to_disk(path)
    elif name == "saved.test":
        datasets.DatasetDict(train=labelled(["neg", "pos"]), test=empty).save_to_disk(path)
        assert len(read_table(path).rows) == 4
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "plain")
        content = (tmp_path / "plain").read_bytes()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    place = path / "test" if name == "saved.test" else path
    assert refusal(lambda: read_table(path, split="test")) == f"{place} has no rows; give a file with at least a few"


@pytest.mark.parametrize("kind", ["strings", "lists", "saved"])
def test_bytes_that_are_no_text_are_told_by_row_and_column(tmp_path: Path, kind: str) -> None:
    values = [b"good"] * 2500
    values[1700] = b"caf\xe9"
    texts = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    if kind == "lists":
        texts = pyarrow.ListArray.from_arrays(list(range(2501)), texts)
    table = pyarrow.table({"id": list(range(2500)), "text": texts})
    path = tmp_path / "rows.parquet"
    if kind == "saved":
        datasets.Dataset(table).save_to_disk(path)
    else:
        pyarrow.parquet.write_table(table, path)
    expected = (
        f"{path}, row 1701: text has the byte 0xe9, which is not UTF-8; decode that text and write the file again"
    )
    assert expected in refusal(lambda: list(read_table(path).rows))
    if kind != "saved":
        # Its digest has read the rows before.
        assert expected in refusal(lambda: read_table(path).rows[1700])


def test_a_column_of_several_types_leaves_the_numbers_of_others_as_they_are(tmp_path: Path) -> None:
    rows = [{"label": 1.23456789e-6, "id": 1}, {"label": 0.5, "id": "x"}, {"label": 3.4e-12, "id": 1.5e-11}]
    assert [row.values for row in read_table(write_jsonl(tmp_path / "rows.jsonl", rows)).rows] == rows


def test_rows_of_an_array_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"},\n {"text":\n  "b"}\n]\n')
    assert [(row.values["text"], row.line) for row in read_table(path).rows] == [("a", 1), ("b", 3)]
    path.write_text("\n " + json.dumps([{"text": "[1"}, {"text": "]"}], indent=1))
    assert [(row.values["text"], row.line) for row in read_table(path).rows] == [("[1", 5), ("]", 8)]


def test_whole_numbers_that_pandas_wrote_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,1.0\nb,0.0\nc,1.0\nd,0\n")
    assert classify(path, tmp_path).labels == ["0", "1"]
    rows = [{"text": f"t{i}", "label": float(i % 2)} for i in range(4)]
    assert classify(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path).labels == ["0", "1"]
    path.write_text("text,label\na,1.0\nb,v0\nc,1.0\nd,v0\n")
    assert classify(path, tmp_path).labels == ["1.0", "v0"]


@pytest.mark.parametrize(
    ("train", "held_out", "labels", "found"),
    [
        (["1.0", "1.5", "2.0"], ["1.0", "2.0"], ["1.0", "1.5", "2.0"], ["1.0", "2.0"]),
        (["1", "2"], ["1.0", "2.0"], ["1", "2"], ["1", "2"]),
        (["1.0", "2.0"], ["1", "2.0"], ["1", "2"], ["1", "2"]),
    ],
)
def test_the_training_rows_say_whether_a_number_with_a_point_is_a_name(
    train: list[str], held_out: list[str], labels: list[str], found: list[str], tmp_path: Path
) -> None:
    path, other = tmp_path / "rows.csv", tmp_path / "eval.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{train[i % len(train)]}\n" for i in range(12)))
    other.write_text("text,label\n" + "".join(f"e{i},{label}\n" for i, label in enumerate(held_out)))
    data = classify(path, tmp_path, eval=other)
    assert data.labels == labels
    assert [row.target for row in data.eval] == found


def test_a_carriage_return_alone_shifts_no_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"id,text,label\n1,good one,pos\n\r,bad one,neg\n3,nice,pos\n4,awful,neg\n5,great,pos\n")
    data = classify(path, tmp_path, eval_fraction=0)
    assert [(row.text, row.target) for row in data.train[:3]] == [
        ("good one", "pos"),
        ("bad one", "neg"),
        ("nice", "pos"),
    ]


def test_rows_within_one_json_object_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [{"text": f"t{i}", "label": "xy"[i % 2]} for i in range(9)]}))
    with pytest.raises(InvalidData, match="one JSON object: if its 'data' are the rows, write that array alone"):
        classify(path, tmp_path)


def test_a_class_with_a_single_row_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{'xy'[i % 2]}\n" for i in range(20)) + "u,z\n")
    data = classify(path, tmp_path, eval_fraction=0.2)
    assert data.notes == ["label 'z': a single row each, so that no row of it can be held out; add rows, or delete it"]
    assert "z" in {row.target for row in data.train}
    assert "z" not in {row.target for row in data.eval}


def labelled(names: list[str]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]}, features=features)


def test_folders_that_datasets_saved_are_read(tmp_path: Path) -> None:
    labelled(["neg", "pos"]).save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict(train=labelled(["neg", "pos"]), validation=labelled(["neg", "pos"]))
    both.save_to_disk(tmp_path / "both")
    data = classify(tmp_path / "one", tmp_path, eval=tmp_path / "both")
    assert data.labels == ["neg", "pos"]
    assert [row.target for row in data.train] == [row.target for row in data.eval] == ["neg", "pos"] * 2
    assert [row.values["label"] for row in read_table(tmp_path / "both").rows] == ["neg", "pos"] * 2
    assert read_table(tmp_path / "both").digest == read_table(tmp_path / "one").digest
    assert "has no split for test; it has train, validation" in refusal(
        lambda: classify(tmp_path / "one", tmp_path, test=tmp_path / "both")
    )
    (tmp_path / "empty").mkdir()
    assert "is a folder that datasets did not save" in refusal(lambda: read_table(tmp_path / "empty"))


def test_a_data_set_of_the_hub_is_read_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, config: str | None, *, revision: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, revision, split))
        return labelled(["neg", "pos"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = classify(Path("hub:acme/moods"), tmp_path, eval=Path("hub:acme/moods/small@v2"), test="hub:acme/moods#extra")
    assert data.labels == ["neg", "pos"]
    assert asked == [
        ("acme/moods", None, None, "train"),
        ("acme/moods", "small", "v2", "validation"),
        ("acme/moods", None, None, "extra"),
    ]
    assert "names no data set; write hub:owner/name" in refusal(lambda: read_table(Path("hub:moods")))


def test_without_a_network_the_hub_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal(lambda: read_table(Path("hub:acme/moods")))
    assert message.startswith("hub:acme/moods cannot be had from the hub (")
    assert "hf download --repo-type dataset acme/moods" in message


def test_a_class_number_outside_the_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    labelled(["neg", "pos"]).to_parquet(path)
    table = pyarrow.parquet.read_table(path)
    wrong = table.set_column(1, table.schema.field("label"), pyarrow.array([0, 5, 0, -1], pyarrow.int64()))
    pyarrow.parquet.write_table(wrong, path)
    assert "row 2: label is the class number 5, and the file's schema has 2 names" in refusal(
        lambda: classify(path, tmp_path)
    )
