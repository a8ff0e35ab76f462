"""Which tokens carry loss, token by token, and that prompts are tokenised as the server does it."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.passages import GenerateData, Passage
from sera_serve.trainer.data.token_rows import PassageTokenizer
from sera_serve.trainer.model import IGNORED
from sera_serve.trainer.tables.faults import InvalidData, Row
from sera_serve.trainer.tasks import GenerateTask

ROW = Row({}, 1, 1)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


def tokens(base: FrozenBase, passage: Passage, max_length: int = 64) -> tuple[list[str], list[str], int]:
    """Tokens of the one row, the learned ones with the others as "-", and the bytes of the learned text."""
    with closing(PassageTokenizer(base, max_length)) as tokenizer:
        (row,) = tokenizer.rows_of(passage)
    labels: Any = row["labels"]
    names = base.tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert all(label in (IGNORED, token) for label, token in zip(labels, row["input_ids"], strict=True))
    learned = ["-" if label == IGNORED else name for label, name in zip(labels, names, strict=True)]
    return names, learned, row["text_bytes"]


def test_only_the_completion_and_the_end_are_learned(base: FrozenBase) -> None:
    names, learned, text_bytes = tokens(base, Passage(ROW, "bc", "a?"))
    assert names == ["<s>", "a", "?", "b", "c", "</s>"]
    assert learned == ["-", "-", "-", "b", "c", "</s>"]
    assert text_bytes == 2
    assert base.tokenizer("a?")["input_ids"] == base.tokenizer.convert_tokens_to_ids(names[:3])


def test_a_long_prompt_loses_its_beginning(base: FrozenBase) -> None:
    tokeniser = PassageTokenizer(base, 10)
    (row,) = tokeniser.rows_of(Passage(ROW, "xyz", "abcdefgh"))
    assert base.tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["<s>", *"defgh", *"xyz", "</s>"]
    assert row["labels"][:6] == [IGNORED] * 6  # type: ignore[index]
    assert tokeniser.notes() == ["1 prompts were cut at their beginning to fit 10 tokens"]


def test_a_long_completion_is_cut_and_does_not_learn_to_end(base: FrozenBase) -> None:
    names, learned, text_bytes = tokens(base, Passage(ROW, "abcdefghijkl", "zzzzzz"), 10)
    assert len(names) == 10
    assert learned == ["-"] * 5 + list("abcde")
    assert text_bytes == 5


def test_plain_text_is_learned_whole_in_windows(base: FrozenBase) -> None:
    tokeniser = PassageTokenizer(base, 8)
    rows = tokeniser.rows_of(Passage(ROW, "abcdefghijklmnop"))
    names = [base.tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in rows]
    assert names == [["<s>", *"abcdefg"], ["<s>", *"hijklmn"], ["<s>", "o", "p", "</s>"]]
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in rows)
    assert sum(row["text_bytes"] for row in rows) == 16
    assert tokeniser.notes() == ["1 long texts were split into 3 chunks of up to 8 tokens"]


def test_without_a_start_token_the_first_token_is_not_learned(base: FrozenBase) -> None:
    base.tokenizer.backend_tokenizer.post_processor = None
    rows = PassageTokenizer(base, 4).rows_of(Passage(ROW, "abcdef"))
    names = [base.tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in rows]
    assert names == [list("abcd"), ["e", "f", "</s>"]]
    assert [row["labels"][0] for row in rows] == [IGNORED, IGNORED]  # type: ignore[index]
    assert [row["text_bytes"] for row in rows] == [3, 1]
    # As of a plain text, the bytes of an answer to an empty prompt are those of its learned tokens.
    names, learned, text_bytes = tokens(base, Passage(ROW, "abc", ""))
    assert (names, learned, text_bytes) == (["a", "b", "c", "</s>"], ["-", "b", "c", "</s>"], 2)


def test_bits_per_byte_of_answers_without_bytes_are_a_number(base: FrozenBase) -> None:
    base.tokenizer.backend_tokenizer.post_processor = None
    passages = [Passage(ROW, "a", "")] * 2
    data = GenerateData(passages, passages, [], {})
    task = GenerateTask(base, data, max_length=16)
    assert task.evaluate(task.eval_rows)["bits_per_byte"] > 0


def test_every_turn_of_the_assistant_is_learned(base: FrozenBase) -> None:
    base.tokenizer.chat_template = TEMPLATE
    turns = [("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "e"), ("user", "x")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    names, learned, text_bytes = tokens(base, Passage(ROW, messages=messages))
    assert "".join(names) == "user: a\nassistant: bc\nuser: d\nassistant: e\n"
    assert "".join(learned).replace("-", "") == "bc\ne\n"
    assert learned[-2:] == ["e", "\n"]
    assert text_bytes == 5


@pytest.mark.parametrize(("max_length", "text_bytes"), [(64, 6), (12, 6), (9, 3)])
def test_the_ends_of_turns_are_learned_and_have_no_bytes(base: FrozenBase, max_length: int, text_bytes: int) -> None:
    # The template writes the end of a turn as text; it is one token, and no text that a user reads.
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}|{% endfor %}"
    base.tokenizer.chat_template = template
    turns = [("user", "aaaaaaa"), ("assistant", "bc"), ("user", "d"), ("assistant", "ef")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    _, learned, found = tokens(base, Passage(ROW, messages=messages), max_length)
    assert learned[-4:] == ["e", "f", "</s>", "|"]
    assert found == text_bytes == sum(name not in ("-", "</s>") for name in learned)


@pytest.mark.parametrize("begins", [True, False])
def test_a_long_chat_keeps_its_beginning_of_text_as_a_long_prompt_does(base: FrozenBase, begins: bool) -> None:
    base.tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + TEMPLATE
    turns = [("user", "abc"), ("assistant", "de"), ("user", "f"), ("assistant", "g")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    names, learned, text_bytes = tokens(base, Passage(ROW, messages=messages), 16)
    assert len(names) == 16
    assert "".join(names) == ("<s>" if begins else " ") + "f\nassistant: g\n"
    assert "".join(learned).replace("-", "") == "g\n"
    assert text_bytes == 2


@pytest.mark.parametrize(
    ("answer", "names", "learned", "notes"),
    [
        ("bcd", "<s>u: aaaa\nassistant: bcd</s>", "bcd</s>", (0, 0)),
        ("bcdefghij", "<s>a\nassistant: bcdefghij</s>", "bcdefghij</s>", (1, 0)),
        # A quarter of the row stays for what is before the answer.
        ("abcdefghijklmnopqrstuvwxyz", "<s>tant: abcdefghijklmnopq", "abcdefghijklmnopq", (1, 1)),
    ],
)
def test_a_long_answer_of_a_chat_keeps_its_beginning(
    base: FrozenBase, answer: str, names: str, learned: str, notes: tuple[int, int]
) -> None:
    template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}u: {{ m.content }}\n{% else %}"
    base.tokenizer.chat_template = template + (
        "assistant: {{ m.content }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = ({"role": "user", "content": "aaaa"}, {"role": "assistant", "content": answer})
    with closing(PassageTokenizer(base, 24)) as tokenizer:
        (row,) = tokenizer.rows_of(Passage(ROW, messages=messages))
    found = base.tokenizer.convert_ids_to_tokens(row["input_ids"])
    labels: Any = row["labels"]
    # The line break after the end of the turn is not learned: the server stops before it.
    assert "".join(found).removesuffix("\n") == names
    assert "".join(name for name, label in zip(found, labels, strict=True) if label != IGNORED) == learned
    assert row["text_bytes"] == len(learned.removesuffix("</s>"))
    assert len(tokenizer.notes()) == sum(notes)


@pytest.mark.parametrize("ends_an_answer", [False, True])
def test_a_turn_at_whose_end_no_answer_ends_is_told_with_the_remedy(base: FrozenBase, ends_an_answer: bool) -> None:
    """As of a base whose template writes <|im_end|>, and whose generation config has <|endoftext|> alone."""
    name, token = base.tokenizer.bos_token, base.tokenizer.bos_token_id
    base.model.generation_config.eos_token_id = [base.tokenizer.eos_token_id] + [token] * ends_an_answer
    base.tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}" + name)
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"})
    with closing(PassageTokenizer(base, 64)) as tokenizer:
        (row,) = tokenizer.rows_of(Passage(ROW, messages=messages))
    learned = [label for label in row["labels"] if label != IGNORED]
    assert base.tokenizer.convert_ids_to_tokens(learned) == ["b", "c", name]
    told = [] if ends_an_answer else [f"stop_token_ids [{token}]"]
    assert [note[note.index("stop_token") :].removesuffix(" with each chat") for note in tokenizer.notes()] == told


def test_an_earlier_answer_that_lost_its_question_is_not_learned(base: FrozenBase) -> None:
    base.tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    turns = [("user", "a"), ("assistant", "bcdefghij"), ("user", "k"), ("assistant", "lm")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    whole = "<s>user: a\nassistant: bcdefghij\nuser: k\nassistant: lm\n"
    for length in range(24, 48):
        names, learned, _ = tokens(base, Passage(ROW, messages=messages), length)
        kept = "".join(names).removeprefix("<s>")
        assert whole.endswith(kept) and names[0] == "<s>"
        has_question = kept.partition("bcdefghij")[0] != "" and "bcdefghij" in kept
        assert "".join(learned).replace("-", "") == ("bcdefghij\n" if has_question else "") + "lm\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.rle }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_without_the_answers_is_refused(base: FrozenBase, template: str) -> None:
    base.tokenizer.chat_template = template
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    with pytest.raises(InvalidData, match=r"row 1.*writes nothing of the assistant's message"):
        tokens(base, Passage(ROW, messages=messages))


def test_chat_rows_need_a_template(base: FrozenBase) -> None:
    passage = Passage(ROW, messages=({"role": "assistant", "content": "a"},))
    with pytest.raises(InvalidConfiguration, match="has no chat template, so --messages-column cannot be used"):
        tokens(base, passage)


def test_the_loss_is_the_mean_over_learned_tokens(base: FrozenBase) -> None:
    passages = [Passage(ROW, "bcd", "aaaaa"), Passage(ROW, "hello", "x"), Passage(ROW, "z", "long prompt here")]
    task = GenerateTask(base, GenerateData(passages, passages, [], {}), max_length=64)
    batch = task.collate(task.train_rows)
    with torch.no_grad():
        loss = task.model(**batch)["loss"]
        logits = base.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = logits.log_softmax(-1)
    terms = [
        -log_p[i, t - 1, row["input_ids"][t]]
        for i, row in enumerate(task.train_rows)
        for t, label in enumerate(row["labels"])
        if label != IGNORED
    ]
    assert len(terms) == (3 + 1) + (5 + 1) + (1 + 1)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    metrics = task.evaluate(task.eval_rows)
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-5)
    bits = float(torch.stack(terms).sum()) / torch.log(torch.tensor(2.0)).item()
    assert metrics["bits_per_byte"] == pytest.approx(bits / 9, abs=1e-4)
