"""Bodies of `POST /v1/chat/completions`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, WithJsonSchema, model_validator

from adapters_store import parse_json
from sera_serve.server.errors import shown
from sera_serve.server.native.sampling import MAX_LOGPROBS
from sera_serve.server.native.schemas import MAX_NEW_TOKENS
from sera_serve.server.openai.completion_schemas import TokenUsage
from sera_serve.server.openai.fields import GenerationFields
from sera_serve.server.strict import RequestModel, refusal, with_example

MAX_MESSAGES = 2048
MAX_TOOLS = 128
_MAX_TEMPLATE_VARIABLES = 16
_MAX_ARGUMENT_MEMBERS = 1000
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# What the server itself gives to a template.
_OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
_NOT_TEXT = "the models read text alone; leave it out"

SENT_BACK_HELP = "not read: clients send it back as they got it"
ONLY_NULL_HELP = "only null, as clients send it back"
TOOLS_HELP = f"up to {MAX_TOOLS} functions that the model may call; refused where its chat template reads no tools"
TOOL_CHOICE_HELP = "auto, the default; none leaves the tools out of the prompt; required; or the function to call as"
STRICT_HELP = (
    "with tool_choice auto: the arguments conform to parameters where the chat template has <tool_call>, and need not "
    "elsewhere; with required or a named function, they conform with either value"
)
PARALLEL_HELP = "false: at most one call is answered, and further ones are left out; true by default"
TEMPLATE_VARIABLES_HELP = f"up to {_MAX_TEMPLATE_VARIABLES} further variables of the chat template"


def joined_parts(value: Any, kinds: Mapping[str, set[str]], read: str) -> Any:
    """Parts of text become one text, joined by line breaks. What is no list is left to the type.

    Args:
        value: A text, or a list of parts.
        kinds: By each type that a part may have: the members that clients send back, and that are not read.
        read: What the models read, for messages.
    """
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise refusal(f"a content part has the type {shown(kind)}; the models read {read} alone", None)
        if set(part) - {"type", "text"} - kinds[kind] or not isinstance(part.get("text"), str):
            raise refusal(f'a content part must be {{"type": "{kind}", "text": "..."}}', None)
        if part.get("annotations"):
            raise refusal("annotations of a content part are not read; leave them out", None)
        texts.append(part["text"])
    return "\n".join(texts)


def _content(value: Any) -> Any:
    return joined_parts(value, {"text": set()}, "parts of type 'text'")


TEXT_OR_PARTS_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})
Content = Annotated[str, BeforeValidator(_content), TEXT_OR_PARTS_SCHEMA]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class CalledFunction(RequestModel):
    """The function of a call that the assistant made before."""

    name: FunctionName = Field(description="the function's name")
    arguments: str = Field(description="the JSON of an object")
    # OpenAI's client adds it to the calls that it parses, and sends it back with them.
    parsed_arguments: JsonValue = Field(None, description=SENT_BACK_HELP)

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> CalledFunction:
        if not isinstance(self.parsed(), dict):
            raise refusal("the arguments of a call must be the JSON of an object", None)
        return self

    def parsed(self) -> Any:
        """Return the arguments, or None if they are no JSON."""
        try:
            return parse_json(self.arguments, _MAX_ARGUMENT_MEMBERS)
        except json.JSONDecodeError:
            return None


class PastToolCall(RequestModel):
    """A call that the assistant made before."""

    id: str = Field(max_length=256, description="what the tool_call_id of its answer names")
    type: Literal["function"] = Field("function", description="only function")
    function: CalledFunction = Field(description="what was called")
    # Pieces of a stream carry it, and clients send them back.
    index: int | None = Field(None, description=SENT_BACK_HELP)


class Message(RequestModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="whose message it is; developer becomes system"
    )
    content: Content | None = Field(
        None,
        description="a text, or parts of type text, joined by line breaks; an assistant with tool_calls needs none",
    )
    name: str | None = Field(
        None, max_length=256, description="the name of who speaks, for chat templates that read it"
    )
    tool_calls: Annotated[list[PastToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="calls that the assistant made; only with role assistant"
    )
    tool_call_id: str | None = Field(
        None, max_length=256, description="the call that the message answers; only with role tool"
    )
    reasoning_content: str | None = Field(
        None, description="what the assistant thought before its answer; only with role assistant"
    )
    # Fields of an assistant's message that clients send back as they got it.
    refusal: None = Field(None, description=ONLY_NULL_HELP)
    audio: None = Field(None, description=ONLY_NULL_HELP)
    function_call: None = Field(None, description=ONLY_NULL_HELP)
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = Field(
        None, description="only an empty list, as clients send it back"
    )
    # OpenAI's client adds it to the messages that it parses: the content as a value.
    parsed: JsonValue = Field(None, description=SENT_BACK_HELP)

    @model_validator(mode="after")
    def _fields_of_the_role(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise refusal(f"a message of role {self.role!r} has no content; send a text", None)
        of_the_assistant = (self.tool_calls, self.reasoning_content, self.parsed)
        if self.role != "assistant" and any(value is not None for value in of_the_assistant):
            raise refusal("only a message of role 'assistant' has tool_calls, reasoning_content or parsed", None)
        if self.role != "tool" and self.tool_call_id is not None:
            raise refusal("only a message of role 'tool' has tool_call_id", None)
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it. Arguments of calls become objects."""
        # The newer name of the same role; no template knows it.
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content or ""
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.parsed()},
                }
                for call in self.tool_calls
            ]
        return message


class Function(RequestModel):
    """A function that the model may call."""

    name: FunctionName = Field(description="1 to 64 letters, digits, '_', '.' and '-'; each function has its own")
    description: str | None = Field(None, description="what the function does, for the model")
    parameters: dict[str, JsonValue] | None = Field(
        None, description="JSON schema of the arguments; absent: the function takes none"
    )
    strict: bool | None = Field(None, description=STRICT_HELP)

    def arguments_schema(self) -> dict[str, Any]:
        """Return a schema of the arguments. A function without parameters takes none, as with OpenAI."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return dict(self.parameters or {"type": "object"})


class Tool(RequestModel):
    """Something that the model may call."""

    type: Literal["function"] = Field(description="only function")
    function: Function = Field(description="what the model may call")

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates read it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class NamedFunction:
    """The one function that the model must call. Its name may be that of a mode: `none`, `auto` or `required`."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedFunction
"""Whether the model may call a tool, or must; or the function that it must call."""
TOOL_CHOICE_SCHEMA = WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]})


def _tool_choice(value: Any) -> Any:
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name), **others}, **more} if not others and not more:
            return NamedFunction(name)
    raise refusal(
        'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
        "tool_choice",
    )


def _template_variables(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) > _MAX_TEMPLATE_VARIABLES:
            raise refusal(
                f"chat_template_kwargs has {len(value)} variables; send at most {_MAX_TEMPLATE_VARIABLES}",
                "chat_template_kwargs",
            )
        for name in value:
            if _VARIABLE.fullmatch(name) is None or name in _OWN_VARIABLES:
                raise refusal(
                    f"chat_template_kwargs cannot set {name[:64]!r}; it sets variables of the template's own",
                    "chat_template_kwargs",
                )
    return value


TemplateVariables = Annotated[dict[str, JsonValue], BeforeValidator(_template_variables)]


class ToolUse:
    """The part of a request that says which tools the model may call, or must."""

    tool_choice: ToolChoice | None
    parallel_tool_calls: bool | None

    @property
    def functions(self) -> Sequence[Function]:
        """What the model may call."""
        raise NotImplementedError

    @property
    def forced_function(self) -> str | None:
        """The function that `tool_choice` names."""
        return self.tool_choice.name if isinstance(self.tool_choice, NamedFunction) else None

    @property
    def has_tools(self) -> bool:
        """Whether the model may call a tool."""
        return bool(self.functions) and self.tool_choice != "none"

    @property
    def is_forced(self) -> bool:
        """Whether the model must call a tool."""
        return self.tool_choice == "required" or self.forced_function is not None

    def check_tools(self, has_form: bool) -> None:
        """Refuse fields that contradict each other. Call it in a validator.

        Args:
            has_form: Whether the text must conform to a form.
        """
        names = [function.name for function in self.functions]
        if len(set(names)) < len(names):
            raise refusal("tools has two functions of one name; give each its own", "tools")
        if self.tool_choice not in (None, "none") and not names:
            raise refusal("tool_choice is given without tools; send tools, or leave it out", "tool_choice")
        if self.forced_function is not None and self.forced_function not in names:
            raise refusal("tool_choice names a function that tools does not have", "tool_choice")
        if has_form and self.has_tools:
            raise refusal(
                "response_format, text.format, regex or grammar is given with tools, and a call would not conform to "
                'it; send tool_choice: "none", or leave one of them out',
                "tools",
            )


class ChatRequest(GenerationFields, ToolUse):
    """Body of `POST /v1/chat/completions`."""

    model_config = with_example(
        {"model": "demo/chat", "messages": [{"role": "user", "content": "I lost my ball."}], "max_tokens": 40}
    )

    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "audio": ((), _NOT_TEXT),
        "modalities": ((["text"],), _NOT_TEXT),
        "functions": (([],), "send tools instead"),
        "function_call": (("none",), "send tool_choice instead"),
        "prediction": ((), "leave it out"),
        "reasoning_effort": (("none",), "leave it out; chat_template_kwargs reach the chat template"),
        "verbosity": (("medium",), "leave it out"),
        "service_tier": (("auto", "default"), "use priority"),
        "store": ((False,), "no answer is kept; leave it out"),
        "web_search_options": ((), "leave it out"),
        "moderation": ((), "leave it out"),
        "prompt_cache_key": ((), "use cache_salt, under which prompts share nothing with others"),
        "prompt_cache_options": ((), "use cache_salt"),
        "prompt_cache_retention": (("in_memory",), "leave it out"),
        "chat_template": ((), "publish an adapter with its chat_template"),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description="the conversation, which the chat template of the adapter, or of the base, makes a prompt of"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="the newer name of max_tokens; send one of them"
    )
    logprobs: bool | None = Field(None, description="return the log-probability of each token; false by default")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="and of this many likeliest tokens; needs logprobs"
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description=TOOLS_HELP
    )
    tool_choice: Annotated[ToolChoice, BeforeValidator(_tool_choice), TOOL_CHOICE_SCHEMA] | None = Field(
        None, description=f'{TOOL_CHOICE_HELP} {{"type": "function", "function": {{"name": ...}}}}'
    )
    parallel_tool_calls: bool | None = Field(None, description=PARALLEL_HELP)
    add_generation_prompt: bool | None = Field(None, description="begin the assistant's message; true by default")
    continue_final_message: bool | None = Field(
        None, description="continue the last message, an assistant's; false by default"
    )
    chat_template_kwargs: TemplateVariables | None = Field(None, description=TEMPLATE_VARIABLES_HELP)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise refusal("max_tokens and max_completion_tokens are both given; send one of them", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs is given without logprobs; send logprobs: true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise refusal(
                "continue_final_message and add_generation_prompt are both true; send one of them",
                "continue_final_message",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise refusal(
                "continue_final_message is true, and the last message is not an assistant's", "continue_final_message"
            )
        self.check_tools(self._form is not None)
        self._check_tool_messages()
        return self

    def _check_tool_messages(self) -> None:
        known = set[str]()
        for index, message in enumerate(self.messages):
            known |= {call.id for call in message.tool_calls or ()}
            if message.role != "tool":
                continue
            if not known:
                raise refusal(
                    f"messages[{index}] has role 'tool', and no message before it has tool_calls; send the assistant's "
                    "message with its calls too",
                    f"messages[{index}].role",
                )
            if message.tool_call_id is not None and message.tool_call_id not in known:
                place = f"messages[{index}].tool_call_id"
                raise refusal(f"{place} is not the id of a call before it; send the call too", place)

    @property
    def functions(self) -> Sequence[Function]:
        """What the model may call."""
        return [tool.function for tool in self.tools or ()]

    @property
    def most_tokens(self) -> int | None:
        """How many tokens an answer has at most; None is until the context ends."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ChatTopLogprob(BaseModel):
    """A token, its bytes and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    """The same of a generated token, and of the likeliest tokens at its place."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of one answer."""

    content: list[ChatTokenLogprob]
    refusal: None


class FunctionCall(BaseModel):
    """A function's name, and the JSON of its arguments."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model makes. `index` is there in streams alone."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class AnswerMessage(BaseModel):
    """The assistant's message, or in a stream what is added to it."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer. A stream has `delta` in place of `message`."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletion(BaseModel):
    """Response body of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: TokenUsage | None = None
