"""Broken files of fifty kinds: each error names the file, the row and line where there is one, and the remedy.

Run as a program, the module prints the table of docs/results.md.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from trainer_samples import settings_for

from sera_serve.trainer.data.passages import load_generate_data
from sera_serve.trainer.data.targets import load_classify_data
from sera_serve.trainer.tables.faults import InvalidData

RESULTS = Path(__file__).parents[2] / "docs" / "results.md"
BEGIN, END = "<!-- broken files: begin -->\n", "<!-- broken files: end -->\n"
CSV = "text,label\n" + "".join(f"text {i},{'xy'[i % 2]}\n" for i in range(8))
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@dataclass(frozen=True)
class Broken:
    """One kind of broken file.

    Attributes:
        kind: What is wrong, for people.
        name: Name of the file.
        content: Its bytes; None makes no file, a function makes it.
        place: What the error says of row and line; "" where the fault is the whole file's.
        remedy: What the error says to do.
        options: Of the run; `task` "generate" reads generation rows.
    """

    kind: str
    name: str
    content: bytes | str | Callable[[Path], None] | None
    place: str
    remedy: str
    options: dict[str, Any] = field(default_factory=dict)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def good(count: int = 4) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": "xy"[i % 2]} for i in range(count)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def no_rows() -> bytes:
    """A Parquet file with its columns alone."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), sink)
    return sink.getvalue()


def classes(path: Path) -> None:
    """A Parquet file whose schema has two names of classes, and a third class number in a row."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    table = pyarrow.parquet.read_table(path)
    numbers = pyarrow.array([0, 1, 2, 1], pyarrow.int64())
    pyarrow.parquet.write_table(table.set_column(1, table.schema.field("label"), numbers), path)


def folder(path: Path) -> None:
    path.mkdir()
    (path / "rows.csv").write_text(CSV)


def split_folder(path: Path) -> None:
    import datasets

    datasets.DatasetDict(dev=datasets.Dataset.from_list(good())).save_to_disk(path)


def damaged_folder(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(good()).save_to_disk(path)
    next(path.glob("*.arrow")).write_bytes(b"")


def no_text(path: Path) -> None:
    """A Parquet file whose third label is latin1 in a column of strings, which Arrow does not check."""
    labels = pyarrow.array([b"x", b"y", b"caf\xe9", b"y"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c", "d"], "label": labels}), path)


def empty_folder(path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": [], "label": []}).save_to_disk(path)


GENERATE = {"task": "generate"}
CHATS = {"task": "generate", "format": "chatml"}
ROW_5 = "row 5 (line 5)"

KINDS = [
    Broken("no such file", "absent.csv", None, "", "check the path"),
    Broken("a folder of files", "folder", folder, "", "name a file in it"),
    Broken("a suffix that no reader has", "rows.dat", CSV, "", "convert or rename the file"),
    Broken("no suffix", "rows", CSV, "", "convert or rename the file"),
    Broken("a spreadsheet", "rows.xlsx", b"PK\x03\x04", "", "save the sheet as CSV (UTF-8)"),
    Broken("a spreadsheet that is called CSV", "rows.csv", b"PK\x03\x04....", "", "save the sheet as CSV (UTF-8)"),
    Broken("an archive", "rows.csv.zip", b"PK\x03\x04....", "", "unpack the archive and name one file of it"),
    Broken("a pickle", "rows.pkl", b"\x80\x05", "", "write it as Parquet or CSV"),
    Broken("a web page that was downloaded in place of data", "rows.csv", "<!DOCTYPE html><html>", "", "the raw link"),
    Broken(
        "the pointer of Git LFS", "rows.parquet", "version https://git-lfs.github.com/spec/v1\n", "", "git lfs pull"
    ),
    Broken("Parquet that is called CSV", "rows.csv", parquet(good()), "", "rename it to end with .parquet"),
    Broken("gzip without its suffix", "rows.csv", gzip.compress(CSV.encode()), "", "rename it to end with .gz"),
    Broken("gzip that is cut off", "rows.csv.gz", gzip.compress(CSV.encode())[:-9], "", "copy or compress it again"),
    Broken("bzip2 that is cut off", "rows.csv.bz2", bz2.compress(CSV.encode())[:-9], "", "copy or compress it again"),
    Broken("xz that is cut off", "rows.csv.xz", lzma.compress(CSV.encode())[:-9], "", "copy or compress it again"),
    Broken(
        "zstd that is cut off",
        "rows.csv.zst",
        zstandard.ZstdCompressor().compress(CSV.encode())[:-9],
        "",
        "copy or compress it again",
    ),
    Broken("gzip by name alone", "rows.csv.gz", CSV, "", "copy or compress it again"),
    Broken("an empty CSV", "rows.csv", "", "", "its first line must name the columns"),
    Broken("a header without rows", "rows.csv", "text,label\n", "", "give a file with at least a few"),
    Broken("latin1 in place of UTF-8", "rows.csv", CSV.encode() + b"caf\xe9,x\n", "line 10", "--encoding latin1"),
    Broken("UTF-16 without its mark", "rows.csv", CSV.encode("utf-16-le"), "", "--encoding utf-16-le"),
    Broken(
        "another encoding than the one named",
        "rows.csv",
        CSV.encode() + b"caf\xe9,x\n",
        "line 10",
        "name the encoding that the file has with --encoding",
        {"encoding": "utf-8"},
    ),
    Broken("a row with a field too many", "rows.csv", CSV + "a, b,x\n", "row 9 (line 10)", 'in "double quotes"'),
    Broken("a row with a field too few", "rows.csv", CSV + "a\n", "row 9 (line 10)", 'in "double quotes"'),
    Broken("a quote that is never closed", "rows.csv", CSV + '"a,x\nb,y\n', "line 11", "check the quotes"),
    Broken("text after a closing quote", "rows.csv", CSV + '"a" b,x\n', "line 10", "check the quotes"),
    Broken("a text longer than a field may be", "rows.csv", CSV + "a" * 140_000 + ",x\n", "line 10", "as JSON lines"),
    Broken("a column twice", "rows.csv", "text,text,label\na,b,x\n", "line 1", "rename one"),
    Broken("a header that is a row", "rows.csv", "good,x\nbad,y\n" * 4, "", "name one with --text-column"),
    Broken("a column in other letters", "rows.csv", CSV.replace("text,", "Text,", 1), "", "did you mean --text-column"),
    Broken(
        "a delimiter that the header hides",
        "rows.csv",
        "text;label, checked\na;x\n" * 4,
        "row 1 (line 2)",
        "or give --delimiter ';'",
    ),
    Broken("the wrong delimiter", "rows.csv", CSV, "", "give --delimiter ','", {"delimiter": ";"}),
    Broken(
        "a delimiter for a file that has none",
        "rows.jsonl",
        jsonl(*good()),
        "",
        "--delimiter is for .csv and .tsv",
        {"delimiter": ";"},
    ),
    Broken("an empty text", "rows.csv", CSV + " ,x\n", "row 9 (line 10)", "fill it in or delete the row"),
    Broken("an empty label", "rows.csv", CSV + "a,\n", "row 9 (line 10)", "fill it in or delete the row"),
    Broken("every row of one label", "rows.csv", CSV.replace("y", "x"), "", "add rows of another label"),
    Broken(
        "numbers in place of labels",
        "rows.csv",
        "text,label\n" + "".join(f"t,{i / 7:.3f}\n" for i in range(8)),
        "",
        "put numbers into ranges",
    ),
    Broken("too few rows", "rows.csv", "text,label\na,x\nb,y\n", "", "at least 4 are needed"),
    Broken("a line that is not JSON", "rows.jsonl", jsonl(*good()) + "{'text': 'a'}\n", ROW_5, "must be one object"),
    Broken("JSON lines that are cut off", "rows.jsonl", jsonl(*good()) + '{"text": "a"', ROW_5, "must be one object"),
    Broken("a line that is a list", "rows.jsonl", jsonl(*good(), ["a", "x"]), ROW_5, "each line must look like"),
    Broken("a line without the text", "rows.jsonl", jsonl(*good(), {"label": "x"}), ROW_5, "or delete the row"),
    Broken("a text that is a number", "rows.jsonl", jsonl(*good(), {"text": 5, "label": "x"}), ROW_5, "write a string"),
    Broken(
        "a label that is a fraction",
        "rows.jsonl",
        jsonl(*good(), {"text": "a", "label": 0.5}),
        ROW_5,
        "a label is a name or a whole number",
    ),
    Broken(
        "a label that is a text",
        "rows.jsonl",
        jsonl(*good(), {"text": "a", "label": "x " * 300}),
        ROW_5,
        "at most 512 are allowed",
    ),
    Broken(
        "a column twice in a JSON row", "rows.jsonl", jsonl(*good()) + '{"text": "a", "text": "b"}\n', ROW_5, "keep one"
    ),
    Broken(
        "half of a character in a JSON row",
        "rows.jsonl",
        jsonl(*good(), {"text": "a \ud83d b", "label": "x"}),
        ROW_5,
        "write the whole character, or delete the row",
    ),
    Broken(
        "half of a character in an array",
        "rows.json",
        json.dumps([*good(), {"text": "a", "label": "\udc00"}], indent=0),
        "row 5 (line 21)",
        "write the whole character, or delete the row",
    ),
    Broken("an array that is cut off", "rows.json", json.dumps(good())[:-1], "row 4 (line 1)", "may be cut off"),
    Broken(
        "an array with a comma too many",
        "rows.json",
        json.dumps(good(), indent=0)[:-2] + ",\n]",
        "row 5 (line 18)",
        "check the brackets, quotes and commas",
    ),
    Broken("an array of lists", "rows.json", '[{"text": "a"},\n["b", "x"]]', "row 2 (line 2)", "must look like"),
    Broken("two arrays in a file", "rows.json", json.dumps(good()) + "\n[]\n", "line 2", "delete it"),
    Broken(
        "rows within an object", "rows.json", json.dumps({"rows": good()}, indent=1), "", "the array of 'rows' alone"
    ),
    Broken("Parquet that is cut off", "rows.parquet", parquet(good())[:-9], "", "write it again"),
    Broken(
        "a Parquet text that is null",
        "rows.parquet",
        parquet([*good(), {"text": None, "label": "x"}]),
        "row 5",
        "or delete the row",
    ),
    Broken("a Parquet text that is latin1", "rows.parquet", no_text, "row 3", "write the file again"),
    Broken(
        "a Parquet label with decimals",
        "rows.parquet",
        parquet([{"text": "a", "label": Decimal("1.00")}, {"text": "b", "label": Decimal("2.50")}] * 2),
        "row 2",
        "cast it to int or text",
    ),
    Broken("Parquet without rows", "rows.parquet", no_rows(), "", "give a file with at least"),
    Broken("a class number without a name", "rows.parquet", classes, "row 3", "write the file again"),
    Broken("a saved folder without its rows", "saved", damaged_folder, "", "save the data set again"),
    Broken("a saved folder of a data set without rows", "saved", empty_folder, "", "give a file with at least a few"),
    Broken("a saved folder without the split", "saved", split_folder, "", "name the folder of one of them"),
    Broken(
        "a pair whose second text is missing",
        "rows.jsonl",
        jsonl(*[{**row, "second": "b"} for row in good()], {"text": "a", "label": "x"}),
        ROW_5,
        "write a string or delete the row",
        {"text_pair_column": "second"},
    ),
    Broken(
        "Alpaca's columns without their format",
        "rows.jsonl",
        jsonl({"instruction": "a", "output": "b"}),
        "",
        "give --format alpaca",
        GENERATE,
    ),
    Broken(
        "an empty completion",
        "rows.jsonl",
        jsonl({"prompt": "a", "completion": " "}),
        "row 1 (line 1)",
        "fill it in or delete the row",
        GENERATE,
    ),
    Broken(
        "a chat that is a string",
        "rows.jsonl",
        jsonl({"messages": "hi"}),
        "row 1 (line 1)",
        "must be a list such as",
        CHATS,
    ),
    Broken(
        "a chat without an answer",
        "rows.jsonl",
        jsonl({"messages": CHAT[:1]}),
        "row 1 (line 1)",
        "add one or delete the row",
        CHATS,
    ),
    Broken(
        "a turn of an unknown role",
        "rows.jsonl",
        jsonl({"messages": [{"role": "robot", "content": "a"}, *CHAT]}),
        "row 1 (line 1)",
        "use one of system, user",
        CHATS,
    ),
    Broken(
        "a turn with other keys",
        "rows.jsonl",
        jsonl({"messages": [{"speaker": "a", "text": "b"}, *CHAT]}),
        "row 1 (line 1)",
        "must have exactly the keys",
        CHATS,
    ),
    Broken(
        "a turn without text",
        "rows.jsonl",
        jsonl({"messages": [*CHAT, {"role": "user", "content": ""}]}),
        "row 1 (line 1)",
        "delete the turn",
        CHATS,
    ),
    Broken("a name of the hub that is none", "hub:moods", None, "", "write hub:owner/name"),
]


def error_of(broken: Broken, home: Path) -> tuple[str, str]:
    """The path of the file as an error names it, and the error."""
    path = Path(broken.name) if broken.name.startswith("hub:") else home / broken.name
    if callable(broken.content):
        broken.content(path)
    elif broken.content is not None:
        path.write_bytes(broken.content.encode() if isinstance(broken.content, str) else broken.content)
    load = load_generate_data if broken.options.get("task") == "generate" else load_classify_data
    with pytest.raises(InvalidData) as caught:
        load(settings_for(Path("tiny"), home, path, **broken.options))
    return str(path), caught.value.message


@pytest.mark.parametrize("broken", KINDS, ids=lambda broken: broken.kind)
def test_the_error_names_file_place_and_remedy(broken: Broken, tmp_path: Path) -> None:
    path, message = error_of(broken, tmp_path)
    assert path in message
    assert broken.place in message
    assert broken.remedy in message
    assert ("row " in message.replace(path, "")) >= broken.place.startswith("row ")


def table() -> str:
    """The rows of the table in docs/results.md."""
    lines = ["| what is wrong | file | the error |\n", "| --- | --- | --- |\n"]
    for broken in KINDS:
        with tempfile.TemporaryDirectory() as home:
            _, message = error_of(broken, Path(home))
            text = message.replace(f"{home}/", "").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {broken.kind} | `{broken.name}` | {text} |\n")
    return "".join(lines)


def without_reasons(text: str) -> str:
    """The table without the reasons in parentheses, which other versions of libraries give in other words."""
    while (shorter := re.sub(r" \([^()]*\)", "", text)) != text:
        text = shorter
    return text


def test_the_results_have_the_table() -> None:
    assert len(KINDS) >= 50
    assert len({broken.kind for broken in KINDS}) == len(KINDS)
    text = RESULTS.read_text(encoding="utf-8")
    kept = text.partition(BEGIN)[2].partition(END)[0]
    assert without_reasons(kept) == without_reasons(table()), "write the output of this module between the marks"


if __name__ == "__main__":
    sys.stdout.write(table())
