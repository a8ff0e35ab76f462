"""Rows that become chats by a template of the adapter's own, and the bundle that keeps the template."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from trainer_samples import settings_for, write_jsonl

from adapters_store import MAX_CHAT_TEMPLATE_BYTES, AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.passages import Passage, load_generate_data
from sera_serve.trainer.data.token_rows import PassageTokenizer
from sera_serve.trainer.model import IGNORED
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.tables.faults import InvalidData, Row

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}q{{ m.content }}"
    "{% else %}a{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
ROWS = [{"prompt": f"x{number}", "completion": "yes"} for number in range(8)]


@pytest.fixture
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base))


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return {"task": "generate", "chat_template": tmp_path / "chat.jinja", "epochs": 1}


def test_only_the_answer_and_what_the_template_writes_after_it_are_learned(base: FrozenBase) -> None:
    # The base's own template is not used.
    base.tokenizer.chat_template = "{{ raise_exception('the base') }}"
    with closing(PassageTokenizer(base, 64, TEMPLATE)) as tokenizer:
        (row,) = tokenizer.rows_of(Passage(Row({}, 1, 1), "bc", "d").as_chat())
    names = base.tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert names == ["<s>", "q", "d", "a", "b", "c", "</s>"]
    labels = row["labels"]
    assert isinstance(labels, list)
    assert labels == [IGNORED] * 4 + row["input_ids"][4:]


def test_the_bundle_keeps_the_template(base: FrozenBase, tmp_path: Path, options: dict[str, Any]) -> None:
    settings = settings_for(Path("tiny"), tmp_path, write_jsonl(tmp_path / "rows.jsonl", ROWS), **options)
    result = train_adapter(settings, base=base)
    store = AdapterStore(settings.store)
    config = store.config(result.digest)
    assert (config.format_version, config.chat_template) == (2, TEMPLATE)
    assert set(config.training["data_sha256"]) == {"train", "chat_template"}
    assert "chat_template" not in config.training["settings"], "a path says nothing about another machine"
    assert store.resolve("acme/tiny").has_chat_template
    # Another template is another run, though the path is the same.
    settings.chat_template.write_text(TEMPLATE.replace("q", "z"))  # type: ignore[union-attr]
    assert train_adapter(settings, base=base).version == 2


def test_messages_are_rendered_by_the_same_template(tmp_path: Path, options: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"m": turns}] * 4)
    data = load_generate_data(settings_for(Path("tiny"), tmp_path, rows, messages_column="m", **options))
    assert data.chat_template == TEMPLATE
    assert data.train[0].messages == tuple(turns)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "1 to 65536 bytes"),
        ("x" * (MAX_CHAT_TEMPLATE_BYTES + 1), "1 to 65536 bytes"),
        (b"\xff", "not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_template_that_cannot_be_read_is_refused(
    template: str | bytes | None, message: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    path: Path = options["chat_template"]
    path.unlink() if template is None else path.write_bytes(
        template.encode() if isinstance(template, str) else template
    )
    settings = settings_for(Path("tiny"), tmp_path, write_jsonl(tmp_path / "rows.jsonl", ROWS), **options)
    with pytest.raises(InvalidData, match=message) as refusal:
        load_generate_data(settings)
    assert refusal.value.param == "chat_template"


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% if", InvalidConfiguration, "cannot be rendered"),
        ("{{ raise_exception('never') }}", InvalidData, r"row 1 \(line 1\).*never"),
        ("{% if add_generation_prompt %}p{% endif %}{{ messages }}", InvalidData, "rewrites earlier turns"),
    ],
)
def test_a_template_that_does_not_fit_the_rows_is_refused(
    template: str, error: type[Exception], message: str, base: FrozenBase, tmp_path: Path, options: dict[str, Any]
) -> None:
    options["chat_template"].write_text(template)
    settings = settings_for(Path("tiny"), tmp_path, write_jsonl(tmp_path / "rows.jsonl", ROWS), **options)
    with pytest.raises(error, match=message):
        train_adapter(settings, base=base)
