"""What the preprocessor makes of prompts, texts and sentence pairs, and what it refuses."""

from __future__ import annotations

import gc
import logging
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sera_serve.base import FrozenBase, ModelInputs, freeze_base, load_base
from sera_serve.errors import InvalidRequest
from support.factories import byte_tokenizer, random_decoder, random_encoder


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: the first text's segment is 0, that of the second 1, each text closed by <eos>."""
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[("<bos>", 256), ("<eos>", 257)],
    )
    return tokenizer


@pytest.fixture(scope="module")
def bert() -> FrozenBase:
    return random_encoder(tokenizer=pair_tokenizer())


def refusal(call: Any, *arguments: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        call(*arguments)
    return raised.value


def test_a_prompt_is_tokenized_and_tokens_are_taken_as_they_are() -> None:
    base = random_decoder()
    assert base.preprocessor.prompt("abc", None) == base.tokenizer("abc")["input_ids"]
    assert base.preprocessor.prompt(None, [0, 258]) == [0, 258]


@pytest.mark.parametrize(
    ("text", "token_ids", "param", "said"),
    [
        ("", None, "prompt", "prompt has no tokens"),
        (None, [], "token_ids", "token_ids has no tokens"),
        (None, [5, 259], "token_ids", "0 to 258"),
        (None, [-1], "token_ids", "0 to 258"),
        (None, None, "prompt", "send prompt or token_ids"),
        ("abc", [1], "token_ids", "send one of them"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(
    text: str | None, token_ids: list[int] | None, param: str, said: str
) -> None:
    error = refusal(random_decoder().preprocessor.prompt, text, token_ids)
    assert error.param == param
    assert said in error.message


def test_only_long_inputs_need_a_thread() -> None:
    preprocessor = random_decoder().preprocessor
    assert not preprocessor.is_long("a" * 4000, None)
    assert preprocessor.is_long("a" * 4001, None)
    assert preprocessor.is_long(None, [1] * 4001)


def test_the_embedded_base_ends_an_answer_at_the_end_of_a_turn() -> None:
    base = load_base("embedded")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert base.tokenizer.apply_chat_template(chat, tokenize=False).endswith("b<|end|>\n")
    ends = base.tokenizer.convert_tokens_to_ids(["<|end|>", "<|eos|>"])
    assert base.preprocessor.end_tokens == set(ends)


def test_end_tokens_come_from_the_generation_config_or_else_the_tokenizer() -> None:
    base = random_decoder()
    base.model.generation_config.eos_token_id = [7, 9]
    assert base.preprocessor.end_tokens == {7, 9}
    beyond = random_decoder()
    beyond.model.generation_config.eos_token_id = [7, -1, beyond.model.config.vocab_size]
    assert beyond.preprocessor.end_tokens == {7}
    other = random_decoder()
    other.model.generation_config.eos_token_id = None
    assert other.preprocessor.end_tokens == {other.tokenizer.eos_token_id}
    # An encoder has no generation config.
    encoder = random_encoder()
    assert encoder.preprocessor.end_tokens == {encoder.tokenizer.eos_token_id}


def test_pairs_and_texts_of_one_call_keep_their_order(bert: FrozenBase) -> None:
    rows = bert.preprocessor.rows([("ab", "c"), "d", ("e", "")], 64)
    a, b, c, d, e = (bert.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abcde")
    assert rows == [
        ModelInputs.of([256, a, b, 257, c, 257], [0, 0, 0, 0, 1, 1]),
        ModelInputs.of([256, d, 257]),
        ModelInputs.of([256, e, 257, 257], [0, 0, 0, 1]),
    ]
    assert [len(row) for row in rows] == [6, 3, 4]


def test_rows_are_truncated_and_keep_closing_tokens(bert: FrozenBase) -> None:
    text, pair = bert.preprocessor.rows(["abcdefgh", ("abcdefgh", "xy")], 7)
    assert len(text) == len(pair) == 7
    assert text.input_ids[-1] == pair.input_ids[-1] == 257
    assert pair.token_type_ids is not None and sum(pair.token_type_ids) == 3


def test_an_input_without_tokens_is_refused_by_its_index() -> None:
    error = refusal(random_decoder().preprocessor.rows, ["a", "", "b"], 64)
    assert error.param == "inputs[1]"


def test_a_decoder_gets_no_token_types() -> None:
    # GPT-2 accepts them, and adds the embeddings of the tokens with these numbers.
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=256, vocab_size=259)
    base = freeze_base(GPT2LMHeadModel(config), pair_tokenizer(), "gpt2")
    (row,) = base.preprocessor.rows([("ab", "c")], 64)
    assert row == ModelInputs.of(base.tokenizer("ab", "c")["input_ids"])


def test_token_types_reach_the_model_whatever_else_is_in_the_batch(bert: FrozenBase) -> None:
    rows = bert.preprocessor.rows([("ab", "c"), "defghij"], 64)
    batch = bert.pad(rows)
    states = bert.hidden_states(**batch)
    for index, inputs in enumerate([("ab", "c"), ("defghij",)]):
        alone = bert.model(**bert.tokenizer(*inputs, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(states[index, : len(rows[index])], alone, rtol=1e-4, atol=1e-5)
    without = bert.hidden_states(batch["input_ids"], batch["attention_mask"])
    assert not torch.allclose(states[0], without[0], atol=1e-2)


def test_a_long_text_is_cut_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = pair_tokenizer()
    tokenizer.model_max_length = 16
    base = random_encoder(tokenizer=tokenizer)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert [len(row) for row in base.preprocessor.rows(["x" * 60, ("x" * 60, "y" * 5000)], 16)] == [16, 16]
        assert len(base.preprocessor.prompt("x" * 60, None)) > 16
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_threads_that_truncate_differently_do_not_disturb_each_other() -> None:
    base = random_decoder()
    text = "abcdefghij" * 20

    def work(number: int) -> int:
        if number % 3 == 0:
            return len(base.preprocessor.prompt(text, None)) - 200
        limit = 5 + number % 7
        (row,) = base.preprocessor.rows([text], limit)
        return len(row) - limit

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(work, range(600))) == {0}


def test_a_text_without_tokens_has_its_number_in_the_request() -> None:
    rows = random_decoder().preprocessor.rows
    assert refusal(lambda: rows(["a", ""], 8, "input")).param == "input[1]"
    error = refusal(lambda: rows(["a", ""], 8, "input", numbers=[0, 5]))
    assert (error.param, error.message) == ("input[5]", "input 5 has no tokens; send some text")


@pytest.mark.parametrize("offsets", [False, True])
def test_a_token_that_waits_takes_few_bytes(offsets: bool) -> None:
    preprocessor = random_encoder().preprocessor
    texts = ["abcdefgh" * 30] * 50
    preprocessor.rows(texts[:1], 256, offsets=offsets)
    tracemalloc.start()
    try:
        rows = preprocessor.rows(texts, 256, offsets=offsets)
        # Python keeps tuples that are free for the next ones.
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tokens = sum(map(len, rows))
    # 4 of the token and 8 of its offsets, and some hundred of the row. Lists had 8 and 120.
    assert tokens == 12_000 and taken < tokens * (16 if offsets else 6)
    if offsets:
        assert rows[0].offsets is not None and rows[0].offsets[:3] == [(0, 1), (1, 2), (2, 3)]


def test_a_batch_is_padded_with_what_the_mask_hides() -> None:
    base = random_encoder()
    padded = base.pad([ModelInputs.of([5, 6, 7]), ModelInputs.of([8], [1])])
    padding = base.tokenizer.pad_token_id
    assert {name: column.tolist() for name, column in padded.items()} == {
        "input_ids": [[5, 6, 7], [8, padding, padding]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "token_type_ids": [[0, 0, 0], [1, 0, 0]],
    }
    assert "token_type_ids" not in base.pad([ModelInputs.of([5, 6], [0, 0])])
