"""Structured output, sampled at random from the masks alone: no model takes part."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import sera_serve
from benchmarks.random_schemas import random_schema
from sera_serve.engine.constraint import ConstraintKind, ConstraintSpec
from sera_serve.engine.structured import StructuredOutput, TextConstraint
from sera_serve.errors import InvalidRequest

VOCABULARY = 4096
END = (1, 6)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(sera_serve.__file__).parent / "embedded_base")


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> StructuredOutput:
    return StructuredOutput(tokenizer, VOCABULARY, END)


def allowed_by(constraint: TextConstraint, vocabulary: int = VOCABULARY) -> np.ndarray:
    mask = np.zeros(-(-vocabulary // 32), np.uint32)
    constraint.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def sample(
    constraint: TextConstraint, seed: int, limit: int, vocabulary: int = VOCABULARY, end: Any = END
) -> list[int]:
    """Tokens drawn at random from the masks until the text ends; at the limit, an error."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while not constraint.is_ended():
        assert len(tokens) < limit, "the text did not end"
        allowed = allowed_by(constraint, vocabulary)
        ends = [token for token in allowed.tolist() if token in end]
        # Sooner or later, of texts that may go on for ever.
        token = int(ends[0] if ends and rng.random() < 0.5 else rng.choice(allowed))
        constraint.accept(token)
        if token in end:
            break
        tokens.append(token)
    return tokens


def schema_of(value: Any) -> ConstraintSpec:
    return ConstraintSpec("json_schema", json.dumps(value))


@pytest.mark.parametrize("seed", range(20))
def test_any_draw_from_the_masks_conforms_to_the_schema(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    tokens = sample(compiler.compile(schema_of(PERSON)), seed, 500)
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), PERSON)


def test_the_properties_come_in_the_order_of_the_schema(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase
) -> None:
    schema = {"type": "object", "properties": {"z": {"const": 1}, "a": {"const": 2}}, "required": ["a", "z"]}
    text = tokenizer.decode(sample(compiler.compile(schema_of({**schema, "additionalProperties": False})), 0, 200))
    assert list(json.loads(text)) == ["z", "a"]


@pytest.mark.parametrize("seed", range(5))
def test_a_regular_expression_matches_the_whole_text(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    pattern = r"(GET|POST) /[a-z]{1,8}(/\d+)? HTTP/1\.[01]"
    text = tokenizer.decode(sample(compiler.compile(ConstraintSpec("regex", pattern)), seed, 100))
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("seed", range(5))
def test_a_grammar_holds_for_the_whole_text(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    grammar = 'start: sum\nsum: sum "+" NUMBER | NUMBER // left recursive\nNUMBER: /[0-9]{1,3}/'
    text = tokenizer.decode(sample(compiler.compile(ConstraintSpec("grammar", grammar)), seed, 500))
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3})*", text)


def test_white_space_between_two_values_is_bounded(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase
) -> None:
    constraint = compiler.compile(ConstraintSpec("json_object"))
    constraint.accept(tokenizer.convert_tokens_to_ids("{"))
    spaces = [token for token in range(VOCABULARY) if not tokenizer.decode([token]).strip() and token not in range(7)]
    given = 0
    while blank := [token for token in allowed_by(constraint).tolist() if token in spaces]:
        # A line break first: its indent is the longest white space.
        constraint.accept(max(blank, key=lambda token: "\n" in tokenizer.decode([token])))
        given += 1
        assert given < 50
    assert given


def test_the_end_token_is_allowed_where_the_text_may_end(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase
) -> None:
    constraint = compiler.compile(ConstraintSpec("regex", "ab?"))
    assert not set(END) & set(allowed_by(constraint).tolist())
    constraint.accept(tokenizer.convert_tokens_to_ids("a"))
    assert set(END) < set(allowed_by(constraint).tolist())
    assert not constraint.is_ended()
    constraint.accept(tokenizer.convert_tokens_to_ids("b"))
    assert constraint.is_ended()
    assert allowed_by(constraint).tolist() == list(END)
    constraint.accept(END[1])
    assert constraint.is_ended()


CALL = {
    "type": "object",
    "properties": {"name": {"const": "look"}, "arguments": PERSON},
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
RIGHT = '{"name": "look", "arguments": {"name": "<tool_call>", "age": 3}}'
WRONG = '{"name": "look", "arguments": {"name": "a", "age": 300}}'


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("", True),
        ("Hello,\n\nworld. ☠ {a: 1} <tool_call", True),
        (f"<tool_call>\n{RIGHT}\n</tool_call>", True),
        (f"Let me see.\n<tool_call>{RIGHT}</tool_call>\n<tool_call>\n{RIGHT}\n</tool_call> So.", True),
        (f"<tool_call>{RIGHT}", False),
        ("a <tool_call>\n", False),
        ("a <tool_call> b", None),
        ("<tool_call>{}", None),
        ('<tool_call>{"name": "other"', None),
        (f"a\n<tool_call>{WRONG}</tool_call>", None),
        (f"<tool_call>{RIGHT}</tool_call> and <tool_call>\n{WRONG}", None),
        (f"<tool_call>{RIGHT}<tool_call>", None),
    ],
)
def test_calls_in_a_text_conform_and_the_rest_is_free(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase, text: str, ends: bool | None
) -> None:
    constraint = compiler.compile(ConstraintSpec("tool_calls", json.dumps(CALL)))
    conforms = True
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        conforms = conforms and token in allowed_by(constraint)
        if conforms:
            constraint.accept(token)
    assert conforms is (ends is not None)
    if conforms:
        assert (END[0] in allowed_by(constraint)) is ends and not constraint.is_ended()


def test_two_requests_with_one_schema_have_states_of_their_own(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase
) -> None:
    first, second = (compiler.compile(ConstraintSpec("regex", "xy")) for _ in range(2))
    first.accept(tokenizer.convert_tokens_to_ids("x"))
    assert tokenizer.convert_tokens_to_ids("x") in allowed_by(second)
    assert tokenizer.convert_tokens_to_ids("x") not in allowed_by(first)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of the 256 bytes, without an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_base_without_an_end_token_ends_with_the_value() -> None:
    # The library's own end token is the 257th: no word of the mask has a bit for it.
    constraint = StructuredOutput(byte_tokenizer(), 256, ()).compile(schema_of({"const": {"a": [1]}}))
    sample(constraint, 0, 200, 256, ())
    assert constraint.is_ended()


def test_logits_beyond_the_tokenizer_are_never_allowed(tokenizer: PreTrainedTokenizerBase) -> None:
    constraint = StructuredOutput(tokenizer, VOCABULARY + 100, END).compile(ConstraintSpec("regex", "(?s:.*)"))
    allowed = allowed_by(constraint, VOCABULARY + 100)
    assert len(allowed) > 3000
    assert allowed.max() < VOCABULARY


def test_a_tokenizer_that_the_library_cannot_read_is_refused_by_name_and_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[StructuredOutput] = []
    read = StructuredOutput._read
    monkeypatch.setattr(StructuredOutput, "_read", lambda self: reads.append(self) or read(self))
    unreadable = StructuredOutput(object(), 8, ())  # type: ignore[arg-type]
    kinds: tuple[ConstraintKind, ...] = ("regex", "grammar")
    for kind in kinds:
        with pytest.raises(InvalidRequest, match=r"not supported with this base: .* no attribute") as refusal:
            unreadable.compile(ConstraintSpec(kind, "a"))
        assert refusal.value.param == kind
    assert len(reads) == 1


REFUSED: list[tuple[ConstraintKind, str, str]] = [
    ("json_schema", "{", "not valid JSON"),
    ("json_schema", "[" * 5000, "not valid JSON"),
    ("json_schema", "[]", "a JSON object"),
    ("json_schema", '{"not":{}}', "'not' at / is not supported"),
    ("json_schema", '{"properties":{"a":{"uniqueItems":true}}}', "'uniqueItems' at /properties/a"),
    ("json_schema", '{"x-guidance":{"lenient":true}}', "'x-guidance'"),
    ("json_schema", '{"type":"string","format":"phone"}', "Unknown format: phone"),
    ("json_schema", '{"oneOf":[{"type":"object"},{"type":"object"}]}', "cannot be told apart"),
    ("json_schema", '{"$ref":"#"}', "no text conforms"),
    ("json_schema", '{"type":"string","minLength":2,"maxLength":1}', "minLength"),
    ("json_schema", '{"type":"string","pattern":"(a"}', "invalid regular expression: unclosed group"),
    ("json_schema", '{"type":"number","multipleOf":1e999}', "multipleOf at / must be a number above 0, and finite"),
    ("json_schema", '{"type":"number","multipleOf":NaN}', "multipleOf at / must be a number above 0, and finite"),
    ("tool_calls", '{"not":{}}', "'not' at / is not supported"),
    ("tool_calls", '{"type":"string","minLength":2,"maxLength":1}', "minLength"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", r"a[^\s\S]", "no text conforms"),
    ("regex", "a" * 5000, "4096 characters"),
    ("grammar", "start: foo", 'unknown name: "foo"'),
    ("grammar", "begin: 'a'", "cannot be enforced"),
    ("grammar", "start: %json {}", "'%json' in line 1"),
    ("grammar", 'start: "a"\n%llguidance {}', "'%llguidance' in line 2"),
    ("grammar", "start: A & B", "'&' in line 1"),
    ("grammar", "start: ~A", "'~' in line 1"),
    ("grammar", "start: <|end|>", "'special token' in line 1"),
    ("grammar", "start[temperature=0.5]: /a/", "'temperature' in line 1"),
    ("grammar", "start[capture]: /a/", "'capture' in line 1"),
    ("grammar", "\n".join(f"r{index}: r{index + 1}" for index in range(300)), "300 definitions"),
    ("grammar", "#" * 20_000, "16384 characters"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), REFUSED)
def test_what_cannot_be_enforced_is_refused_with_its_field_and_reason(
    compiler: StructuredOutput, kind: ConstraintKind, text: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        compiler.compile(ConstraintSpec(kind, text))
    assert reason in refusal.value.message
    assert refusal.value.param == {"json_schema": "response_format.json_schema.schema", "tool_calls": "tools"}.get(
        kind, kind
    )
    assert len(refusal.value.message) < 500


def test_what_a_grammar_only_quotes_is_no_reason_to_refuse_it(
    compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase
) -> None:
    grammar = 'start: "%json & <b> \\" ~" /x&y/ "a"~2..3 // & %regex <c>'
    text = tokenizer.decode(sample(compiler.compile(ConstraintSpec("grammar", grammar)), 0, 100))
    assert re.fullmatch(r'%json & <b> " ~x&ya{2,3}', text)


def _chain(length: int) -> str:
    rules = [f'r{index}: "a" r{index + 1} | "b"' for index in range(length)]
    return "\n".join(["start: r0", *rules, f'r{length}: "c"'])


def _references(length: int) -> dict[str, Any]:
    links = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "object"}}}


DOUBLED = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
# Each is the largest that the bounds let through, or a form that is known to be costly.
HOSTILE: dict[str, ConstraintSpec] = {
    "chain of rules": ConstraintSpec("grammar", _chain(250)),
    "chain of references": schema_of(_references(480)),
    "doubling references": schema_of({"$ref": "#/$defs/d0", "$defs": {**DOUBLED, "d30": {"type": "object"}}}),
    "a million items": schema_of({"type": "array", "minItems": 10**6, "maxItems": 10**7}),
    "a million characters": schema_of({"type": "string", "minLength": 10**6}),
    "a large multiple": schema_of({"type": "integer", "multipleOf": 9973}),
    "many properties": schema_of({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}),
    "a huge enum": schema_of({"enum": [f"value {index}" for index in range(4000)]}),
    "repetition of repetitions": ConstraintSpec("regex", "((a{1000}){1000}){1000}"),
    "exponential backtracking": ConstraintSpec("regex", "(a*)*(.{0,1000}b){1000}"),
    "many states": ConstraintSpec("regex", "(.*[ab]){40}.{100}"),
    "ambiguous": ConstraintSpec("grammar", "start: e\ne: e e | e e e | X |\nX: /[a-z]/"),
    "right recursive": ConstraintSpec("grammar", "start: X start |\nX: /[a-z]/"),
    "nested repetition": ConstraintSpec("grammar", 'start: (("a" | "b"){0,1000}){0,1000}'),
    "left recursive for ever": ConstraintSpec("grammar", "start: start"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_takes_bounded_time_and_ends_in_an_answer_or_an_error(
    compiler: StructuredOutput, name: str
) -> None:
    started = time.process_time()
    taken = 0.0
    try:
        constraint = compiler.compile(HOSTILE[name])
        rng = np.random.default_rng(0)
        for _ in range(150):
            if constraint.is_ended():
                break
            began = time.thread_time()
            token = int(
                rng.choice([token for token in allowed_by(constraint).tolist() if token not in END] or [END[0]])
            )
            constraint.accept(token)
            taken = max(taken, time.thread_time() - began)
    except InvalidRequest as error:
        assert "cannot be enforced" in error.message
    assert taken < 0.3
    assert time.process_time() - started < 5


def test_many_patterns_that_must_hold_at_once_are_refused_before_they_are_compiled(compiler: StructuredOutput) -> None:
    # Compiled, 30 of them take more than four minutes.
    schema = {"type": "string", "allOf": [{"pattern": f"a.{{{index}}}b"} for index in range(30)]}
    with pytest.raises(InvalidRequest, match="30 patterns"):
        compiler.compile(schema_of(schema))


def test_the_cache_is_bounded_and_shared_by_one_key_only(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[ConstraintSpec] = []
    module = "sera_serve.engine.structured"
    original: Callable[..., Any] = __import__(module, fromlist=["_compile"])._compile

    def counted(tokenizer: Any, spec: ConstraintSpec, states: int) -> Any:
        compiled.append(spec)
        return original(tokenizer, spec, states)

    monkeypatch.setattr(f"{module}._compile", counted)
    monkeypatch.setattr(f"{module}._CACHED", 2)
    compiler = StructuredOutput(tokenizer, VOCABULARY, END)
    a, b, c = (ConstraintSpec("regex", text) for text in "abc")
    for spec, key in [(a, "x"), (a, "x"), (a, "y"), (a, "x"), (b, "x"), (a, "x"), (c, "x"), (a, "y")]:
        compiler.compile(spec, key)
    # The second key compiles its own. `b` drops (a, y), and `c` drops `b`.
    assert compiled == [a, a, b, c, a]


def test_the_states_of_many_texts_do_not_end_later_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    # Copies of what was compiled share a lexer. Once that had too many states, a text of this grammar failed for ever.
    terminals = [f"T{index}: /[^{chr(97 + index)}]*{chr(97 + index)}.{{{index % 5}}}/" for index in range(26)]
    names = " | ".join(f"T{index}" for index in range(26))
    spec = ConstraintSpec("grammar", f"start: ({names})*\n" + "\n".join(terminals))
    compiler = StructuredOutput(tokenizer, VOCABULARY, END)
    for _ in range(2):
        constraint = compiler.compile(spec)
        allowed_by(constraint)
        with pytest.raises(InvalidRequest, match="too many states"):
            for token in np.random.default_rng(1).permutation(np.arange(300, 400)):
                constraint.accept(int(token))
                allowed_by(constraint)


def test_what_was_compiled_is_shared_until_its_copies_have_taken_long(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sera_serve.engine.structured._SHARED_S", -1000.0)
    compiler = StructuredOutput(tokenizer, VOCABULARY, END)
    spec = ConstraintSpec("regex", "[a-z]+")
    compiler.compile(spec)
    assert compiler.compiled(spec) is None


def test_after_a_slow_mask_the_next_text_is_compiled_anew(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sera_serve.engine.structured.time.thread_time", iter([0.0, 0.0009, 1.0, 1.2]).__next__)
    compiler = StructuredOutput(tokenizer, VOCABULARY, END)
    spec = ConstraintSpec("regex", "[a-z]+")
    constraint = compiler.compile(spec)
    allowed_by(constraint)
    assert compiler.compiled(spec) is not None
    allowed_by(constraint)
    assert compiler.compiled(spec) is None


def test_threads_may_compile_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    compiler = StructuredOutput(tokenizer, VOCABULARY, END)
    texts: list[str] = []

    def work(seed: int) -> None:
        tokens = sample(compiler.compile(schema_of(PERSON)), seed, 500)
        texts.append(tokenizer.decode(tokens))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


def test_random_schemas_give_texts_that_conform(compiler: StructuredOutput, tokenizer: PreTrainedTokenizerBase) -> None:
    # benchmarks/structured_output.py does it with 500 and a model.
    for seed in range(80):
        schema = random_schema(seed)
        text = tokenizer.decode(sample(compiler.compile(schema_of(schema)), seed, 1000))
        jsonschema.validate(json.loads(text), schema)
