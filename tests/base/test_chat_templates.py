"""Chat templates: what transformers gives, and bounds of memory and time for templates of strangers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from sera_serve.base.chat import ChatRenderer, ChatTemplateFailed, ChatTemplateMissing
from sera_serve.errors import EngineUnavailable
from support.factories import byte_tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
# Written in the forms of the families that they are named after. "marked" has transformers' own blocks.
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
CHATML = TEMPLATES["chatml"]

TALK = [
    {"role": "user", "content": "  Grüße <b>& 'you'</b>\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello 世界!"},
    {"role": "user", "content": "And now?"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
ARGUMENTS = {"city": "Zürich", "days": [1, 2.5, None, True], "deep": {"b": 1, "a": "<x>"}}
CALLED = [
    TALK[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
        ],
    },
    {"role": "tool", "content": '{"t": 21}', "tool_call_id": "abcdef123", "name": "weather"},
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": 'Get "it" at <place>',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "time")
]
CASES = {
    "talk": (TALK, None),
    "system": (SYSTEM + TALK, None),
    "tools": (TALK, TOOLS),
    "system and tools": (SYSTEM + TALK, TOOLS),
    "called": (CALLED, TOOLS),
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatRenderer]:
    renderer = ChatRenderer(byte_tokenizer())
    yield renderer
    renderer.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_what_transformers_gives(renderer: ChatRenderer, name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    compared = 0
    for messages, tools in CASES.values():
        for begin in (True, False):
            for variables in ({}, {"enable_thinking": False, "date_string": "1 May"}):
                try:
                    expected = tokenizer.apply_chat_template(
                        messages, tools=tools, tokenize=False, add_generation_prompt=begin, **variables
                    )
                except TemplateError as error:
                    with pytest.raises(ChatTemplateFailed, match=str(error)[:40]):
                        renderer.render(renderer.template(TEMPLATES[name], False), messages, tools, begin)
                    continue
                template = renderer.template(TEMPLATES[name], tools is not None)
                assert renderer.render(template, messages, tools, begin, variables=variables) == expected
                compared += 1
    assert compared >= 8


def test_what_a_template_can_do_is_read_from_it(renderer: ChatRenderer) -> None:
    found = {name: renderer.template(source, False) for name, source in TEMPLATES.items()}
    assert {name for name, template in found.items() if template.uses_tools} == {"llama3", "mistral", "qwen"}
    assert {name for name, template in found.items() if template.call_format == "hermes"} == {"qwen"}


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen"])
@pytest.mark.parametrize("end", ["", " ", "\n\n"])
def test_the_last_message_is_continued(renderer: ChatRenderer, name: str, end: str) -> None:
    messages = [TALK[0], {"role": "assistant", "content": "Hello, and" + end}]
    template = renderer.template(TEMPLATES[name], False)
    text = renderer.render(template, messages, add_generation_prompt=False, continue_final_message=True)
    assert text.rstrip().endswith("Hello, and")
    assert name == "llama3" or text.endswith("Hello, and" + end)
    without = renderer.template("{{ messages[0].content }}", False)
    with pytest.raises(ChatTemplateFailed, match="continue_final_message"):
        renderer.render(without, messages, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize("content", ["<", ">", "|", "e", "m", "I", "<|im", "assistant", "a {{ b }}", "é"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen"])
def test_a_last_message_that_the_template_writes_elsewhere_too_is_continued(
    renderer: ChatRenderer, name: str, content: str
) -> None:
    template = renderer.template(TEMPLATES[name], False)

    def continued(content: str) -> str:
        messages = [TALK[0], {"role": "assistant", "content": content}]
        return renderer.render(template, messages, add_generation_prompt=False, continue_final_message=True)

    assert continued(content) == continued("no such words").removesuffix("no such words") + content


HOSTILE = {
    "printed tree": "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
    "{{ n.s|string|length }}",
    "tree as JSON": "{% set n = namespace(s=[1]) %}{% for i in range(40) %}{% set n.s = [n.s, n.s] %}{% endfor %}"
    "{{ n.s|tojson|length }}",
    "loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "doubled text": "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "wide format": "{{ '%999999999d'|format(1)|length }}",
    "deep expression": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "python's insides": "{{ messages.__class__.__mro__ }}{{ raise_exception.__globals__['os'].system('id') }}",
    "a wrong template": "{% if %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_little_and_harms_no_other(renderer: ChatRenderer, name: str) -> None:
    started = time.monotonic()
    with pytest.raises(ChatTemplateFailed):
        renderer.render(renderer.template(HOSTILE[name], False), TALK)
    assert time.monotonic() - started < 20
    assert renderer.render(renderer.template(CHATML, False), TALK).count("<|im_start|>") == 4


def test_a_template_that_ended_its_process_is_not_run_again_at_once(renderer: ChatRenderer) -> None:
    source = HOSTILE["printed tree"] + "{# once #}"
    with pytest.raises(ChatTemplateFailed, match="memory or time"):
        renderer.render(renderer.template(source, False), TALK)
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(ChatTemplateFailed, match="memory or time"):
            renderer.render(renderer.template(source, False), TALK)
    assert time.monotonic() - started < 0.2


def test_a_template_that_ran_out_of_fuel_is_not_run_again_at_once() -> None:
    renderer, source = ChatRenderer(byte_tokenizer()), HOSTILE["loops"]
    with pytest.raises(ChatTemplateFailed, match="more steps than a template may"):
        renderer.render(renderer.template(source, False), TALK)
    [worker] = renderer._idle
    # Whatever is asked of this worker from now on fails.
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(ChatTemplateFailed, match="more steps than a template may"):
        renderer.render(renderer.template(source, False), TALK)
    assert renderer._idle == [worker]
    renderer.close()


def test_costly_messages_of_one_caller_bar_no_other(renderer: ChatRenderer) -> None:
    source = "{% if messages[0].content == 'costly' %}" + HOSTILE["printed tree"] + "{% endif %}fine"
    costly = [{"role": "user", "content": "costly"}]
    for _ in range(2):
        with pytest.raises(ChatTemplateFailed, match="memory or time"):
            renderer.render(renderer.template(source, False), costly)
        assert renderer.render(renderer.template(source, False), TALK) == "fine"


def test_a_process_that_somebody_else_ended_is_replaced(renderer: ChatRenderer) -> None:
    template = renderer.template(CHATML, False)
    renderer.render(template, TALK)
    for worker in renderer._idle:
        worker._process.send_signal(signal.SIGTERM)
    assert renderer.render(template, TALK)
    for worker in renderer._idle:
        worker._process.kill()
        worker._process.wait()
    with pytest.raises(EngineUnavailable, match="again"):
        renderer.render(template, TALK)
    assert renderer.render(template, TALK)


def test_long_conversations_are_rendered(renderer: ChatRenderer) -> None:
    messages = [{"role": ("user", "assistant")[turn % 2], "content": "x" * 1000} for turn in range(1001)]
    for source in TEMPLATES.values():
        assert len(renderer.render(renderer.template(source, False), messages)) > 1_000_000


def test_several_threads_render_at_once(renderer: ChatRenderer) -> None:
    wrong: list[str] = []

    def render(name: str) -> None:
        for turn in range(20):
            text = renderer.render(renderer.template(CHATML, False), [{"role": "user", "content": f"{name} {turn}"}])
            if f"{name} {turn}<" not in text:
                wrong.append(text)

    threads = [threading.Thread(target=render, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_template_and_too_long_a_template_are_refused(renderer: ChatRenderer) -> None:
    with pytest.raises(ChatTemplateMissing):
        renderer.template(None, False)
    with pytest.raises(ChatTemplateFailed, match="limit"):
        renderer.template("x" * 70_000, False)


def test_a_base_may_have_a_template_of_its_own_for_tools() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools|length }} tools"}
    renderer = ChatRenderer(tokenizer)
    assert renderer.render(renderer.template(None, False), TALK) == "plain"
    assert renderer.render(renderer.template(None, True), TALK, TOOLS) == "2 tools"
    renderer.close()
    with pytest.raises(EngineUnavailable):
        renderer.render(renderer.template(None, False), TALK)
