"""Checks an uploaded training file row by row, in bounded memory, with the trainer's own checks of a row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from adapters_store import parse_json
from sera_serve.errors import SeraServeError
from sera_serve.threads import pause
from sera_serve.trainer.data.spans import spans_of
from sera_serve.trainer.data.targets import labels_of, number_of
from sera_serve.trainer.tables.faults import InvalidData, Problems, Row
from sera_serve.trainer.tables.fields import label_of, messages_of, string_of, text_of

RowKind = Literal["messages", "prompt", "text", "pair", "labels", "pair-labels", "score", "pair-score", "spans"]
"""What each row of a file has, besides the text: a label, labels, a score or spans; of a pair, two texts."""
JobTask = Literal["generate", "classify", "multi-label", "regress", "token-classify"]
"""What a job trains. `multi-label` is the trainer's `classify` with several labels a text."""

KINDS: dict[RowKind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    # Pairs come before single texts, whose fields a pair has too.
    "pair": ("text", "text_pair", "label"),
    "text": ("text", "label"),
    "pair-labels": ("text", "text_pair", "labels"),
    "labels": ("text", "labels"),
    "pair-score": ("text", "text_pair", "score"),
    "score": ("text", "score"),
    "spans": ("text", "spans"),
}
"""The fields of each kind of row."""
_TEXTS = {"text", "text_pair"}
TASK_OF: dict[RowKind, JobTask] = {
    "messages": "generate",
    "prompt": "generate",
    "pair": "classify",
    "text": "classify",
    "pair-labels": "multi-label",
    "labels": "multi-label",
    "pair-score": "regress",
    "score": "regress",
    "spans": "token-classify",
}
"""What each kind of row is for."""
MAX_ROWS = 200_000
MAX_LINE_BYTES = 1 << 20
# Faults are shown for so many rows at most. The rest of the file is then not read.
_MAX_FAULTS = 20
_SHAPES = (
    '{"messages": [...]}, or {"prompt": ..., "completion": ...}, or {"text": ...} with "label", "labels" (a list), '
    '"score" (a number) or "spans" (a list), and perhaps with "text_pair" where there are no spans'
)
_SPAN_KEYS = {"start", "end", "label"}


class InvalidTrainingFile(SeraServeError):
    """The training file has rows that cannot be used. The message names rows, lines and remedies."""

    code = "invalid_training_file"
    status = 422


@dataclass(frozen=True)
class CheckedRows:
    """What a check found.

    Attributes:
        kind: What each row has.
        rows: Number of rows.
        nbytes: Bytes of the file.
        sha256: Hexadecimal SHA-256 of the bytes.
        labels: Number of different labels, of texts or of spans; 0 for rows without labels.
    """

    kind: RowKind
    rows: int
    nbytes: int
    sha256: str
    labels: int


def check_rows(file: BinaryIO) -> CheckedRows:
    """Check a JSONL file from its beginning. Blocks; memory is bounded by one line, and a number a row.

    Raises:
        InvalidTrainingFile: The file has no rows, too many, rows of several kinds, or rows that cannot be learned from.
    """
    problems = Problems(Path("the file"))
    digest = hashlib.sha256()
    kind: RowKind | None = None
    rows = nbytes = 0
    labels: set[int] = set()
    number = 0
    file.seek(0)
    while content := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        nbytes += len(content)
        digest.update(content)
        if len(content) > MAX_LINE_BYTES:
            raise _refused(f"line {number} has more than {MAX_LINE_BYTES} bytes; split the row into shorter ones")
        if number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")
        if not content.strip():
            continue
        rows += 1
        if rows > MAX_ROWS:
            raise _refused(f"the file has more than {MAX_ROWS} rows; send several files, one a job")
        row = _parsed(content, rows, number, problems)
        if row is not None:
            own = _kind_of(row, kind, problems)
            kind = kind or own
            if own is not None and own != kind:
                problems.add(row, f"it has {_words(own)}, and rows before it have {_words(kind)}; one kind a file")
            elif own is not None:
                _check(row, own, problems)
                # `update` would keep the interpreter's lock: 0.02 s for a row of 100,000 labels.
                for label in _label_names(row):
                    labels.add(hash(label))
        if len(problems.found) >= _MAX_FAULTS:
            break
        pause()
    try:
        problems.raise_if_any()
    except InvalidData as error:
        raise _refused(error.message) from None
    if kind is None:
        raise _refused(f"the file has no rows; each line is one JSON object: {_SHAPES}")
    return CheckedRows(kind, rows, nbytes, digest.hexdigest(), len(labels))


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Blocks; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(content: bytes, rows: int, number: int, problems: Problems) -> Row | None:
    row = Row({}, rows, number)
    try:
        # Half of a surrogate pair is no text: what shows it, or stores it, would fail. The strict parser refuses it.
        value = parse_json(content.decode("utf-8"))
    except UnicodeDecodeError:
        problems.add(row, "it is not UTF-8; save the file as UTF-8")
    except ValueError as error:
        problems.add(row, f"not JSON ({error}); each line must be one object")
    else:
        if isinstance(value, dict):
            return Row(value, rows, number)
        problems.add(row, f"not an object; each line must look like {_SHAPES}")
    return None


def _kind_of(row: Row, before: RowKind | None, problems: Problems) -> RowKind | None:
    """The kind that the row's fields say, or None for a fault. `before` is the kind of the file's rows so far."""
    given = set(row.values)
    for kind, columns in KINDS.items():
        if given.isdisjoint(set(columns) - _TEXTS) or ("text_pair" in columns and "text_pair" not in given):
            continue
        if missing := [column for column in columns if column not in given]:
            problems.add(row, f"{missing[0]} is missing; a row of this kind has {_words(kind)}")
            return None
        if more := sorted(given - set(columns)):
            problems.add(row, f"{more[0][:64]!r} is not used; a row of this kind has {_words(kind)} alone")
            return None
        return kind
    if before is not None and given and given < set(KINDS[before]):
        lacking = next(column for column in KINDS[before] if column not in given)
        problems.add(row, f"{lacking} is missing; the rows before it have {_words(before)}")
    else:
        problems.add(row, f"it has no field that can be learned from; a row is {_SHAPES}")
    return None


def _check(row: Row, kind: RowKind, problems: Problems) -> None:
    if kind == "messages":
        messages_of(row, "messages", problems)
        return
    if kind == "prompt":
        string_of(row, "prompt", problems)
        text_of(row, "completion", problems)
        return
    text = text_of(row, "text", problems)
    if "text_pair" in KINDS[kind]:
        text_of(row, "text_pair", problems)
    if "label" in KINDS[kind]:
        label_of(row, "label", problems)
    elif "labels" in KINDS[kind]:
        _check_labels(row, problems)
    elif "score" in KINDS[kind]:
        _check_score(row, problems)
    else:
        _check_spans(row, text, problems)


def _label_names(row: Row) -> Iterator[str]:
    """The labels of a row, or of its spans, as far as they have the right form."""
    values = row.values
    if "label" in values:
        yield str(values["label"])
    if isinstance(values.get("labels"), list):
        yield from map(str, values["labels"])
    for span in values["spans"] if isinstance(values.get("spans"), list) else ():
        if isinstance(span, dict) and "label" in span:
            yield str(span["label"])


def _check_labels(row: Row, problems: Problems) -> None:
    # The trainer also takes a text with separators, for CSV.
    if isinstance(row.values["labels"], list):
        labels_of(row, "labels", "|", problems)
    else:
        problems.add(row, 'labels must be a list such as ["sport", "music"]; without any label it is []')


def _check_score(row: Row, problems: Problems) -> None:
    score = row.values["score"]
    if isinstance(score, str):
        problems.add(row, f"score is the text {score[:64]!r}; write a number such as 3.8, without quotes")
    else:
        number_of(row, "score", problems)


def _check_spans(row: Row, text: str, problems: Problems) -> None:
    spans = row.values["spans"]
    if not isinstance(spans, list):
        problems.add(row, 'spans must be a list such as [{"start": 0, "end": 5, "label": "name"}]')
        return
    for index, span in enumerate(spans):
        if isinstance(span, dict) and (more := sorted(set(span) - _SPAN_KEYS)):
            problems.add(row, f"spans[{index}] has {more[0][:64]!r}, which is not used; it has start, end and label")
    spans_of(row, "spans", text, problems)


def _words(kind: RowKind | None) -> str:
    return " and ".join(KINDS[kind or "messages"])


def _refused(message: str) -> InvalidTrainingFile:
    return InvalidTrainingFile(message, param="file")
