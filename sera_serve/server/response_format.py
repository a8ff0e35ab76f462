"""The form of a generated text: `response_format`, `regex` and `grammar`, for every route that generates."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from sera_serve.engine import ConstraintSpec
from sera_serve.engine.constraint import MAX_GRAMMAR_CHARACTERS, MAX_REGEX_CHARACTERS, MAX_SCHEMA_CHARACTERS
from sera_serve.server.strict import RequestModel, refusal

FormType = Literal["text", "json_object", "json_schema"]
_TYPES: tuple[FormType, ...] = get_args(FormType)
FORM_HELP = "text is any text, json_object any JSON object, and json_schema JSON that conforms to a schema"


class JsonSchema(RequestModel):
    """A JSON schema, as OpenAI's API wraps it."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="name of the schema; it changes nothing")
    description: str | None = Field(
        None, max_length=MAX_SCHEMA_CHARACTERS, description="for people; the model does not see it"
    )
    schema_: dict[str, Any] = Field(alias="schema", description="the JSON schema; the order of its keys matters")
    strict: bool | None = Field(None, description="the schema is enforced with either value")


class ResponseFormat(RequestModel):
    """What a generated text must be."""

    type: FormType = Field(description=FORM_HELP)
    json_schema: JsonSchema | None = Field(None, description="the schema, with type json_schema")

    @model_validator(mode="before")
    @classmethod
    def _known_type(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        # Before a member of that type is told to be unknown.
        if isinstance(kind, str) and kind not in _TYPES:
            hint = f"; send {kind} as a field of the request" if kind in ("regex", "grammar") else ""
            raise refusal(
                f"response_format.type is {kind[:64]!r}: it should be {', '.join(_TYPES[:-1])} or {_TYPES[-1]}{hint}",
                "response_format.type",
            )
        return value

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise refusal("response_format.json_schema is missing; send it", "response_format.json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise refusal(
                f"response_format.json_schema is not read with type {self.type}; send type json_schema",
                "response_format.json_schema",
            )
        return self


Regex = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARACTERS)]
Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]

RESPONSE_FORMAT_HELP = "text, json_object, or json_schema with a schema that the text conforms to"
REGEX_HELP = "regular expression that the whole text matches"
GRAMMAR_HELP = "grammar in Lark's syntax that the text conforms to"


def to_constraint(
    response_format: ResponseFormat | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    *,
    field: str = "response_format",
    schema_field: str = "response_format.json_schema.schema",
) -> ConstraintSpec | None:
    """Return what the engine enforces; None is any text. The engine checks the schema, regex or grammar itself.

    Args:
        response_format: What the text must be.
        regex: In place of it, an expression that the text matches.
        grammar: In place of both, a grammar that the text conforms to.
        field: What the request calls `response_format`.
        schema_field: What the request calls its schema.

    Raises:
        PydanticCustomError: More than one form is given, or the schema is too long. Call it in a validator.
    """
    form = None if response_format is None or response_format.type == "text" else response_format
    given = {field: form, "regex": regex, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise refusal(f"{' and '.join(names)} are given; send one of them", names[-1])
    if regex is not None:
        return ConstraintSpec("regex", regex)
    if grammar is not None:
        return ConstraintSpec("grammar", grammar)
    if form is None:
        return None
    if form.json_schema is None:
        return ConstraintSpec("json_object")
    # In the client's order of keys: the text has the properties in the order of the schema.
    text = json.dumps(form.json_schema.schema_, separators=(",", ":"), ensure_ascii=False)
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise refusal(
            f"the schema has {len(text)} characters; send at most {MAX_SCHEMA_CHARACTERS}",
            schema_field,
        )
    return ConstraintSpec("json_schema", text)
