"""Chat templates: from messages to a prompt's text, with templates that any tenant may have written.

A template is a program. The language is Jinja as MiniJinja runs it, which gives a template no access to Python. It
counts a template's instructions, but not everything that a template can cost: `[x, x]` forty times nested is small in
memory and has 2^40 leaves when it is printed. So templates are rendered in a process of its own, with limits of memory
and processor time. When a render exceeds a limit, that process ends, and nothing else does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from sera_serve.errors import EngineUnavailable, InvalidRequest

MAX_TEMPLATE_CHARACTERS = 64 << 10
_WORKER = Path(__file__).with_name("template_worker.py")
# The worker has a second of the processor. A machine that is busy gives it more time on the clock.
_WALL_S = 20.0
# An idle worker ends by itself when its input is closed. A busy one is then killed.
_LAST_WORDS_S = 0.5
# A template that exceeded a limit with messages is not rendered again with the same messages for so long. The cost may
# lie in the messages of one caller, so that other callers of the same template are not refused.
_BARRED_S = 60.0
# Written after the last message's mark. A template that trims contents leaves it out.
_TRIMMED = "\n \n"
_MAX_BARRED = 1024
_MAX_KNOWN = 256
# transformers' own block, which marks what an assistant wrote. It adds nothing to the text.
_GENERATION = re.compile(r"{%(-?)\s*(end)?generation\s*(-?)%}")

CallFormat = Literal["hermes", "json"]
"""How a model writes tool calls: `<tool_call>{json}</tool_call>` in its text, or JSON alone."""


class ChatTemplateMissing(InvalidRequest):
    """Neither the adapter nor the base has a chat template."""

    code = "chat_template_missing"


class ChatTemplateFailed(InvalidRequest):
    """The chat template refuses the messages, is wrong, or costs too much."""

    code = "chat_template_failed"


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what it can do.

    Attributes:
        source: The template.
        uses_tools: Whether the template reads `tools`.
        call_format: How its model writes tool calls.
    """

    source: str
    uses_tools: bool
    call_format: CallFormat


class ChatRenderer:
    """Renders chat templates for one base. Every method may be called by several threads, and blocks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start no process yet."""
        self._tokenizer = tokenizer
        self._special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._closed = False
        # What a template can do never changes. An error is not kept.
        self._described = lru_cache(_MAX_KNOWN)(self._describe)
        self._barred: OrderedDict[bytes, tuple[float, str]] = OrderedDict()

    def template(self, own: str | None, tools: bool) -> ChatTemplate:
        """Return the template of a request.

        Args:
            own: The adapter's own template, or None. The base's template is then used.
            tools: Whether the request has tools. Some bases have a template of its own for them.

        Raises:
            ChatTemplateMissing: There is none.
            ChatTemplateFailed: The template cannot be parsed, or is too long.
        """
        source = self._base_template(tools) if own is None else own
        if source is None:
            raise ChatTemplateMissing(
                "neither the adapter nor the base has a chat template; send a prompt instead of messages, as to "
                "/v1/completions, or publish the adapter with a chat_template",
                param="model",
            )
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ChatTemplateFailed(
                f"the chat template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARACTERS}", param="model"
            )
        return self._described(source)

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt's text. It has the base's special tokens that the template writes, and no other.

        Args:
            template: From `template`.
            messages: `role`, `content`, and what else the template reads.
            tools: What the model may call.
            add_generation_prompt: Begin the assistant's answer.
            continue_final_message: End within the last message, so that the answer continues it.
            variables: Further variables of the template. They do not replace those above.

        Raises:
            ChatTemplateFailed: The template refuses the messages, fails, or costs too much.
            EngineUnavailable: `close` was called.
        """
        content = str(messages[-1].get("content") or "") if messages else ""
        mark = _mark_of(content)
        if continue_final_message:
            messages = [*messages[:-1], {**messages[-1], "content": content + mark + _TRIMMED}]
        context = {
            **(variables or {}),
            **self._special,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = cast(str, self._ask(template.source, context)["text"])
        return _cut_at(mark, text, content) if continue_final_message else text

    def close(self) -> None:
        """End the processes. A render that is under way fails."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def _describe(self, source: str) -> ChatTemplate:
        variables = self._ask(source, None)["variables"]
        return ChatTemplate(source, "tools" in variables, "hermes" if "<tool_call>" in source else "json")

    def _base_template(self, tools: bool) -> str | None:
        templates = self._tokenizer.chat_template
        if isinstance(templates, Mapping):
            named = templates.get("tool_use") if tools else None
            template = named or templates.get("default")
        else:
            template = templates
        return None if template is None else str(template)

    def _ask(self, source: str, context: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send one request to a worker; raises where the answer is no text."""
        plain = without_marks(source)
        message = {"source": plain} if context is None else {"source": plain, "context": context}
        body = json.dumps(message).encode()
        digest = hashlib.sha256(body).digest()
        self._check_barred(digest)
        worker = self._take()
        try:
            answer = worker.ask(body)
        except _WorkerEnded as error:
            if worker.end() == -signal.SIGKILL and not error.is_late:
                # Somebody else ended it, such as the system where memory ran out: the template may be innocent.
                raise EngineUnavailable("a chat template's process was ended; send the request again") from None
            self._bar(digest, str(error))
            raise _costly(str(error)) from None
        except BaseException:
            worker.end()
            raise
        self._give_back(worker)
        if "costly" in answer:
            self._bar(digest, answer["costly"])
            raise _costly(answer["costly"])
        if "refused" in answer:
            raise ChatTemplateFailed(f"the chat template refuses the messages: {answer['refused']}", param="messages")
        if "error" in answer:
            raise ChatTemplateFailed(
                f"the chat template cannot be rendered: {answer['error']}; correct the template, or the messages",
                param="messages",
            )
        return answer

    def _take(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise EngineUnavailable("the server is stopping; send the request again when it is back")
            if self._idle:
                return self._idle.pop()
        return _Worker()

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.end()

    def _check_barred(self, digest: bytes) -> None:
        with self._lock:
            until, reason = self._barred.get(digest, (0.0, ""))
        if time.monotonic() < until:
            raise _costly(reason)

    def _bar(self, digest: bytes, reason: str) -> None:
        with self._lock:
            self._barred[digest] = (time.monotonic() + _BARRED_S, reason)
            self._barred.move_to_end(digest)
            while len(self._barred) > _MAX_BARRED:
                self._barred.popitem(last=False)


def without_marks(source: str) -> str:
    """Return a template in which transformers' blocks `generation` are blocks that are always rendered."""
    return _GENERATION.sub(lambda m: "{%" + m[1] + (" endif " if m[2] else " if true ") + m[3] + "%}", source)


class _WorkerEnded(Exception):
    """The worker ended, or gave no answer in time (`is_late`)."""

    def __init__(self, message: str, is_late: bool = False) -> None:
        super().__init__(message)
        self.is_late = is_late


class _Worker:
    """One process that renders. One thread at a time uses it."""

    def __init__(self) -> None:
        # -I: neither the environment's variables nor the working directory decide what is imported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8", "MALLOC_ARENA_MAX": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def ask(self, body: bytes) -> dict[str, Any]:
        """Send one message and return the answer. Raises _WorkerEnded."""
        deadline = time.monotonic() + _WALL_S
        try:
            # The worker reads a message whole before it does anything else.
            remaining = memoryview(struct.pack(">I", len(body)) + body)
            while remaining:
                remaining = remaining[self._input.write(remaining) or 0 :]
        except BrokenPipeError:
            raise _WorkerEnded("its process ended") from None
        head = self._read(4, deadline)
        answer: dict[str, Any] = json.loads(self._read(struct.unpack(">I", head)[0], deadline))
        return answer

    def end(self) -> int:
        """End the process if it has not ended, and return its status. Idempotent."""
        self._input.close()
        try:
            # A process that is ending already keeps its own status.
            return self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._output.close()

    def _read(self, count: int, deadline: float) -> bytes:
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        parts = bytearray()
        while len(parts) < count:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _WorkerEnded(f"it took over {_WALL_S:g} s", is_late=True)
            part = self._output.read(count - len(parts))
            if not part:
                raise _WorkerEnded("it takes more memory or time than a template may")
            parts += part
        return bytes(parts)


def _costly(reason: str) -> ChatTemplateFailed:
    return ChatTemplateFailed(
        f"the chat template cannot be rendered: {reason}; send fewer messages, or publish the adapter with a simpler "
        "template",
        param="model",
    )


def _mark_of(content: str) -> str:
    """What stands after a content to show its end: it cannot be in the content. The same content has the same mark.

    So the same messages are the same request to the process, which may be barred.
    """
    return f"[end of {hashlib.sha256(content.encode('utf-8', 'replace')).hexdigest()}]"


def _cut_at(mark: str, text: str, content: str) -> str:
    """The text up to the end of the last message's content; raises where the template does not write the content."""
    before, _, after = text.rpartition(mark)
    if not after.startswith(_TRIMMED):
        # The template trims contents: without the mark, the space at the end would have been left out too.
        before = before.rstrip()
    if not content.strip() or not before.rstrip().endswith(content.strip()):
        raise ChatTemplateFailed(
            "continue_final_message is true, and the chat template does not write the last message as it is; leave "
            "continue_final_message out",
            param="continue_final_message",
        )
    return before
