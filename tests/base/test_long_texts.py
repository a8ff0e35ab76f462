"""Of a long text only a part is tokenized, and the row is the same as that of the whole text."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.factories import random_decoder, random_encoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyzäöüßéñ",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщыьэюя",
    "greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "devanagari": "अआइउएकखगघचजटडतदनपबमयरलवशसहािीुे",
    "chinese": "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会",
    "kana": "あいうえおかきくけこさしすせそたちつてとなにぬねの",
    "thai": "กขคงจชซญดตถทนบปผพมยรลวสหอะาิีุู",
    "digits": "0123456789",
    "emoji": "😀😂🏴☠️👨‍👩‍👧🎉",
}
WITHOUT_SPACES = {"chinese", "kana", "thai"}


def random_text(rng: random.Random, characters: int) -> str:
    """Words of one script and some of another, punctuation, odd white space, accents, and now and then a long word."""
    script = rng.choice(sorted(ALPHABETS))
    pieces: list[str] = []
    length = 0
    while length < characters:
        letters = ALPHABETS[script if rng.random() < 0.8 else rng.choice(sorted(ALPHABETS))]
        word = "".join(rng.choices(letters, k=rng.randint(1, 9) if rng.random() < 0.98 else rng.randint(80, 180)))
        word = rng.choice([word, word, word.title(), word + "\u0301"])
        space = "" if script in WITHOUT_SPACES else rng.choice([" "] * 9 + ["  ", "\n", "\t", " \u3000"])
        pieces.append(word + rng.choice(["", "", "", "", ",", ". ", "!?", "—", "。"]) + space)
        length += len(pieces[-1])
    return "".join(pieces)


def wordpiece() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)


def byte_level() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def unigram() -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=500, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
    )


@functools.cache
def trained(make: Callable[[], tuple[Tokenizer, Any]]) -> Tokenizer:
    """A tokenizer that was trained on random texts, and puts [CLS] and [SEP] around a text."""
    rng = random.Random(1)
    tokenizer, trainer = make()
    tokenizer.train_from_iterator((random_text(rng, 300) for _ in range(40)), trainer)
    first, last = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", first), ("[SEP]", last)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("make", "truncation_side"), [(wordpiece, "right"), (byte_level, "right"), (unigram, "right"), (byte_level, "left")]
)
def test_a_part_gives_the_row_of_the_whole_text(
    make: Callable[[], tuple[Tokenizer, Any]], truncation_side: str
) -> None:
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "truncation_side": truncation_side}
    base = random_encoder(tokenizer=PreTrainedTokenizerFast(tokenizer_object=trained(make), **names))
    rng = random.Random(2)
    texts = [random_text(rng, rng.choice([5, 300, 3000])) for _ in range(30)]
    texts += [" " * 5000 + texts[2], "a" * 5000, "   \n" * 1500, "e" + "\u0301" * 4000]
    whole: Any = PreTrainedTokenizerFast(tokenizer_object=trained(make), **names)
    for max_length in (8, 129):
        expected = whole(texts, truncation=True, max_length=max_length)["input_ids"]
        assert [list(row.input_ids) for row in base.preprocessor.rows(texts, max_length)] == expected
        assert max(map(len, expected)) == max_length


def test_a_long_text_costs_no_more_than_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_decoder()
    seen: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: PreTrainedTokenizerFast, texts: list[str], *others: Any, **options: Any) -> Any:
        seen.append(sum(map(len, texts)))
        return call(self, texts, *others, **options)

    preprocessor = base.preprocessor
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    rows = preprocessor.rows(["0123456789" * 100_000, "short", "7" * 1_000_000], 64)
    assert [len(row) for row in rows] == [64, 5, 64]
    assert sum(seen) < 5000
    # Many short texts of one call do not go to the tokenizer at once either.
    seen.clear()
    rows = preprocessor.rows(["0123456789" * 100] * 150, 64)
    assert len(rows) == 150
    assert max(seen) <= 1 << 16 and sum(seen) <= 300_000


def test_the_longest_token_bounds_the_characters_of_a_prompt() -> None:
    # The longest token of the byte tokenizer is "<bos>".
    preprocessor = random_decoder().preprocessor
    assert preprocessor.longest_token == 5
    assert preprocessor.max_characters(256) == 1280
