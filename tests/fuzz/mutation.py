"""Mutated inputs: a file of the corpus with a few edits, some of which make it much longer."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

T = TypeVar("T", bytes, list[bytes])
CORPUS = Path(__file__).parent / "corpus"
# Inputs stay below this.
MAX_BYTES = 128 << 10
# What is in every kind of input: lengths, numbers and bytes that readers treat apart.
_COMMON = (
    b"\0",
    b"\xff",
    b"\n",
    b"\r\n",
    b" ",
    b"0",
    b"1",
    b"9",
    b"-1",
    b"4294967296",
    b"\x80\0\0\0",
    b'"',
    b"=",
    b":",
)


def seconds_for(share: float) -> float:
    """Seconds of one fuzz run: a share of `FUZZ_SECONDS`, the time of all runs together (16 by default)."""
    return share * float(os.environ.get("FUZZ_SECONDS", "16"))


def corpus(kind: str) -> dict[str, bytes]:
    """The files of one kind, by name."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / kind).iterdir())}


class Input(bytes):
    """Bytes whose representation is short."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes, beginning {bytes(self[:60])!r}"


@st.composite
def mutated(draw: st.DrawFn, inputs: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """One of the inputs with up to five edits.

    Args:
        inputs: The corpus.
        tokens: Pieces of the inputs' grammar.
    """
    data = draw(st.sampled_from(inputs))
    piece = st.sampled_from(tokens + _COMMON) | st.binary(min_size=1, max_size=8)
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 64)))
        kind = draw(st.sampled_from(["insert", "replace", "remove", "repeat", "repeat much", "cut", "splice"]))
        match kind:
            case "insert":
                data = data[:at] + draw(piece) + data[at:]
            case "replace":
                data = data[:at] + draw(piece) + data[end:]
            case "remove":
                data = data[:at] + data[end:]
            case "repeat":
                data = data[:end] + data[at:end] * draw(st.integers(1, 20)) + data[end:]
            case "repeat much":
                data = data[:at] + draw(piece) * draw(st.integers(100, 8000)) + data[at:]
            case "cut":
                data = data[:at]
            case _:
                other = draw(st.sampled_from(inputs))
                data = data[:at] + other[draw(st.integers(0, len(other))) :]
    return Input(data[:MAX_BYTES])


def fuzz(check: Callable[[T], None], inputs: st.SearchStrategy[T], seconds: float) -> None:
    """Check inputs for so long, in rounds.

    A failing input is shrunk and written to a new folder. The report names the folder, and the seed of the round: with
    `FUZZ_SEED` of that number the next run begins with the same round.
    """
    number = int(os.environ.get("FUZZ_SEED", "0"))
    end = time.monotonic() + seconds
    failing: list[T] = []

    def one(data: T) -> None:
        # What is left of a round is not worth the time that it would take; a failing input is still shrunk.
        if time.monotonic() < end or failing:
            try:
                check(data)
            except BaseException:
                failing.append(data)
                raise

    while time.monotonic() < end:
        limits = settings(
            max_examples=20,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        try:
            limits(seed(number)(given(inputs)(one)))()
        except Exception as error:
            folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
            last = failing[-1] if failing else b""
            for index, data in enumerate([last] if isinstance(last, bytes) else last):
                (folder / str(index)).write_bytes(data)
            error.add_note(f"FUZZ_SEED={number} begins with this round; the input is in {folder}")
            raise
        number += 1


def within_time(data: bytes, work: Callable[[], object]) -> object:
    """Run `work` on an input; its processor time must be in proportion to the input's length."""
    # A collection of garbage visits whatever earlier tests left, which has nothing to do with the input.
    gc.disable()
    begun = time.thread_time()
    try:
        return work()
    finally:
        used = time.thread_time() - begun
        gc.enable()
        # Ten times what the slowest reader takes; a quadratic one takes a hundred times.
        allowed = 0.25 + len(data) * 2e-6
        if used > allowed:
            raise AssertionError(f"{used:.2f} s for {len(data)} bytes, beginning {data[:80]!r}")
