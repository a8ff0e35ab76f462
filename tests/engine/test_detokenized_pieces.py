"""Text that comes in pieces: the pieces add up, in five scripts, with stop strings cut at any place."""

from __future__ import annotations

import asyncio
import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerateParams
from sera_serve.engine.stream import Detokenizer
from support.engine import Start, generate, settled

# One token is a byte: characters of these take one to four tokens.
SCRIPTS = {
    "latin": "abc deéÿñ .",
    "cyrillic": "жщы ъэю. Ё",
    "arabic": "سلام عليكم،",
    "chinese": "天地玄黃 宇宙洪荒。",
    "emoji": "😀👩‍🚀 🏴‍☠️é",
}


def random_text(dice: random.Random, letters: str, most: int) -> str:
    return "".join(dice.choice(letters) for _ in range(dice.randint(1, most)))


def pieces(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    out: list[str] = []
    for token in tokens:
        out.append(detokenizer.push(token))
        if detokenizer.stopped:
            return out
    return [*out, detokenizer.flush()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_pieces_add_up_and_stop_strings_are_found(script: str, decoder: FrozenBase) -> None:
    dice = random.Random(script)
    tokenizer = decoder.tokenizer
    found = 0
    for _ in range(200):
        prompt = random_text(dice, SCRIPTS[script], 20)
        text = random_text(dice, SCRIPTS[script], 40)
        tokens = tokenizer(text)["input_ids"]
        whole = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"], [])
        assert "".join(pieces(whole, tokens)) == whole.text == text
        # Some from the text, and some that it has only a part of.
        first, second = sorted(dice.sample(range(len(text) + 1), 2))
        stop = [text[first:second], text[second:] + "never", random_text(dice, SCRIPTS[script], 3)]
        cut = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"], stop)
        assert "".join(pieces(cut, tokens)) == cut.text
        # The first to be complete wins, and of those the one that begins first.
        complete = min(text.find(word) + len(word) for word in stop if word in text)
        seen = text[:complete]
        assert cut.text == text[: min(seen.find(word) for word in stop if word in seen)]
        assert cut.found in stop
        found += 1
    assert found == 200


def test_tokens_that_are_no_characters_add_up_too(decoder: FrozenBase) -> None:
    dice = random.Random(1)
    for _ in range(200):
        tokens = [dice.randrange(256) for _ in range(dice.randint(1, 40))]
        detokenizer = Detokenizer(decoder.tokenizer, [1, 2, 3], [])
        assert "".join(pieces(detokenizer, tokens)) == detokenizer.text


@pytest.mark.parametrize("end", ["\ufffd", "é", "天"])
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_prompt_that_ends_within_a_character_does_not_come_out_again(end: str, cut: int, decoder: FrozenBase) -> None:
    tokenizer = decoder.tokenizer
    prompt = tokenizer("a SECRET prompt " + end)["input_ids"]
    detokenizer = Detokenizer(tokenizer, prompt[: len(prompt) - cut], ["SECRET"])
    assert "".join(pieces(detokenizer, tokenizer(" and more")["input_ids"])) == detokenizer.text
    # Bytes of the prompt's last character may stand before it.
    assert detokenizer.text.lstrip("\ufffd") == " and more" and not detokenizer.stopped


def test_tokens_without_text_do_not_gather(decoder: FrozenBase) -> None:
    tokenizer = decoder.tokenizer
    for token, each in ((tokenizer("é")["input_ids"][1], "\ufffd"), (tokenizer.eos_token_id, "")):
        detokenizer = Detokenizer(tokenizer, tokenizer("a prompt")["input_ids"], [])
        out = pieces(detokenizer, [token] * 100)
        assert "".join(out[:16]) == each * 16
        assert max(map(len, out)) <= 16 and "".join(out) == each * 96


@pytest.mark.parametrize("skipped", [1, 14, 15, 16, 40])
def test_tokens_without_text_break_no_character(skipped: int, decoder: FrozenBase) -> None:
    tokenizer = decoder.tokenizer
    first, *rest = tokenizer("é€😀")["input_ids"]
    detokenizer = Detokenizer(tokenizer, tokenizer("a prompt")["input_ids"], ["€"])
    out = pieces(detokenizer, [*[tokenizer.eos_token_id] * skipped, first, tokenizer.eos_token_id, *rest])
    assert "".join(out) == "é" and detokenizer.found == "€"


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of Llama 2's: words, and bytes for the rest."""
    vocabulary = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁a"]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["▁a", "▁the"], " a the"),
        # A byte that spoils the text of those before it, which is out already.
        (["<0x0A>", "<0xF0>", "▁the", "▁a"], "\n\ufffd the a"),
        # Tokens without text between two words.
        (["▁a", *["</s>"] * 40, "▁the"], " a the"),
        (["▁a", *["<0xF0>"] * 16, "▁the"], " a" + "\ufffd" * 16 + " the"),
    ],
)
def test_bytes_among_words_never_break_the_text(words: list[str], text: str) -> None:
    tokenizer = byte_fallback()
    detokenizer = Detokenizer(tokenizer, tokenizer.convert_tokens_to_ids(["▁the"]), [])
    assert "".join(pieces(detokenizer, tokenizer.convert_tokens_to_ids(words))) == text


def test_streams_add_up(decoder: FrozenBase, store: AdapterStore, start_engine: Start) -> None:
    engine = start_engine(decoder, store)
    dice = random.Random(0)
    prompts = [random_text(dice, letters, 20) for letters in SCRIPTS.values() for _ in range(8)]

    async def check(prompt: str, stop: list[str]) -> str:
        stream = await generate(engine, GenerateParams(prompt=prompt, max_new_tokens=12, stop=stop))
        deltas = [delta async for delta in stream]
        assert stream.result is not None
        assert "".join(delta.text for delta in deltas) == stream.result.text
        assert [token for delta in deltas for token in delta.token_ids] == stream.result.token_ids
        return stream.result.text

    async def main() -> None:
        texts = await asyncio.gather(*(check(prompt, []) for prompt in prompts))
        for prompt, text in zip(prompts, texts, strict=True):
            if len(text) > 2:
                at = dice.randrange(1, len(text) - 1)
                word = text[at : at + dice.randint(1, 3)]
                assert await check(prompt, [word]) == text[: text.find(word)]
        await settled(engine)

    asyncio.run(main())
