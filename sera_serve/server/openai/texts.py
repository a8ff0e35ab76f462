"""What the routes share for texts: chat templates, tokens of texts, names of tokens. The work runs on threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from adapters_store import AdapterStore
from sera_serve.base.chat import ChatRenderer, ChatTemplate
from sera_serve.engine import ServingEngine, Task, check_adapter_serves
from sera_serve.errors import InvalidRequest, PromptTooLong
from sera_serve.server.openai.chat_schemas import Message, Tool
from sera_serve.server.openai.token_texts import TokenTexts
from sera_serve.threads import BoundedExecutor

# Rendering and tokenizing leave the interpreter's lock to others for most of their time.
_THREADS, _MAX_WAITING = 2, 256
_MAX_TEMPLATES = 1024


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders.

    Attributes:
        messages: At least one.
        tools: What the model may call; empty is none.
        add_generation_prompt: Begin the assistant's message.
        continue_final_message: End within the last message. No message is begun.
        variables: Further variables of the template.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the engine takes it.

    Attributes:
        text: The prompt, with every special token that the template writes.
        adapter: The adapter's reference, to the version that has the template; None is the base model.
        template: The template.
    """

    text: str
    adapter: str | None
    template: ChatTemplate


class Texts:
    """Renders, tokenizes and names tokens for one app.

    Attributes:
        executor: Its threads. A tenant's own template may take a second of the processor, so tenants take turns.
    """

    def __init__(self, engine: ServingEngine, store: AdapterStore) -> None:
        """Start no thread and no process yet."""
        self._engine = engine
        self._store = store
        self.executor = BoundedExecutor("rendering", _THREADS, _MAX_WAITING, max_waiting_of_owner=_MAX_WAITING // 2)
        self._lock = threading.Lock()
        # By the digest of a bundle: its chat template, or None.
        self._own_template = lru_cache(_MAX_TEMPLATES)(lambda digest: store.config(digest).chat_template)
        self._renderer: ChatRenderer | None = None

    @property
    def renderer(self) -> ChatRenderer:
        """Renders chat templates."""
        with self._lock:
            if self._renderer is None:
                self._renderer = ChatRenderer(self._engine.base.tokenizer)
            return self._renderer

    @cached_property
    def tokens(self) -> TokenTexts:
        """Names tokens."""
        return TokenTexts(self._engine.base.tokenizer)

    def chat_prompt(self, conversation: Conversation, adapter: str | None, task: Task | None = None) -> ChatPrompt:
        """Render a conversation with the adapter's template, or the base's. Blocks.

        Args:
            conversation: What is rendered.
            adapter: The adapter's reference, or None for the base.
            task: What the prompt is for, or None for its tokens alone.

        Raises:
            UnsupportedTask: The base or the adapter does not have the task. It comes before `ChatTemplateMissing`.
            AdapterNotFound: There is no such adapter.
            ChatTemplateMissing, ChatTemplateFailed: There is no template, or it cannot be rendered.
            InvalidRequest: There are tools, and the template does not read them.
        """
        if task is not None:
            self._engine.check_base_serves(task)
        own: str | None = None
        if adapter is not None:
            resolved = self._store.resolve(adapter)
            if task is not None:
                check_adapter_serves(adapter, resolved.task, task)
            if resolved.has_chat_template:
                own = self._own_template(resolved.digest)
                # `latest` may move before the engine reads it: template and weights must be of one version.
                adapter = f"{resolved.adapter}@{resolved.digest}"
        tools = [tool.for_template() for tool in conversation.tools] or None
        template = self.renderer.template(own, tools is not None)
        if tools is not None and not template.uses_tools:
            raise InvalidRequest(
                "the model's chat template has no place for tools; leave tools out, or name another model",
                param="tools",
            )
        text = self.renderer.render(
            template,
            [message.for_template() for message in conversation.messages],
            tools,
            add_generation_prompt=conversation.add_generation_prompt and not conversation.continue_final_message,
            continue_final_message=conversation.continue_final_message,
            variables=conversation.variables,
        )
        return ChatPrompt(text, adapter, template)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a text. Blocks."""
        encoded = self._engine.base.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        tokens: list[int] = encoded["input_ids"]
        return tokens

    def decode(self, tokens: list[int], param: str = "tokens") -> str:
        """Return the text of tokens, special ones included. Blocks.

        Args:
            tokens: Token ids.
            param: The field that has them.

        Raises:
            InvalidRequest: A token is outside the vocabulary.
        """
        tokenizer = self._engine.base.tokenizer
        size = len(tokenizer)
        if any(token >= size for token in tokens):
            raise InvalidRequest(f"the token ids of {param} must lie in 0 to {size - 1}", param=param)
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def close(self) -> None:
        """Begin no more work, and end the processes."""
        self.executor.close()
        if self._renderer is not None:
            self._renderer.close()


async def _texts(request: Request) -> Texts:
    return cast(Texts, request.app.state.texts)


TextsOf = Annotated[Texts, Depends(_texts)]


def adapter_of(model: str, engine: ServingEngine) -> str | None:
    """Return the adapter that `model` names, or None for the base."""
    return None if model == engine.base.name else model


def check_token_count(tokens: Sequence[int], engine: ServingEngine, param: str) -> None:
    """Raise PromptTooLong if the context cannot hold so many tokens; `param` names the field."""
    if len(tokens) > engine.context_tokens:
        raise PromptTooLong(
            f"{len(tokens)} tokens were sent; the context holds {engine.context_tokens}; send fewer", param=param
        )
