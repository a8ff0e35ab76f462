"""The inputs of requests: texts, sentence pairs, and images as base64 or in a form. Nothing is decoded here."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import PlainValidator, WithJsonSchema

from sera_serve.engine import ImageInput
from sera_serve.server.strict import refusal

MAX_INPUTS = 1024
MAX_IMAGE_TYPE = 64
# Some programs write image/jpg, which is no registered type. What a file is, its content says.
_IMAGE_TYPES = ("image/jpeg", "image/jpg", "image/png", "image/webp")
_IMAGE_HELP = "the base64 of a JPEG, PNG or WebP file, or a data URL of it (data:image/png;base64,...)"
ClassifyInput: TypeAlias = str | tuple[str, str] | ImageInput


def image_of(value: Any, place: str) -> ImageInput:
    """Read an object `{"image": ...}`. Its base64 is decoded later, on another thread.

    Raises:
        PydanticCustomError: The object has other fields, the image is no text, or a URL that is no data URL.
    """
    if value.keys() != {"image"}:
        raise refusal(f"{place} must be an object with the field image and no other", place)
    place = f"{place}.image"
    if not isinstance(value["image"], str) or not value["image"]:
        raise refusal(f"{place} must be {_IMAGE_HELP}", place)
    text: str = value["image"]
    head = text[: MAX_IMAGE_TYPE + len("data:;base64,")]
    if ":" not in head:
        # Base64 has no colon.
        return ImageInput(text, place)
    kind, comma, _ = head.partition(",")
    types = [f"data:{kind};base64" for kind in _IMAGE_TYPES]
    if not comma or kind.lower() not in types:
        raise refusal(
            f"{place} must be {_IMAGE_HELP}; the types are {', '.join(_IMAGE_TYPES)}, and other URLs are not fetched",
            place,
        )
    return ImageInput(text[len(kind) + 1 :], place)


def _item(value: Any, place: str) -> ClassifyInput:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and "image" in value:
        return image_of(value, place)
    if isinstance(value, dict) and value.keys() == {"text", "text_pair"}:
        for name in ("text", "text_pair"):
            if not isinstance(value[name], str) or not value[name]:
                raise refusal(f"{place}.{name} must be a text, and not empty", f"{place}.{name}")
        return value["text"], value["text_pair"]
    raise refusal(
        f'{place} must be a text that is not empty, {{"text", "text_pair"}} for a sentence pair, or {{"image"}}', place
    )


def _inputs(value: Any) -> list[ClassifyInput]:
    """A list of inputs. Reading stops at the first wrong element."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_INPUTS:
        raise refusal(f"inputs must be a list of 1 to {MAX_INPUTS} texts, sentence pairs or images", "inputs")
    return [_item(item, f"inputs[{index}]") for index, item in enumerate(value)]


IMAGE_SCHEMA = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {"image": {"type": "string", "minLength": 1, "description": _IMAGE_HELP}},
}
_TEXT = {"type": "string", "minLength": 1}
_PAIR = {
    "text": {**_TEXT, "description": "the first text of a sentence pair"},
    "text_pair": {**_TEXT, "description": "the second text"},
}
_INPUTS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_INPUTS,
    "items": {
        "anyOf": [
            _TEXT,
            {
                "type": "object",
                "required": ["text", "text_pair"],
                "additionalProperties": False,
                "properties": _PAIR,
            },
            IMAGE_SCHEMA,
        ]
    },
}
ClassifyInputs = Annotated[list[ClassifyInput], PlainValidator(_inputs), WithJsonSchema(_INPUTS_SCHEMA)]
