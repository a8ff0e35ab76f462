"""Three libraries for structured output: time to compile, time for a mask, and what hostile texts do.

Each library runs in processes of its own, one for each vocabulary or hostile text. Times are processor time. The
libraries that are not installed are left out: `pip install llguidance xgrammar outlines-core`.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import pre_tokenizers

from benchmarks.last_line import tell
from benchmarks.random_schemas import random_schema

LIBRARIES = ("llguidance", "xgrammar", "outlines-core")
VOCABULARIES = (512, 32_000, 128_256)
TOKENS = 64
# Of the processor, for what a library compiles; and of the clock, until a process is given up.
LIMIT_S = 6.0
GIVEN_UP_S = {"ordinary": 180, "hostile": 20}

HOSTILE: dict[str, tuple[str, Any]] = {
    "100 levels": ("schema", json.loads('{"type":"array","items":' * 100 + "{}" + "}" * 100)),
    "enum of 20,000": ("schema", {"enum": [f"value {index}" for index in range(20_000)]}),
    "minItems 1,000,000": ("schema", {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}),
    "multipleOf 1,000,003": ("schema", {"type": "integer", "multipleOf": 1_000_003}),
    "keyword not": ("schema", {"not": {"type": "string"}}),
    "30 patterns at once": ("schema", {"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(30)]}),
    "(a*)*b": ("regex", "(a*)*b"),
    "((a{1000}){1000}){1000}": ("regex", "((a{1000}){1000}){1000}"),
    "(.*[ab]){40}.{100}": ("regex", "(.*[ab]){40}.{100}"),
    "left recursion": ("grammar", 'start: start "a" | "a"'),
    "ambiguous": ("grammar", 'start: start start | start start start | "a"'),
}


class Library(Protocol):
    """One library over one vocabulary; token 0 ends a text."""

    def compile(self, kind: str, text: Any) -> Callable[[], Any]:
        """Compile; the result makes the state of a request."""

    def fill(self, state: Any) -> np.ndarray:
        """The mask of the next token, as words of 32 bits."""

    def accept(self, state: Any, token: int) -> bool:
        """Note a token; whether the text goes on."""


def vocabulary(size: int) -> list[str]:
    """An end token, the 256 bytes, and random pieces of words, as a byte-level tokenizer writes them."""
    rng = random.Random(size)
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    seen = set(tokens)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "er", "in", "on")]
    ends = ["", "", "", "s", "ed", "ing", ",", '":', '",', '"', "}", " ", ".", "1", "00"]
    while len(tokens) < size:
        piece = rng.choice(["", "", "\u0120"]) + "".join(rng.choices(syllables, k=rng.randint(1, 5))) + rng.choice(ends)
        piece = piece.replace(" ", "\u0120")
        if piece not in seen:
            seen.add(piece)
            tokens.append(piece)
    return tokens


class LLGuidance:
    """llguidance."""

    def __init__(self, tokens: list[str]) -> None:
        """Read the vocabulary."""
        import llguidance
        from tokenizers import Tokenizer, decoders, models

        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([tokens[0]])
        self._matcher = llguidance.LLMatcher
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=0)
        self._mask = np.zeros(-(-len(tokens) // 32), np.uint32)

    def compile(self, kind: str, text: Any) -> Callable[[], Any]:
        """Compile."""
        make = {
            "schema": lambda: self._matcher.grammar_from_json_schema(text),
            "regex": lambda: self._matcher.grammar_from_regex(text),
            "grammar": lambda: self._matcher.grammar_from_lark(text),
        }
        matcher = self._matcher(self._tokenizer, make[kind](), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher.deep_copy

    def fill(self, state: Any) -> np.ndarray:
        """Fill a mask."""
        state.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if state.is_error():
            raise ValueError(state.get_error())
        return self._mask

    def accept(self, state: Any, token: int) -> bool:
        """Accept a token."""
        return bool(state.consume_token(token)) and not state.is_stopped()


class XGrammar:
    """xgrammar."""

    def __init__(self, tokens: list[str]) -> None:
        """Read the vocabulary."""
        import xgrammar

        info = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[0])
        self._library = xgrammar
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._mask = xgrammar.allocate_token_bitmask(1, len(tokens))

    def compile(self, kind: str, text: Any) -> Callable[[], Any]:
        """Compile."""
        make: dict[str, Callable[[], Any]] = {
            "schema": lambda: self._compiler.compile_json_schema(text),
            "regex": lambda: self._compiler.compile_regex(text),
            "grammar": lambda: self._compiler.compile_lark(text),
        }
        compiled = make[kind]()
        return lambda: self._library.GrammarMatcher(compiled)

    def fill(self, state: Any) -> np.ndarray:
        """Fill a mask."""
        state.fill_next_token_bitmask(self._mask)
        return self._mask[0].numpy().view(np.uint32)

    def accept(self, state: Any, token: int) -> bool:
        """Accept a token."""
        return bool(state.accept_token(token)) and not state.is_terminated()


class OutlinesCore:
    """outlines-core; it has no grammars."""

    def __init__(self, tokens: list[str]) -> None:
        """Read the vocabulary."""
        import outlines_core
        from outlines_core.json_schema import build_regex_from_schema
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._byte = {character: byte for byte, character in bytes_to_unicode().items()}
        known: dict[bytes, list[int]] = {}
        for index, token in enumerate(tokens[1:], 1):
            known.setdefault(bytes(self._byte[character] for character in token), []).append(index)
        self._library, self._regex = outlines_core, build_regex_from_schema
        self._vocabulary = outlines_core.Vocabulary(0, known)
        self._mask = np.zeros(-(-len(tokens) // 32), np.uint32)

    def compile(self, kind: str, text: Any) -> Callable[[], Any]:
        """Compile."""
        if kind == "grammar":
            raise ValueError("no grammars")
        regex = self._regex(json.dumps(text)) if kind == "schema" else text
        index = self._library.Index(regex, self._vocabulary)
        return lambda: self._library.Guide(index)

    def fill(self, state: Any) -> np.ndarray:
        """Fill a mask."""
        state.write_mask_into(self._mask.ctypes.data, len(self._mask), 4)
        return self._mask

    def accept(self, state: Any, token: int) -> bool:
        """Accept a token."""
        state.advance(token, return_tokens=False)
        return not state.is_finished()


_MAKE: dict[str, Callable[[list[str]], Library]] = {
    "llguidance": LLGuidance,
    "xgrammar": XGrammar,
    "outlines-core": OutlinesCore,
}


def _draw(library: Library, state: Any, rng: np.random.Generator, times: list[float]) -> None:
    """Draw a text at random from the masks, and note the time of each."""
    for _ in range(TOKENS):
        started = time.process_time()
        mask = library.fill(state)
        times.append(time.process_time() - started)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if not len(allowed) or not library.accept(state, int(rng.choice(allowed))):
            return


def _ordinary(name: str, size: int, schemas: int, send: Any) -> None:
    started = time.process_time()
    library = _MAKE[name](vocabulary(size))
    read = time.process_time() - started
    compiling: list[float] = []
    filling: list[float] = []
    refused = 0
    rng = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(schemas):
        started = time.process_time()
        try:
            start = library.compile("schema", random_schema(seed, bounded=False))
        except Exception:  # noqa: BLE001 - counted
            refused += 1
            continue
        compiling.append(time.process_time() - started)
        _draw(library, start(), rng, filling)
        if sum(compiling) > LIMIT_S:
            break
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    send.send(
        {
            "schemas": len(compiling),
            "refused": refused,
            "read_ms": round(read * 1e3),
            "compile_ms_median": round(statistics.median(compiling) * 1e3, 2),
            "compile_ms_max": round(max(compiling) * 1e3, 1),
            "mask_us_median": round(statistics.median(filling) * 1e6),
            "mask_us_p99": round(float(np.quantile(filling, 0.99)) * 1e6),
            "grown_mib": grown,
        }
    )


def _hostile(name: str, case: str, send: Any) -> None:
    library = _MAKE[name](vocabulary(4096))
    times: list[float] = []
    started = time.process_time()
    try:
        start = library.compile(*HOSTILE[case])
        compiled = time.process_time() - started
        _draw(library, start(), np.random.default_rng(0), times)
        send.send(f"{compiled * 1e3:.0f} ms, mask to {max(times) * 1e3:.1f} ms")
    except Exception as error:  # noqa: BLE001 - it is the figure
        words = " ".join(str(error).split())[:60]
        send.send(f"refused in {(time.process_time() - started) * 1e3:.0f} ms: {words}")


def _in_process(limit_s: float, work: Callable[..., None], *arguments: Any) -> Any:
    """What work sends from a process of its own; or how the process ended."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, send))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(limit_s) else f"no end in {limit_s:g} s"
    except EOFError:
        process.join()
        return f"the process died ({process.exitcode})"
    finally:
        process.kill()
        process.join()


def main(
    quick: Annotated[bool, typer.Option(help="Ten schemas, the small vocabulary, no hostile texts.")] = False,
    schemas: Annotated[int, typer.Option(help="Random schemas to compile.")] = 100,
) -> None:
    """Measure, print a table, then one JSON line."""
    installed = {distribution.name.lower().replace("_", "-") for distribution in importlib.metadata.distributions()}
    rows: list[dict[str, Any]] = []
    progress = Console(stderr=True)
    for name in (name for name in LIBRARIES if name in installed):
        for size in VOCABULARIES[:1] if quick else VOCABULARIES:
            figures = _in_process(GIVEN_UP_S["ordinary"], _ordinary, name, size, 10 if quick else schemas)
            figures = figures if isinstance(figures, dict) else {"failed": figures}
            rows.append({"library": name, "vocabulary": size, **figures})
            progress.print(rows[-1])
        for case in () if quick else HOSTILE:
            rows.append(
                {"library": name, "hostile": case, "outcome": _in_process(GIVEN_UP_S["hostile"], _hostile, name, case)}
            )
            progress.print(rows[-1])
    table = Table("library", "case", "figures")
    for row in rows:
        rest = {key: value for key, value in row.items() if key not in ("library", "vocabulary", "hostile")}
        table.add_row(row["library"], str(row.get("vocabulary", row.get("hostile"))), str(rest))
    progress.print(table)
    tell("structured_libraries", rows)


if __name__ == "__main__":
    typer.run(main)
