"""Where the tokens of an echoed prompt lie in its text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sera_serve.engine import TokenLogprobs
from sera_serve.server.openai.answers import CompletionLogprobLists
from sera_serve.server.openai.token_texts import TokenTexts
from support.factories import byte_tokenizer


@pytest.fixture(scope="module")
def sentencepiece(shared_data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(shared_data / "weights" / "stories260K"))


def offsets(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], list[str]]:
    lists = CompletionLogprobLists(TokenTexts(tokenizer))
    lists.add([TokenLogprobs(token, None) for token in tokenizer(prompt)["input_ids"]], prompt)
    found = json.loads("".join(lists.take()))
    return found["text_offset"], found["tokens"]


@pytest.mark.parametrize("prompt", ["He was a boy", " He was a boy", "  He was", "  ", "Grüße"])
def test_the_space_that_sentencepiece_adds_is_not_counted(sentencepiece: PreTrainedTokenizerBase, prompt: str) -> None:
    places, names = offsets(sentencepiece, prompt)
    text = " " + prompt
    # The first token is <s>, which is not in the text.
    assert places[:2] == [0, 0]
    for place, name in list(zip(places, names, strict=True))[2:]:
        assert name.startswith("bytes:") or text[place + 1 :].startswith(name)


def test_a_space_of_the_prompt_is_counted() -> None:
    places, _ = offsets(byte_tokenizer(), " ab")
    assert places[-3:] == [0, 1, 2]


def test_long_lists_are_whole_and_written_in_few_pieces() -> None:
    """A piece for each token would keep the event loop."""
    lists = CompletionLogprobLists(TokenTexts(byte_tokenizer()))
    prompt = "".join(chr(97 + number % 26) for number in range(5000))
    lists.add([TokenLogprobs(token, -number / 8) for number, token in enumerate(byte_tokenizer()(prompt)["input_ids"])])
    pieces = list(lists.take())
    found = json.loads("".join(pieces))
    assert found["token_logprobs"][-5000:] == [-number / 8 for number in range(len(found["tokens"]))][-5000:]
    assert "".join(found["tokens"][-5000:]) == prompt
    assert len(pieces) < 100
    assert json.loads("".join(lists.take()))["tokens"] == []
