"""What compiled constraints may take of memory, and what becomes of a text that outgrows its room."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sera_serve
from sera_serve.engine import structured
from sera_serve.engine.constraint import ConstraintSpec
from sera_serve.engine.structured import LARGE, SMALL, StructuredOutput, TextConstraint
from sera_serve.engine.tenant_memory import Reservation, TenantMemory
from sera_serve.errors import InvalidRequest, TenantOverloaded
from support.no_collection import no_collection

VOCABULARY = 4096
END = (1, 6)
# Its states are those of which letters came in the last 40: too many for the small room after some ten tokens.
GROWING = ConstraintSpec("regex", "(.*a.{30})|(.*b.{40})|(.*c.{35})")
# Before the first token there are more states than a small room has.
WIDE = ConstraintSpec(
    "grammar",
    f"start: ({'|'.join(f'T{index}' for index in range(200))})*\n"
    + "\n".join(
        f"T{index}: /[^{chr(97 + index % 26)}]*{chr(97 + index % 26)}.{{{index % 50}}}/" for index in range(200)
    ),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(sera_serve.__file__).parent / "embedded_base")


@pytest.fixture
def compiler(tokenizer: PreTrainedTokenizerBase) -> StructuredOutput:
    return StructuredOutput(tokenizer, VOCABULARY, END)


def regex(number: int) -> ConstraintSpec:
    return ConstraintSpec("regex", f"[a-z]{{3}}{number}")


def allowed_by(constraint: TextConstraint) -> np.ndarray:
    mask = np.zeros(-(-VOCABULARY // 32), np.uint32)
    constraint.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def write(constraint: TextConstraint, count: int, seed: int = 0) -> list[int]:
    """Accept tokens at random; returns them."""
    rng = np.random.default_rng(seed)
    tokens = []
    for _ in range(count):
        tokens.append(int(rng.choice(np.setdiff1d(allowed_by(constraint), END))))
        constraint.accept(tokens[-1])
    return tokens


def room_of(constraint: TextConstraint) -> object:
    return constraint._original.room


def test_a_tenant_has_so_much_at_a_time_and_other_tenants_too(
    compiler: StructuredOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TenantMemory, "tenant_bytes", 3 * SMALL.nbytes)
    held = [compiler.compile(regex(number), "a") for number in range(3)]
    with pytest.raises(TenantOverloaded, match=r"^regex cannot be compiled now.*send fewer") as refusal:
        compiler.compile(regex(3), "a")
    assert (refusal.value.param, refusal.value.status) == ("regex", 429)
    # Another copy of one that exists takes nothing.
    assert compiler.compile(regex(2), "a") is not None
    compiler.compile(regex(3), "b")
    del refusal, held[0]
    assert allowed_by(compiler.compile(regex(3), "a")).size


def test_what_nobody_uses_is_forgotten_before_anybody_is_refused(
    compiler: StructuredOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TenantMemory, "tenant_bytes", 3 * SMALL.nbytes)
    used = compiler.compile(regex(0), "a")
    for number in range(1, 10):
        compiler.compile(regex(number), "a")
    assert compiler.compiled(regex(9), "a") is not None
    assert compiler.compiled(regex(1), "a") is None
    again = compiler.compiled(regex(0), "a")
    assert again is not None and again._original is used._original


def test_where_all_have_too_much_together_who_has_more_than_a_share_gets_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TenantMemory, "all_bytes", 4 * SMALL.nbytes)
    memory = TenantMemory()
    held = [Reservation("a") for _ in range(4)]
    assert all(memory.grow(one, SMALL.nbytes) for one in held)
    assert not memory.grow(Reservation("a"), SMALL.nbytes)
    other = Reservation("b")
    assert memory.grow(other, SMALL.nbytes)
    assert memory.grow(Reservation("b"), SMALL.nbytes)
    del held[1:]
    assert memory.grow(Reservation("a"), SMALL.nbytes)


def test_a_cache_holds_so_many_bytes(compiler: StructuredOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_CACHED_BYTES", 2 * SMALL.nbytes)
    for number in range(3):
        compiler.compile(regex(number), str(number))
    assert [compiler.compiled(regex(number), str(number)) is not None for number in range(3)] == [False, True, True]


def test_what_would_be_compiled_anew_is_not_kept(compiler: StructuredOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_SHARED_S", -1000.0)
    compiler.compile(regex(0), "a")
    monkeypatch.undo()
    compiler.compile(regex(1), "a")
    assert [spec for _, spec in compiler._compiled] == [regex(1)]


def test_a_text_that_outgrows_the_small_room_goes_on_in_the_large_one(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (compiler.compile(GROWING, "a") for _ in range(2))
    assert room_of(first) == room_of(second) == SMALL
    count = next(count for count in range(1, 100) if write(first, 1, count) and room_of(first) == LARGE)
    tokens = [*first._tokens, *write(first, 5)]
    assert len(tokens) == count + 5
    with monkeypatch.context() as patch:
        patch.setattr(structured, "SMALL", LARGE)
        large = StructuredOutput(tokenizer, VOCABULARY, END).compile(GROWING)
    for constraint in (second, large):
        for token in tokens:
            assert token in allowed_by(constraint)
            constraint.accept(token)
        assert np.array_equal(allowed_by(constraint), allowed_by(first))
    # The second found what was compiled for the first, and so does who comes now.
    third = compiler.compile(GROWING, "a")
    assert first._original is second._original is third._original


def test_a_text_that_outgrows_its_room_without_memory_for_more_ends_alone(
    compiler: StructuredOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraint, other = compiler.compile(GROWING, "a"), compiler.compile(regex(0), "a")
    monkeypatch.setattr(TenantMemory, "tenant_bytes", LARGE.nbytes)
    with pytest.raises(TenantOverloaded, match="send fewer"):
        write(constraint, 100)
    assert allowed_by(other).size


def test_what_is_too_wide_for_the_small_room_is_compiled_in_the_large_one(compiler: StructuredOutput) -> None:
    constraint = compiler.compile(WIDE, "a")
    assert room_of(constraint) == LARGE
    assert allowed_by(constraint).size


def test_a_text_may_outgrow_the_large_room_too(compiler: StructuredOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "LARGE", SMALL)
    with pytest.raises(InvalidRequest, match=r"^grammar cannot be enforced: .*too many states"):
        compiler.compile(WIDE, "a")


def test_what_was_refused_takes_no_memory(compiler: StructuredOutput) -> None:
    with no_collection():
        with pytest.raises(InvalidRequest):
            compiler.compile(ConstraintSpec("regex", "a{3}|b(?=c)"), "a")
        assert not compiler._memory._reservations


def test_ordinary_schemas_have_room_in_the_small_one(compiler: StructuredOutput) -> None:
    properties = {f"property{index}": {"type": "string", "maxLength": 50} for index in range(100)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    spec = ConstraintSpec("json_schema", json.dumps(schema))
    rng = np.random.default_rng(1)
    for _ in range(10):
        constraint = compiler.compile(spec, "a")
        for _ in range(100):
            if constraint.is_ended():
                break
            constraint.accept(int(rng.choice(allowed_by(constraint))))
        assert room_of(constraint) == SMALL
