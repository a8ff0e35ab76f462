"""Structured output: compiles what a client asks for (JSON, a regex, a grammar) into masks over the vocabulary.

The library is llguidance: https://github.com/guidance-ai/llguidance. It computes each mask from the bytes of the tokens
by a lazy automaton and an Earley parser, without Python's lock. docs/decisions.md has the comparison with others.

Compiling is bounded by the sizes that are checked first, and by the library's own limits. A text whose parser becomes
too large or too slow later ends its own request with an error.

The library does not tell what memory it holds, and nothing else can be measured while other threads allocate too. So
each compiled text reserves the most that it may grow to, for as long as it exists. Nearly all texts need little. One
that outgrows its room is compiled anew in the larger one.
"""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sera_serve.engine.constraint import (
    FIELDS,
    MAX_GRAMMAR_CHARACTERS,
    MAX_REGEX_CHARACTERS,
    MAX_SCHEMA_CHARACTERS,
    ConstraintKind,
    ConstraintSpec,
)
from sera_serve.engine.schema_bounds import SchemaRefused, check_schema
from sera_serve.engine.tenant_memory import Reservation, TenantMemory
from sera_serve.errors import InvalidRequest, TenantOverloaded
from sera_serve.threads import in_background

T = TypeVar("T")

# Definitions may refer to each other in a chain, and the library follows it by recursion.
_MAX_DEFINITIONS = 256
_STACK_BYTES = 64 << 20
# `threading.stack_size` is of the process: a thread that starts meanwhile has the large stack too.
_STACK_LOCK = threading.Lock()
_CACHED, _CACHED_BYTES = 64, 1 << 30
# A line break and its indent, or one space: without a bound, a model may write white space until its limit ends it.
_WHITESPACE = r"( |\n( {0,20}|\t{0,5}))"
# The library would put several bytes that are certain into a mask at once. It looks for them without a bound:
# /a{1000000}/ took two seconds in one step.
_OPTIONS = '%llguidance {"no_forcing": true}'
# Items of a step and of a row. 20,000 are 1 ms of a step.
_SCHEMA_ITEMS = (20_000, 2000)
# A client's own rules may be ambiguous: the parser's work for a token then grows with the square of the text.
_GRAMMAR_ITEMS = (4000, 500)
_MANY_STATES = "too many states"
# The library's schema errors begin with the place in the grammar around the schema.
_PLACE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")
# Processor time that a request's masks may take: so much at first, and so much for each token.
_FREE_S = 0.25
_TOKEN_S = 0.003
# Processor time of the masks of all copies of what was compiled, beside the time to compile it. Copies share the
# library's lexer, and its states add up: after enough texts there would be too many for every further one.
_SHARED_S = 0.05
# A mask that takes longer makes thousands of states: what it takes beyond counts so many times more.
_SLOW_S = 0.001
_SLOW_WEIGHT = 20


@dataclass(frozen=True)
class Room:
    """How far a compiled constraint may grow.

    Attributes:
        states: Of the library's automaton, which gets further ones while texts are checked.
        nbytes: What that takes, with the grammar itself, of a hostile text.
    """

    states: int
    nbytes: int


SMALL = Room(2000, 4 << 20)
"""Schemas of 100 properties, and grammars of 200 terminals, take less than half of the states."""
LARGE = Room(20_000, 36 << 20)


class _TooManyStates(InvalidRequest):
    """The library's automaton has more states than may be, before the first token."""


@dataclass(eq=False)
class _Compiled:
    """What is copied for each request.

    Attributes:
        matcher: It accepts no token itself.
        left_s: Processor time left to its copies.
        room: How far all of them may grow.
        reservation: Of the memory that this takes; each copy refers to this object.
    """

    matcher: LLMatcher
    left_s: float
    room: Room
    reservation: Reservation


class _Copy(NamedTuple):
    matcher: LLMatcher
    original: _Compiled


class StructuredOutput:
    """Makes the constraints of one base's tokenizer, with a bounded cache of what was compiled. Any thread.

    Locking: `_lock` guards the cache: nothing is compiled or read under it. `_reading` guards the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, end_tokens: Iterable[int]) -> None:
        """Read nothing yet: the first call of `compile` reads the tokenizer, which takes up to a second.

        Args:
            tokenizer: The base's tokenizer.
            vocabulary: Number of the model's logits.
            end_tokens: Tokens of the vocabulary that end a text. Without any, a text that may go on ends by its limit
                alone.
        """
        self._hugging_face = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = sorted(end_tokens)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        # Why it cannot be read.
        self._unreadable: str | None = None
        # By who shares and what was asked for; the least recently used one first. None of them is ever advanced.
        self._compiled: OrderedDict[tuple[str | None, ConstraintSpec], _Compiled] = OrderedDict()
        self._memory = TenantMemory()

    def compile(self, spec: ConstraintSpec, share_key: str | None = None) -> TextConstraint:
        """The constraint at its beginning; each call gives a state of its own. Blocks.

        Args:
            spec: What the text must conform to.
            share_key: Calls of one key share what was compiled. The time of a call tells what was compiled before, so
                a key should name a tenant.

        Raises:
            InvalidRequest: The text is not a schema, regex or grammar that can be enforced, or is too large.
            TenantOverloaded: What the tenant's requests have compiled may take too much memory together.
        """
        found = self.compiled(spec, share_key)
        if found is not None:
            return found
        tokenizer = self._read_tokenizer(FIELDS[spec.kind])
        try:
            copy = self._compile_in(SMALL, tokenizer, spec, share_key)
        except _TooManyStates:
            copy = self._compile_in(LARGE, tokenizer, spec, share_key)
        return self._constraint(copy, spec, share_key, tokenizer)

    def _compile_in(self, room: Room, tokenizer: LLTokenizer, spec: ConstraintSpec, share_key: str | None) -> _Copy:
        """Compile anew, for later calls too."""
        reservation = self._reserve(room, spec, share_key)
        started = time.monotonic()
        matcher = _with_deep_stack(lambda: _compile(tokenizer, spec, room.states))
        original = _Compiled(matcher, _SHARED_S + time.monotonic() - started, room, reservation)
        copy = _Copy(matcher.deep_copy(), original)
        with self._lock:
            self._compiled[share_key, spec] = original
            self._compiled.move_to_end((share_key, spec))
            self._forget()
        return copy

    def _enlarge(self, tokenizer: LLTokenizer, spec: ConstraintSpec, share_key: str | None) -> _Copy:
        """A copy in the large room, for a text that has outgrown the small one."""
        copy = self._copy(spec, share_key)
        if copy is not None and copy.original.room == LARGE:
            return copy
        return self._compile_in(LARGE, tokenizer, spec, share_key)

    def _reserve(self, room: Room, spec: ConstraintSpec, share_key: str | None) -> Reservation:
        """Reserve memory; where there is none, what the tenant does not use is forgotten first."""
        reservation = Reservation(share_key)
        if not self._memory.grow(reservation, room.nbytes):
            with self._lock:
                self._forget_unused(share_key)
            if not self._memory.grow(reservation, room.nbytes):
                field = FIELDS[spec.kind]
                raise TenantOverloaded(
                    f"{field} cannot be compiled now: the different schemas, regular expressions and grammars of this "
                    "tenant's requests under way may take too much memory together; send fewer of them at a time",
                    param=field,
                )
        return reservation

    def _forget_unused(self, share_key: str | None) -> None:
        """Forget what a key's calls have compiled and has no copy. Under `_lock`."""
        for key in [key for key in self._compiled if key[0] == share_key]:
            copied = weakref.ref(self._compiled.pop(key))
            # Its copies refer to it.
            if (original := copied()) is not None:
                self._compiled[key] = original
            del original

    def _forget(self) -> None:
        """Forget what would be compiled anew, and the least recently used that is too much. Under `_lock`."""
        for key in [key for key, one in self._compiled.items() if one.left_s < 0]:
            del self._compiled[key]
        nbytes = sum(one.room.nbytes for one in self._compiled.values())
        while len(self._compiled) > _CACHED or nbytes > _CACHED_BYTES:
            nbytes -= self._compiled.popitem(last=False)[1].room.nbytes

    def compiled(self, spec: ConstraintSpec, share_key: str | None = None) -> TextConstraint | None:
        """What `compile` would return, if it need not be compiled, or None. Takes a millisecond or two."""
        copy = self._copy(spec, share_key)
        if copy is None:
            return None
        # Whatever was compiled was compiled with it.
        assert self._tokenizer is not None
        return self._constraint(copy, spec, share_key, self._tokenizer)

    def _copy(self, spec: ConstraintSpec, share_key: str | None) -> _Copy | None:
        key = share_key, spec
        with self._lock:
            original = self._compiled.get(key)
            if original is None:
                return None
            if original.left_s < 0:
                del self._compiled[key]
                return None
            self._compiled.move_to_end(key)
            # Under the lock: another thread may copy it too.
            return _Copy(original.matcher.deep_copy(), original)

    def _constraint(
        self, copy: _Copy, spec: ConstraintSpec, share_key: str | None, tokenizer: LLTokenizer
    ) -> TextConstraint:
        words = -(-tokenizer.vocab_size // 32)
        enlarge = partial(self._enlarge, tokenizer, spec, share_key)
        return TextConstraint(copy, enlarge, spec.kind, self._vocabulary, self._end_tokens, words)

    def _read_tokenizer(self, field: str) -> LLTokenizer:
        with self._reading:
            if self._tokenizer is None and self._unreadable is None:
                try:
                    self._tokenizer = self._read()
                except Exception as error:  # noqa: BLE001 - it is told to each request: a second reading would fail too
                    self._unreadable = _one_line(error)
            if self._tokenizer is not None:
                return self._tokenizer
        raise InvalidRequest(
            f"{field} is not supported with this base: its tokenizer cannot be read by llguidance "
            f"({self._unreadable}); leave the field out",
            param=field,
        )

    def _read(self) -> LLTokenizer:
        if self._end_tokens:
            size = max(self._vocabulary, len(self._hugging_face))
            return from_tokenizer(self._hugging_face, n_vocab=size, eos_token=self._end_tokens)
        # The library needs an end token: one beyond the vocabulary, which is in no mask that the model sees.
        tokenizer = Tokenizer.from_str(self._hugging_face.backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        size = tokenizer.get_vocab_size()
        tokenizer.add_special_tokens([f"<|end {token}|>" for token in range(size, self._vocabulary + 1)])
        return LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.get_vocab_size() - 1)


class TextConstraint:
    """One request's constraint: a `TokenConstraint`. One thread at a time."""

    def __init__(
        self,
        copy: _Copy,
        enlarge: Callable[[], _Copy],
        kind: ConstraintKind,
        vocabulary: int,
        end_tokens: list[int],
        mask_words: int,
    ) -> None:
        """Take over a copy that has accepted no token; its masks have `mask_words` words.

        Args:
            copy: In a small room or a large one.
            enlarge: Gives one in a large room.
            kind: What the text must be.
            vocabulary: Number of the model's logits.
            end_tokens: Of the vocabulary.
            mask_words: Of the library's masks.
        """
        self._matcher, self._original = copy
        self._enlarge = enlarge
        self._tokens: list[int] = []
        self._kind = kind
        words = -(-vocabulary // 32)
        self._mask = np.zeros(mask_words, np.uint32)
        self._only_end = np.zeros(words, np.uint32)
        for token in end_tokens:
            self._only_end[token // 32] |= np.uint32(1 << token % 32)
        # Bits of the last word that stand for tokens.
        self._last = np.uint32((1 << (vocabulary - 32 * (words - 1))) - 1)
        self._left_s = _FREE_S

    def fill(self, allowed: NDArray[np.uint32]) -> None:
        """Write which tokens may come next; see `TokenConstraint`.

        Raises:
            InvalidRequest: The parser has become too large or too slow for this text.
            TenantOverloaded: It has outgrown its memory, and its tenant has no more.
        """
        if self._matcher.is_stopped() and not self._matcher.is_error():
            allowed[:] = self._only_end
            return
        started = time.thread_time()
        if not self._is_outgrown():
            self._compute_mask()
        if self._is_outgrown():
            self._grow()
            self._compute_mask()
        self._spend(started)
        allowed[:] = self._mask[: len(self._only_end)]
        allowed[-1] &= self._last
        if not allowed.any():
            raise self._failure("no token of this base continues the text")

    def accept(self, token: int) -> None:
        """Note the token that came next; it was allowed.

        Raises:
            InvalidRequest: The parser has become too large or too slow for this text.
        """
        if self._matcher.is_stopped():
            return
        started = time.thread_time()
        self._tokens.append(token)
        self._matcher.consume_token(token)
        self._left_s += _TOKEN_S
        # What has outgrown its room is compiled anew for the next mask.
        if not self._is_outgrown():
            self._spend(started)

    def is_ended(self) -> bool:
        """Whether only an end token may follow."""
        return self._matcher.is_stopped() and not self._is_outgrown()

    def _compute_mask(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)

    def _is_outgrown(self) -> bool:
        small = self._original.room == SMALL
        return small and self._matcher.is_error() and _MANY_STATES in self._matcher.get_error()

    def _grow(self) -> None:
        """Go on in a large room, with the text so far. Blocks while it is compiled."""
        # The next request would outgrow it too.
        self._original.left_s = -1.0
        self._matcher, self._original = self._enlarge()
        self._matcher.consume_tokens(self._tokens)

    def _spend(self, started: float) -> None:
        spent = time.thread_time() - started
        self._left_s = min(self._left_s - spent, _FREE_S)
        self._original.left_s -= spent + _SLOW_WEIGHT * max(0.0, spent - _SLOW_S)
        if self._matcher.is_error() or self._left_s < 0:
            # The next request is compiled anew: this lexer may have too many states for it, too.
            self._original.left_s = -1.0
            raise self._failure(_reason(self._matcher.get_error()) or "the text takes too long to check")

    def _failure(self, reason: str) -> InvalidRequest:
        field = FIELDS[self._kind]
        return InvalidRequest(f"{field} cannot be enforced on the text so far: {reason}; simplify it", param=field)


def _compile(tokenizer: LLTokenizer, spec: ConstraintSpec, states: int) -> LLMatcher:
    """A matcher of the library at its beginning, whose automaton may get so many states; raises InvalidRequest."""
    field = FIELDS[spec.kind]
    try:
        grammar = _GRAMMARS[spec.kind](spec.text)
    except SchemaRefused as error:
        raise InvalidRequest(f"{field} cannot be enforced: {error}", param=field) from None
    step_items, row_items = _GRAMMAR_ITEMS if spec.kind in ("grammar", "regex") else _SCHEMA_ITEMS
    limits = LLParserLimits(
        max_grammar_size=50_000,
        initial_lexer_fuel=200_000,
        # Some 4 ms of a step.
        step_lexer_fuel=50_000,
        max_lexer_states=states,
        step_max_items=step_items,
        max_items_in_row=row_items,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits)
    # The first mask shows whether any text conforms.
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    if not matcher.is_error():
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    reasons = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
    if not reasons and not mask.any():
        reasons = ["no text conforms"]
    if reasons:
        refusal = _TooManyStates if _MANY_STATES in reasons[0] else InvalidRequest
        raise refusal(f"{field} cannot be enforced: {_reason(reasons[0])}", param=field)
    return matcher


def _checked_schema(text: str) -> dict[str, Any]:
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise SchemaRefused(f"it has {len(text)} characters; the most is {MAX_SCHEMA_CHARACTERS}")
    try:
        schema: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise SchemaRefused("it is not valid JSON") from None
    check_schema(schema)
    checked: dict[str, Any] = schema
    return checked


def _json_grammar(schema: dict[str, Any]) -> str:
    return f"start: {_json_rule(schema)}\n{_OPTIONS}"


def _json_rule(schema: dict[str, Any]) -> str:
    options = {"whitespace_pattern": _WHITESPACE}
    return f"%json {json.dumps({'x-guidance': options, **schema})}"


def _tool_calls_grammar(text: str) -> str:
    # The text before a call ends at the first mark, for it is lazy. The rest is a text without a mark.
    return f"""start: (before space call space close)* REST
before[lazy]: /(?s:.*)<tool_call>/
space: /[ \\t\\r\\n]{{0,8}}/
call: {_json_rule(_checked_schema(text))}
close: "</tool_call>"
REST: ~/(?s:.*)<tool_call>(?s:.*)/
{_OPTIONS}"""


def _regex_grammar(text: str) -> str:
    if not text or len(text) > MAX_REGEX_CHARACTERS:
        raise SchemaRefused(f"it must have 1 to {MAX_REGEX_CHARACTERS} characters")
    # As in a schema's pattern, \d and \w stand for ASCII characters.
    return f"start: /{regex_to_lark(text, use_ascii='dw')}/\n{_OPTIONS}"


# A grammar's strings, regular expressions and comments, in which the rest of `_FORBIDDEN` means nothing. A string
# without an end, which the library refuses, goes to the end of its line: a scan that came back to its second character
# would take quadratic time.
_OPAQUE = r'"(?:\\.|[^"\\\n])*+"?|/(?![/*])(?:\\.|[^/\\\n])*+/?|//[^\n]*|#[^\n]*'
_FORBIDDEN = (
    ("%json", r"%\s*json\b", "send a schema as response_format"),
    ("%regex", r"%\s*regex\b", "write the expression between slashes"),
    ("%llguidance", r"%\s*llguidance\b", "the server chooses the options of the compiler"),
    ("%if", r"%\s*if\b", "rules with parameters are not supported"),
    ("::", r"::", "rules with parameters are not supported"),
    ("&", r"&", "the intersection of expressions may take too long"),
    ("~", r"~(?!\s*\d)", "the complement of an expression may take too long"),
    ("@", r"@", "there are no other grammars to refer to"),
    ("special token", r"<", "write the text of the answer only"),
    ("stop", r"\bstop(?:_capture)?\s*=", "use suffix or lazy"),
    ("temperature", r"\btemperature\s*=", "send temperature as a field of the request"),
    ("max_tokens", r"\bmax_tokens\s*=", "send the limit as a field of the request"),
    ("capture", r"[\[,]\s*capture\b", "there are no captures in the answer"),
)
_SCAN = re.compile(
    "|".join(
        [_OPAQUE, *(f"(?P<f{index}>{pattern})" for index, (_, pattern, _) in enumerate(_FORBIDDEN)), "(?P<colon>:)"]
    )
)


def checked_grammar(text: str) -> str:
    """Return a grammar with the options. Raises SchemaRefused where the grammar asks for what is not done."""
    if not text or len(text) > MAX_GRAMMAR_CHARACTERS:
        raise SchemaRefused(f"it must have 1 to {MAX_GRAMMAR_CHARACTERS} characters")
    definitions = 0
    for match in _SCAN.finditer(text):
        if match.lastgroup == "colon":
            definitions += 1
        elif match.lastgroup is not None:
            name, _, hint = _FORBIDDEN[int(match.lastgroup[1:])]
            line = text.count("\n", 0, match.start()) + 1
            raise SchemaRefused(f"{name!r} in line {line} is not supported; {hint}")
    if definitions > _MAX_DEFINITIONS:
        raise SchemaRefused(f"it has {definitions} definitions; the most is {_MAX_DEFINITIONS}")
    return f"{text}\n{_OPTIONS}"


_GRAMMARS: dict[ConstraintKind, Callable[[str], str]] = {
    "json_object": lambda text: _json_grammar({"type": "object"}),
    "json_schema": lambda text: _json_grammar(_checked_schema(text)),
    "regex": _regex_grammar,
    "grammar": checked_grammar,
    "tool_calls": _tool_calls_grammar,
}


def _with_deep_stack(work: Callable[[], T]) -> T:
    """Run work on a thread with a large stack, and return its result: the library's recursion would end the process.

    On macOS and musl, threads have far less than the 8 MiB of glibc.
    """
    with _STACK_LOCK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            outcome = in_background(work, "compiling")
        finally:
            threading.stack_size(before)
    try:
        return outcome.result()
    finally:
        # An error refers to this frame. As a cycle, it would keep what was compiled until the next collection.
        del outcome


def _reason(message: str) -> str:
    """What the library says of the client's text, in a line and without the excerpts of it."""
    if "NoExtensionBias" in message:
        return "no text conforms"
    if "oneOf constraints are not supported" in message:
        return "the schemas of oneOf cannot be told apart; make them exclude each other, or use anyOf"
    if "regex parse error" in message:
        return f"invalid regular expression: {_one_line(message.rpartition('error: ')[2].splitlines()[0])}"
    return _one_line(_PLACE.sub("", message.split("\n<")[0].split("\n   ")[0]))


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:300]
