"""Turns what a request sends (text, sentence pairs, tokens) into model inputs."""

from __future__ import annotations

import copy
import inspect
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sera_serve.base.image_tower import BaseKind
from sera_serve.errors import InvalidRequest

LONG_CHARACTERS = 4000
"""Tokenizing a longer text takes milliseconds, in which an event loop would do nothing else."""

# Tokens beyond `max_length` after which more text changes no token of the row. Where a text is cut, the tokens of its
# last word change: at most 100 of WordPiece, which looks at words of up to 100 characters, and the last few of a longer
# word of others.
_MARGIN = 128
# A text of natural language has about so many characters a token.
_CHARACTERS_A_TOKEN = 4
# Characters that go to the tokenizer in one call: its result has some 150 bytes a token.
_CHARACTERS_AT_ONCE = 1 << 16
MAX_WINDOWS = 64
"""Windows of one text that spans are looked for in. What comes after them is cut."""
# The part of a window that it shares with the one before.
_OVERLAP = 4


@dataclass(frozen=True)
class Window:
    """The place of a row in a text that is longer than a row.

    Attributes:
        index: Windows before it.
        first: The first of its tokens whose tag it decides; the window before decides those before.
        last: The token after the last one that it decides.
    """

    index: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One row of a classification batch, before padding.

    Many rows wait, and a short text makes many tokens. So a token takes 4 bytes; in a list it would take up to 40.

    Attributes:
        input_ids: Its tokens, int32; empty for an image.
        token_type_ids: The segment of each token, int8. None means segment 0 throughout, the model's own default.
        flat_offsets: `offsets` in one array, int32: two numbers a token.
        text: The part of the input that holds all of these characters; told where there are offsets.
        is_cut: Whether the input has more tokens than these, or than those of all its windows; told where there are
            offsets.
        window: The place of the row in a text that has several; None for the only row of a text.
        pixels: Of an image, float32 (3, height, width); None for a text.
        image_tokens: Tokens that the image tower makes of the image.
    """

    input_ids: array[int]
    token_type_ids: array[int] | None = None
    flat_offsets: array[int] | None = None
    text: str | None = None
    is_cut: bool = False
    window: Window | None = None
    pixels: NDArray[np.float32] | None = field(default=None, compare=False)
    image_tokens: int = 0

    @classmethod
    def of(
        cls,
        input_ids: Iterable[int] = (),
        token_type_ids: Sequence[int] | None = None,
        offsets: Iterable[tuple[int, int]] | None = None,
        **others: Any,
    ) -> ModelInputs:
        """Make a row of what a tokenizer gives. Segments that are 0 throughout are left out."""
        types = array("b", token_type_ids) if token_type_ids and any(token_type_ids) else None
        flat = None if offsets is None else array("i", list(chain.from_iterable(offsets)))
        return cls(array("i", input_ids), types, flat, **others)

    @property
    def offsets(self) -> list[tuple[int, int]] | None:
        """The characters of the input that each token stands for, (first, after the last); None if nobody asked."""
        flat = self.flat_offsets
        return None if flat is None else list(zip(flat[::2], flat[1::2], strict=True))

    @property
    def is_image(self) -> bool:
        """Whether the row is an image."""
        return self.pixels is not None

    def __len__(self) -> int:
        return len(self.input_ids) if self.pixels is None else self.image_tokens


class Preprocessor:
    """Tokenizes inputs for one base and checks them. Every method is thread-safe.

    Truncation is a state of the tokenizer, and one thread must not change this state while another thread tokenizes.
    So rows that must be truncated have a copy of the tokenizer and a lock. `prompt` never truncates, and never waits.
    A tokenizer that is verbose says of a long text that the model cannot take it, before anything is cut.

    Attributes:
        longest_token: Characters of the longest token in the vocabulary.
        end_tokens: The tokens of the vocabulary that end a text: the generation config's, or else the tokenizer's.
            There may be none.
        has_offsets: Whether the tokenizer tells which characters a token stands for: only fast tokenizers do.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: BaseKind) -> None:
        """Prepare for the model and tokenizer of a base; nothing else may truncate with `tokenizer`."""
        self._tokenizer = tokenizer
        # The first call turns truncation off for good. After it, calls of several threads leave the tokenizer alone.
        tokenizer("")
        self._truncating = copy.deepcopy(tokenizer)
        # A text is tokenized whole then: the last tokens of a long run of one character depend on where the run begins.
        self._keeps_ends = tokenizer.truncation_side == "left"
        self.longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._lock = threading.Lock()
        # Tokenizers that put nothing between two texts, as those of many decoders, would lose where the second begins.
        self._separates_pairs = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add()
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self.end_tokens = _end_tokens(model, tokenizer)
        self.has_offsets = bool(tokenizer.is_fast)
        # A decoder that accepts token types, such as GPT-2, gives them another meaning.
        self._has_token_types = (
            kind == "encoder"
            and "token_type_ids" in tokenizer.model_input_names
            and "token_type_ids" in inspect.signature(model.forward).parameters
        )

    def prompt(self, text: str | None, token_ids: Sequence[int] | None, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a prompt; the caller compares their number with the context length.

        Args:
            text: Text to tokenize, or None.
            token_ids: Tokens to take as they are, or None. Exactly one of the two arguments is set.
            add_special_tokens: Whether the tokenizer adds its special tokens to the text.

        Raises:
            InvalidRequest: There are no tokens, a token is outside the vocabulary, or not exactly one argument is set.
        """
        if text is not None and token_ids is not None:
            raise InvalidRequest("prompt and token_ids are both set; send one of them", param="token_ids")
        if token_ids is not None:
            tokens, field = list(token_ids), "token_ids"
            if any(not 0 <= token < self._vocab_size for token in tokens):
                raise InvalidRequest(f"token_ids must lie in 0 to {self._vocab_size - 1}", param="token_ids")
        elif text is not None:
            encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
            tokens, field = list(encoded["input_ids"]), "prompt"
        else:
            raise InvalidRequest("prompt is missing; send prompt or token_ids", param="prompt")
        if not tokens:
            raise InvalidRequest(f"{field} has no tokens; send at least one", param=field)
        return tokens

    def rows(
        self,
        inputs: Sequence[str | tuple[str, str]],
        max_length: int,
        field: str = "inputs",
        offsets: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> list[ModelInputs]:
        """Return one row for each input, truncated to `max_length` tokens as in training.

        Args:
            inputs: Texts, and sentence pairs. A pair goes to the tokenizer as a pair; where the tokenizer puts no
                special token between its two texts, they are joined by a line break.
            max_length: The most tokens of a row, special tokens included.
            field: What the request calls the inputs.
            offsets: Whether the rows of texts have the offsets of their tokens; needs `has_offsets`.
            numbers: The place of each input in the request; None where the inputs are the whole request.

        Raises:
            InvalidRequest: An input has no tokens.
        """
        rows: dict[int, ModelInputs] = {}
        pairs: list[tuple[int, tuple[str, str]]] = []
        group: list[tuple[int, str]] = []
        characters = 0
        for index, value in enumerate(inputs):
            if not isinstance(value, str):
                if self._separates_pairs:
                    pairs.append((index, value))
                    continue
                value = "\n".join(value)
            if group and characters + len(value) > _CHARACTERS_AT_ONCE:
                rows.update(self._texts(group, max_length, offsets))
                group, characters = [], 0
            group.append((index, value))
            characters += len(value)
        rows.update(self._texts(group, max_length, offsets))
        if pairs:
            # Which text of a pair is cut depends on the lengths of both, up to the length of a row.
            firsts, seconds = ([pair[side] for _, pair in pairs] for side in (0, 1))
            if not self._keeps_ends:
                firsts, seconds = ([self._beginning(text, max_length) for text in texts] for texts in (firsts, seconds))
            encoded = self._truncated(firsts, seconds, max_length)
            rows.update(zip((index for index, _ in pairs), encoded, strict=True))
        for index, row in rows.items():
            if not row.input_ids:
                index = index if numbers is None else numbers[index]
                raise InvalidRequest(f"input {index} has no tokens; send some text", param=f"{field}[{index}]")
        return [rows[index] for index in range(len(inputs))]

    def windows(self, texts: Sequence[str], max_length: int, field: str = "inputs") -> Iterator[list[ModelInputs]]:
        """Yield the rows of each text, with offsets: one, or of a longer text windows of `max_length` tokens.

        A window begins with the last quarter of the window before. Each of these shared tokens is decided by the window
        that has more of its context: the first half by the window before. A text has at most `MAX_WINDOWS`; the last
        row of a longer one, as all its rows, says that it is cut.

        Args:
            texts: Texts; a tokenizer with offsets is needed (`has_offsets`).
            max_length: The most tokens of a row, special tokens included.
            field: What the request calls the texts.

        Raises:
            InvalidRequest: A text has no tokens.
        """
        for text, row in zip(texts, self.rows(texts, max_length, field, offsets=True), strict=True):
            yield self._windows(text, max_length) if row.is_cut else [row]

    def _windows(self, text: str, max_length: int) -> list[ModelInputs]:
        special = self._tokenizer.num_special_tokens_to_add()
        # Without room for a token beside the special ones, a row has one.
        room = max(1, max_length - special)
        overlap = room // _OVERLAP
        part = self._beginning(text, special + room + (MAX_WINDOWS - 1) * (room - overlap))
        with self._lock:
            side = self._truncating.truncation_side
            # The windows go from the beginning on, also where the tokenizer would keep the end of a text.
            self._truncating.truncation_side = "right"
            try:
                encoded: Any = self._truncating(
                    part,
                    truncation=True,
                    max_length=special + room,
                    stride=overlap,
                    return_overflowing_tokens=True,
                    return_offsets_mapping=True,
                )
            finally:
                self._truncating.truncation_side = side
        count = len(encoded["input_ids"])
        rows = []
        for index in range(min(count, MAX_WINDOWS)):
            own = [place for place, text_id in enumerate(encoded.sequence_ids(index)) if text_id is not None]
            first = own[0] + (overlap + 1) // 2 if index else 0
            last = own[-1] + 1 - overlap // 2
            rows.append(
                ModelInputs.of(
                    encoded["input_ids"][index],
                    offsets=encoded["offset_mapping"][index],
                    text=part,
                    is_cut=count > MAX_WINDOWS,
                    window=Window(index, first, last),
                )
            )
        final = rows[-1]
        assert final.window is not None
        rows[-1] = replace(final, window=replace(final.window, last=len(final)))
        return rows

    def _beginning(self, text: str, tokens: int) -> str:
        """The beginning of a text: all of it, or as much as has more than so many tokens."""
        characters = _CHARACTERS_A_TOKEN * (tokens + _MARGIN)
        while len(part := text[:characters]) < len(text):
            if len(self._tokenizer(part, verbose=False)["input_ids"]) >= tokens + _MARGIN:
                break
            characters *= 2
        return part

    def max_characters(self, tokens: int) -> int:
        """Return how many characters `tokens` tokens can stand for at most, each of them as long as the longest one.

        A tokenizer that drops characters, such as repeated spaces, or that makes one unknown token of a long word,
        makes fewer tokens of some longer texts.
        """
        return self.longest_token * tokens

    def is_long(self, text: str | None, token_ids: list[int] | None) -> bool:
        """Tell whether `prompt` takes so long that an event loop should call it on a worker thread."""
        return max(len(text or ""), len(token_ids or ())) > LONG_CHARACTERS

    def _texts(self, group: Sequence[tuple[int, str]], max_length: int, offsets: bool) -> dict[int, ModelInputs]:
        """The rows of texts by index. Of a long text only a part is tokenized: as much as decides its row."""
        rows: dict[int, ModelInputs] = {}
        too_long: list[tuple[int, str]] = []
        characters = _CHARACTERS_A_TOKEN * (max_length + _MARGIN)
        while group:
            parts = [(index, text, text if self._keeps_ends else text[:characters]) for index, text in group]
            whole = self._encode(self._tokenizer, [part for _, _, part in parts], None, return_offsets_mapping=offsets)
            group = []
            for (index, text, part), row in zip(parts, whole, strict=True):
                if len(part) < len(text) and len(row) < max_length + _MARGIN:
                    group.append((index, text))
                elif len(row) > max_length:
                    too_long.append((index, part))
                else:
                    rows[index] = row
            characters *= 2
        if too_long:
            cut = self._truncated([part for _, part in too_long], None, max_length, return_offsets_mapping=offsets)
            if offsets:
                cut = [replace(row, is_cut=True) for row in cut]
            rows.update(zip((index for index, _ in too_long), cut, strict=True))
        return rows

    def _truncated(
        self, texts: list[str], seconds: list[str] | None, max_length: int, **options: Any
    ) -> list[ModelInputs]:
        with self._lock:
            return self._encode(self._truncating, texts, seconds, truncation=True, max_length=max_length, **options)

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, texts: list[str], seconds: list[str] | None, **options: Any
    ) -> list[ModelInputs]:
        encoded: Any = tokenizer(
            texts,
            seconds,
            return_token_type_ids=self._has_token_types,
            return_attention_mask=False,
            verbose=False,
            **options,
        )
        ids = encoded["input_ids"]
        types = encoded["token_type_ids"] if self._has_token_types else [None] * len(ids)
        if not options.get("return_offsets_mapping"):
            return list(map(ModelInputs.of, ids, types))
        return [
            ModelInputs.of(*columns, text=text)
            for *columns, text in zip(ids, types, encoded["offset_mapping"], texts, strict=True)
        ]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    # An encoder has no generation config.
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if end is None:
        end = tokenizer.eos_token_id
    tokens = [] if end is None else [end] if isinstance(end, int) else end
    # Some configurations name tokens that the model does not have, such as -1 for none.
    vocabulary = range(model.config.get_text_config().vocab_size)
    return frozenset(token for token in tokens if token in vocabulary)
