"""Bodies of `POST /v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, JsonValue, model_validator

from sera_serve.server.errors import shown
from sera_serve.server.native.sampling import MAX_LOGPROBS
from sera_serve.server.native.schemas import MAX_NEW_TOKENS
from sera_serve.server.openai.chat_schemas import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ONLY_NULL_HELP,
    PARALLEL_HELP,
    SENT_BACK_HELP,
    TEMPLATE_VARIABLES_HELP,
    TEXT_OR_PARTS_SCHEMA,
    TOOL_CHOICE_HELP,
    TOOL_CHOICE_SCHEMA,
    TOOLS_HELP,
    CalledFunction,
    ChatTokenLogprob,
    Function,
    FunctionName,
    Message,
    NamedFunction,
    PastToolCall,
    TemplateVariables,
    Tool,
    ToolChoice,
    ToolUse,
    joined_parts,
)
from sera_serve.server.openai.fields import STREAM_OPTIONS_HELP, Obfuscation, OpenAIFields
from sera_serve.server.response_format import FORM_HELP, FormType, JsonSchema, ResponseFormat, to_constraint
from sera_serve.server.strict import RequestModel, refusal, with_example

_MAX_ID = 256
_LOGPROBS = "message.output_text.logprobs"
_STATELESS = "the server keeps no answer; send the whole conversation as input"
_Kind = Literal["message", "function_call", "function_call_output"]
_KINDS: tuple[_Kind, ...] = get_args(_Kind)
# Members of an output_text part that clients send back as they got them.
_SENT_BACK = {"annotations", "logprobs", "parsed"}


def _parts(value: Any) -> Any:
    return joined_parts(value, {"input_text": set(), "output_text": _SENT_BACK}, "input_text and output_text")


def _input(value: Any) -> Any:
    """A text stands for one message of the user."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _include(value: Any) -> Any:
    for name in value if isinstance(value, list) else ():
        if name != _LOGPROBS:
            raise refusal(f"include has {shown(name)}; the server can include {_LOGPROBS} alone", "include")
    return value


def _tool_choice(value: Any) -> Any:
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "name": str(name), **others} if not others:
            return NamedFunction(name)
    raise refusal('tool_choice must be "none", "auto", "required" or {"type": "function", "name": ...}', "tool_choice")


ItemText = Annotated[str, BeforeValidator(_parts), TEXT_OR_PARTS_SCHEMA]


class InputItem(RequestModel):
    """One item of a conversation: a message, a call that the model made, or what the call gave."""

    type: _Kind | None = Field(None, description="what the item is; message by default")
    role: Literal["system", "developer", "user", "assistant"] | None = Field(
        None, description="of a message: whose it is; developer becomes system"
    )
    content: ItemText | None = Field(
        None, description="of a message: a text, or parts of type input_text or output_text, joined by line breaks"
    )
    call_id: str | None = Field(
        None, min_length=1, max_length=_MAX_ID, description="of a call, and of the output that belongs to it"
    )
    name: FunctionName | None = Field(None, description="of a call: the function's name; an output may repeat it")
    arguments: str | None = Field(None, description="of a call: the JSON of an object")
    output: ItemText | None = Field(None, description="of an output: what the function gave, as content has it")
    # Fields of the server's own items that clients send back as they got them.
    id: str | None = Field(None, max_length=_MAX_ID, description=SENT_BACK_HELP)
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(None, description=SENT_BACK_HELP)
    phase: None = Field(None, description=ONLY_NULL_HELP)
    caller: None = Field(None, description=ONLY_NULL_HELP)
    namespace: None = Field(None, description=ONLY_NULL_HELP)

    @model_validator(mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind is not None and kind not in _KINDS:
            raise refusal(f"an item has the type {shown(kind)}; the types are {', '.join(_KINDS)}", None)
        return value

    @model_validator(mode="after")
    def _fields_of_the_kind(self) -> InputItem:
        kind = self.type or "message"
        needed = {
            "message": {"role", "content"},
            "function_call": {"call_id", "name", "arguments"},
            "function_call_output": {"call_id", "output"},
        }[kind]
        for name in ("role", "content", "call_id", "name", "arguments", "output"):
            given = getattr(self, name) is not None
            # Clients may name the function of an output again.
            if given and name not in needed and (kind, name) != ("function_call_output", "name"):
                raise refusal(f"an item of type {kind!r} has {name}, which is not read; leave it out", None)
            if not given and name in needed:
                raise refusal(f"an item of type {kind!r} has no {name}; send it", None)
        if self.arguments is not None and not isinstance(self.call().parsed(), dict):
            raise refusal("the arguments of a call must be the JSON of an object", None)
        return self

    def call(self) -> CalledFunction:
        """Return the function of a call."""
        return CalledFunction.model_construct(name=self.name or "", arguments=self.arguments or "")


class ResponseTool(Function):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="only function")

    @model_validator(mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        kind = value.get("type", "function") if isinstance(value, dict) else "function"
        if kind != "function":
            raise refusal(f"a tool has the type {shown(kind)}; the models call tools of type 'function' alone", "tools")
        return value

    def as_tool(self) -> Tool:
        """Return the tool as the chat routes have it."""
        return Tool.model_construct(type="function", function=self)


class TextFormat(RequestModel):
    """What a generated text must be."""

    type: FormType = Field(description=FORM_HELP)
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="name of the schema")
    description: str | None = Field(None, description="for people; the model does not see it")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="the JSON schema, with type json_schema")
    strict: bool | None = Field(None, description="the schema is enforced with either value")

    @model_validator(mode="after")
    def _fields_of_the_type(self) -> TextFormat:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise refusal(f"text.format.{name} is missing; send it", f"text.format.{name}")
        for name, value in (("name", self.name), ("schema", self.schema_), ("description", self.description)):
            if self.type != "json_schema" and value is not None:
                place = f"text.format.{name}"
                raise refusal(f"{place} is not read with type {self.type}; send type json_schema", place)
        if self.type != "json_schema" and self.strict is not None:
            raise refusal(f"text.format.strict is not read with type {self.type}; leave it out", "text.format.strict")
        return self

    def as_response_format(self) -> ResponseFormat:
        """Return the format as the other routes have it."""
        schema = None if self.schema_ is None else JsonSchema.model_construct(name=self.name, schema_=self.schema_)
        return ResponseFormat.model_construct(type=self.type, json_schema=schema)


class TextOptions(RequestModel):
    """What the text of an answer must be."""

    format: TextFormat | None = Field(None, description="the form of the text; absent: any text")
    verbosity: Literal["medium"] | None = Field(None, description="only medium, which changes nothing")


_Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponseRequest(OpenAIFields, ToolUse):
    """Body of `POST /v1/responses`."""

    model_config = with_example({"model": "demo/chat", "input": "I lost my red ball.", "max_output_tokens": 40})

    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "store": ((False,), "the server keeps no answer; leave it out, or send false"),
        "previous_response_id": ((), _STATELESS),
        "conversation": ((), _STATELESS),
        "background": ((False,), "the answer comes with the request; leave it out"),
        "truncation": (("disabled",), "an input that is too long is refused; send less of it"),
        "reasoning": (({}, {"effort": "none"}), "leave it out; chat_template_kwargs reach the chat template"),
        "prompt": ((), "the server keeps no prompts; send input"),
        "max_tool_calls": ((), "the server has no tools of its own; leave it out"),
        "service_tier": (("auto", "default"), "use priority"),
        "prompt_cache_key": ((), "use cache_salt, under which prompts share nothing with others"),
        "prompt_cache_options": ((), "use cache_salt"),
        "prompt_cache_retention": (("in_memory",), "leave it out"),
        "context_management": (([],), "leave it out"),
        "moderation": ((), "leave it out"),
        "n": ((1,), "send a request for each answer"),
        "messages": ((), "send input"),
        "max_tokens": ((), "send max_output_tokens"),
        "response_format": ((), "send text.format"),
    }

    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(_input, json_schema_input_type=str | _Items),
    ] = Field(description="a text, or the items of a conversation")
    instructions: str | None = Field(None, description="a first message of role system")
    max_output_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="most tokens to generate; absent: until the context ends"
    )
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16), BeforeValidator(_include)] | None
    ) = Field(None, description=f'["{_LOGPROBS}"] returns the log-probability of each token; refused with tools')
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="likeliest tokens at each place; needs include"
    )
    text: TextOptions | None = Field(None, description="what the text of an answer must be")
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description=TOOLS_HELP
    )
    tool_choice: Annotated[ToolChoice, BeforeValidator(_tool_choice), TOOL_CHOICE_SCHEMA] | None = Field(
        None, description=f'{TOOL_CHOICE_HELP} {{"type": "function", "name": ...}}'
    )
    parallel_tool_calls: bool | None = Field(None, description=PARALLEL_HELP)
    stream_options: Obfuscation | None = Field(None, description=STREAM_OPTIONS_HELP)
    chat_template_kwargs: TemplateVariables | None = Field(None, description=TEMPLATE_VARIABLES_HELP)

    @model_validator(mode="after")
    def _fields_agree(self) -> ResponseRequest:
        text_format = None if self.text is None or self.text.format is None else self.text.format.as_response_format()
        self._form = to_constraint(
            text_format, self.regex, self.grammar, field="text.format", schema_field="text.format.schema"
        )
        self.check_stream_options(self.stream_options)
        self.check_tools(self._form is not None)
        if self.top_logprobs and not self.has_logprobs:
            raise refusal(f'top_logprobs is given without include; send include: ["{_LOGPROBS}"]', "top_logprobs")
        if self.has_logprobs and self.has_tools:
            raise refusal(
                f"include has {_LOGPROBS} beside tools, and the tokens of a call are no text; send tool_choice: "
                '"none", or leave one of them out',
                "include",
            )
        known = set()
        for index, item in enumerate(self.input):
            if item.type == "function_call":
                known.add(item.call_id)
            elif item.type == "function_call_output" and item.call_id not in known:
                place = f"input[{index}].call_id"
                raise refusal(f"{place} is not that of a function_call before it; send the call too", place)
        return self

    @property
    def functions(self) -> Sequence[Function]:
        """What the model may call."""
        return self.tools or ()

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return bool(self.include)

    def messages(self) -> list[Message]:
        """Return the conversation as chat templates have it. Calls belong to the assistant's message before them."""
        messages: list[Message] = []
        if self.instructions is not None:
            messages.append(Message.model_construct(role="system", content=self.instructions))
        for item in self.input:
            if item.type == "function_call":
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message.model_construct(role="assistant"))
                call = PastToolCall.model_construct(id=item.call_id or "", function=item.call())
                calls = messages[-1].tool_calls or []
                calls.append(call)
                messages[-1].tool_calls = calls
            elif item.type == "function_call_output":
                messages.append(
                    Message.model_construct(role="tool", content=item.output, tool_call_id=item.call_id, name=item.name)
                )
            else:
                messages.append(Message.model_construct(role=item.role, content=item.content))
        return messages


class OutputText(BaseModel):
    """A part of a message. `logprobs` is empty where they were not asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[JsonValue]
    logprobs: list[ChatTokenLogprob]


class OutputItem(BaseModel):
    """A message (`content` and `role`), or a call of a function (`call_id`, `name` and `arguments`)."""

    id: str
    type: Literal["message", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[OutputText] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class InputTokensDetails(BaseModel):
    """Details of the input's tokens. `cached_tokens` is 0 for the base model without a key."""

    cached_tokens: int


class OutputTokensDetails(BaseModel):
    """Details of the output's tokens."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Number of tokens of the input, of the output, and of both."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(BaseModel):
    """Why a stream has failed."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """Response body of `POST /v1/responses`, which also repeats fields of the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    system_fingerprint: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    metadata: dict[str, str]
