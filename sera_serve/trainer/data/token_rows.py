"""Token rows: tokenizing passages, padding labels, and batches of similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, TypedDict

import torch
from torch import Tensor

from sera_serve.base import FrozenBase
from sera_serve.base.chat import ChatRenderer, ChatTemplate, ChatTemplateFailed, ChatTemplateMissing
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.passages import Passage
from sera_serve.trainer.model import IGNORED
from sera_serve.trainer.tables.faults import InvalidData

# Truncation keeps at least this many tokens of a prompt, and a part of the row for it: one in so many. An answer is
# learned as one to its question, after which a chat has words of the template.
_LEAST_PROMPT = 4
_PROMPT_PART = 4


class TokenRow(TypedDict):
    """One tokenised row.

    Attributes:
        input_ids: Its tokens.
        labels: One entry a token (`IGNORED`: not learned).
        text_bytes: UTF-8 length of the text of the labelled tokens, without special tokens, for bits per byte.
    """

    input_ids: list[int]
    labels: list[int]
    text_bytes: int


class PassageTokenizer:
    """Tokenises passages, and counts truncated and split texts.

    A prompt is tokenised as on the server, by `tokenizer(prompt)`. A completion is tokenised on its own, without
    special tokens, so that training and serving see the same prefix. The end-of-text token closes each completion.
    Chats are rendered as on the server, and have what their template writes alone. White space after the special token
    at the end of a turn of the assistant is not learned, because the server stops at that token; where it does not,
    `notes` says so. `close` ends what renders chats.
    """

    def __init__(self, base: FrozenBase, max_length: int, chat_template: str | None = None) -> None:
        """Prepare.

        Args:
            base: The base model.
            max_length: The longest row in tokens.
            chat_template: The template of chats, in place of the base's own.
        """
        self.tokenizer: Any = base.tokenizer
        self._renderer = ChatRenderer(base.tokenizer)
        self._own_template = chat_template
        self.base_name = base.name
        self.max_length = max_length
        self._least_prompt = max(_LEAST_PROMPT, max_length // _PROMPT_PART)
        self.end: list[int] = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        self._end_tokens = base.preprocessor.end_tokens
        # The token that ends a turn of the assistant and no text of the server.
        self._unended: int | None = None
        self._cut_prompts = self._cut_completions = self._windowed = self._windows = 0

    def notes(self) -> list[str]:
        """Describe truncated and split texts, and turns that the server does not end, for the user."""
        found = []
        if self._cut_prompts:
            found.append(f"{self._cut_prompts} prompts were cut at their beginning to fit {self.max_length} tokens")
        if self._cut_completions:
            found.append(f"{self._cut_completions} completions were cut at their end to fit {self.max_length} tokens")
        if self._windowed:
            found.append(
                f"{self._windowed} long texts were split into {self._windows} chunks of up to {self.max_length} tokens"
            )
        if self._unended is not None:
            token = self._unended
            found.append(
                f"the chat template ends a turn with {self.tokenizer.decode([token])!r}, which ends no answer of this "
                f"base: add {token} to eos_token_id in the base's generation_config.json, or send stop_token_ids "
                f"[{token}] with each chat"
            )
        return found

    def close(self) -> None:
        """End the process that renders chats, if one was started."""
        self._renderer.close()

    def rows_of(self, passage: Passage) -> list[TokenRow]:
        """Tokenise one passage: into one row, or into several chunks of a long plain text."""
        if passage.messages:
            return [self._chat(passage)]
        if passage.prompt is None:
            return self._plain(passage)
        return [self._completion(passage.prompt, passage.completion)]

    def _completion(self, prompt: str, completion: str) -> TokenRow:
        before: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        ids, spans = self._encode(completion)
        room = self.max_length - min(len(before), self._least_prompt) - len(self.end)
        end = self.end
        if len(ids) > room:
            # A truncated completion must not teach the adapter to stop there.
            ids, spans, end = ids[:room], spans[:room], []
            self._cut_completions += 1
        kept = self.max_length - len(ids) - len(end)
        if len(before) > kept:
            start = before[:1] if before[0] == self.tokenizer.bos_token_id else []
            before = start + before[len(before) - kept + len(start) :]
            self._cut_prompts += 1
        labels = [IGNORED] * len(before) + ids + end
        if not before:
            # Without a start token, nothing predicts the first token.
            labels[0], spans = IGNORED, spans[1:]
        return {"input_ids": before + ids + end, "labels": labels, "text_bytes": _bytes(completion, spans)}

    def _plain(self, passage: Passage) -> list[TokenRow]:
        text = passage.completion
        # The tokens that the tokenizer puts before a text, such as a beginning-of-text token, go before each chunk.
        start: list[int] = self.tokenizer("")["input_ids"]
        if start and start[-1:] == self.end:
            start = start[:-1]
        ids, spans = self._encode(text)
        size = self.max_length - len(start)
        tokens = ids + self.end
        rows: list[TokenRow] = []
        for first in range(0, len(tokens), size):
            row = start + tokens[first : first + size]
            # Without a start token, the first token of a row has no predecessor to predict it.
            first_learned = max(len(start), 1)
            if len(row) == first_learned:
                continue
            labels = [IGNORED] * first_learned + row[first_learned:]
            covered = spans[first + first_learned - len(start) : first + size]
            rows.append({"input_ids": row, "labels": labels, "text_bytes": _bytes(text, covered)})
        if len(rows) > 1:
            self._windowed += 1
            self._windows += len(rows)
        return rows

    def _chat(self, passage: Passage) -> TokenRow:
        ids: list[int] = []
        # The characters of each token of the assistant's text; and the tokens of each of its turns.
        places: list[tuple[int, int] | None] = []
        turns: list[range] = []
        done = ""
        for i, message in enumerate(passage.messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(passage, i, prompt=True)
            whole = self._render(passage, i + 1, prompt=False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise InvalidData(
                    f"{passage.row.where}: the chat template rewrites earlier turns; "
                    "split the conversation into one row for each turn of the assistant"
                )
            before, _ = self._encode(prompt[len(done) :])
            text = whole[len(prompt) :]
            answer, spans = self._encode(text)
            learned = self._to_end_of_turn(answer, text, spans)
            if learned and answer[learned - 1] in self._special - self._end_tokens:
                self._unended = answer[learned - 1]
            if not any(token not in self._special for token in answer[:learned]) and message["content"].strip():
                raise InvalidData(
                    f"{passage.row.where}: the chat template writes nothing of the assistant's message; check that it "
                    "writes message.content of every role",
                    param="chat_template",
                )
            turns.append(range(len(ids) + len(before), len(ids) + len(before) + learned))
            ids += before + answer
            places += [None] * len(before)
            places += [
                None if token in self._special or at >= learned else (len(prompt) + start, len(prompt) + end)
                for at, (token, (start, end)) in enumerate(zip(answer, spans, strict=True))
            ]
            done = whole
        labels = [IGNORED] * len(ids)
        for turn in turns:
            labels[turn.start : turn.stop] = ids[turn.start : turn.stop]
        self._cut_chat(ids, labels, places, turns)
        labels[0], places[0] = IGNORED, None
        runs = [list(run) for is_learned, run in groupby(places, key=lambda place: place is not None) if is_learned]
        text_bytes = sum(_bytes(done, [place for place in run if place is not None]) for run in runs)
        return {"input_ids": ids, "labels": labels, "text_bytes": max(text_bytes, 1)}

    def _to_end_of_turn(self, answer: list[int], text: str, spans: list[tuple[int, int]]) -> int:
        """The number of tokens of a turn of the assistant without white space after a special token at its end."""
        last = next((i for i in reversed(range(len(answer))) if answer[i] in self._special), None)
        return len(answer) if last is None or text[spans[last][1] :].strip() else last + 1

    def _cut_chat(
        self, ids: list[int], labels: list[int], places: list[tuple[int, int] | None], turns: list[range]
    ) -> None:
        """Cut a long chat at its beginning, and its last answer at its end where that is too long by itself.

        A part of an answer must not teach the adapter to stop there, so the end of the turn goes too.
        """
        if len(ids) <= self.max_length:
            return
        # As of a prompt, the beginning-of-text token stays: every row that the server reads has it.
        start = int(ids[0] == self.tokenizer.bos_token_id)
        last = turns[-1]
        most = self.max_length - start - min(last.start - start, self._least_prompt)
        end = last.start + min(len(last), most)
        gone = max(end - self.max_length, 0)
        for turn in turns[:-1]:
            # An answer without any of its question, or without its beginning, is not learned.
            if turn.start <= start + gone:
                for place in turn:
                    labels[place], places[place] = IGNORED, None
        for tokens in (ids, labels, places):
            del tokens[end:]
            del tokens[start : start + gone]
        self._cut_completions += len(last) > most
        self._cut_prompts += gone > 0

    def _render(self, passage: Passage, turns: int, *, prompt: bool) -> str:
        messages = passage.messages[:turns]
        try:
            return self._renderer.render(self._template, messages, add_generation_prompt=prompt)
        except ChatTemplateFailed as error:
            raise InvalidData(f"{passage.row.where}: {error.message}", param="chat_template") from error

    @cached_property
    def _special(self) -> frozenset[int]:
        """Tokens that stand for no text, such as the end of a turn."""
        return frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    @cached_property
    def _template(self) -> ChatTemplate:
        try:
            return self._renderer.template(self._own_template, tools=False)
        except ChatTemplateMissing as error:
            raise InvalidConfiguration(
                f"base {self.base_name} has no chat template, so --messages-column cannot be used; give "
                "--chat-template, or --prompt-column and --completion-column, or a base whose tokenizer has a template",
                param="messages_column",
            ) from error
        except ChatTemplateFailed as error:
            raise InvalidConfiguration(error.message, param="chat_template") from error

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]


def _bytes(text: str, spans: list[tuple[int, int]]) -> int:
    """Compute the UTF-8 length of the characters that `spans` cover."""
    return len(text[spans[0][0] : spans[-1][1]].encode()) if spans else 0


def pad_labels(rows: Sequence[TokenRow], length: int) -> Tensor:
    """Pad token labels to int64 (rows, length), with `IGNORED` at padding."""
    labels = torch.full((len(rows), length), IGNORED)
    for i, row in enumerate(rows):
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    return labels


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield row numbers in batches of similar lengths, which need little padding.

    The longest batch comes first: if memory is too small, it runs out at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
