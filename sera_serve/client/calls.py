"""One description of each call: what is sent, and how the answer is read. Both clients send these."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from sera_serve.client import answers
from sera_serve.client.errors import InvalidAnswerError
from sera_serve.client.uploads import Progress, UploadForm

T = TypeVar("T")

Adapter = str | Mapping[str, float]
"""One adapter's reference, such as `acme/support@v2`, or a weighted sum: the weight of each reference."""
Prompt = str | Sequence[int]
"""A text, or the ids of its tokens."""
ClassifyInput = str | tuple[str, str] | bytes | Path
"""A text, a sentence pair, or an image: the bytes of a JPEG, PNG or WebP file, or its path."""
EmbedInput = str | Sequence[int] | bytes | Path
"""A text, the ids of its tokens, or an image as in `ClassifyInput`."""
ResponseFormat = Mapping[str, Any] | type[BaseModel]
"""The server's `response_format`, or a model of pydantic whose JSON schema the text is to have."""
Priority = Literal["low", "normal", "high"]
Pooling = Literal["last_token", "cls", "mean"]

_SCHEMA_NAME = re.compile(r"[^a-zA-Z0-9_-]")


class GenerateOptions(TypedDict, total=False):
    """Options of a generation. docs/http.md has the meaning, the default and the bounds of each.

    A `stop` that is one text is sent as a list of one.
    """

    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    priority: Priority
    timeout_s: float | None
    cache_salt: str | None
    response_format: ResponseFormat | None
    regex: str | None
    grammar: str | None


class ClassifyOptions(TypedDict, total=False):
    """Options of a classification. docs/http.md has the meaning, the default and the bounds of each."""

    priority: Priority
    timeout_s: float | None


class EmbedOptions(TypedDict, total=False):
    """Options of embeddings. docs/http.md has the meaning, the default and the bounds of each."""

    pooling: Pooling | None
    normalize: bool | None
    priority: Priority | None
    timeout_s: float | None


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and how its answer is read.

    Attributes:
        method: HTTP method.
        path: Path, quoted.
        answer: What the body of the answer is.
        query: Query parameters.
        json: Body, or None.
        upload: The form of an upload, or None.
        changes: Whether the request changes something on the server, so that it must not be applied twice.
        probes: Whether the request asks for the server's state, so that a refusal is the answer.
        streams: Whether the answer is a stream of events.
    """

    method: str
    path: str
    answer: Callable[[bytes], T]
    query: Mapping[str, str | int] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    upload: UploadForm | None = None
    changes: bool = False
    probes: bool = False
    streams: bool = False

    @contextmanager
    def request(self) -> Iterator[dict[str, Any]]:
        """Give the arguments of httpx's `build_request`. Files of an upload are open in the context."""
        arguments = {"method": self.method, "url": self.path, "params": self.query}
        if self.upload is not None:
            with self.upload.open() as form:
                yield arguments | form
        elif self.json is not None:
            yield arguments | {"json": self.json}
        else:
            yield arguments

    def read(self, body: bytes) -> T:
        """Read the body of a successful answer. Raises InvalidAnswerError if it has another form."""
        try:
            return self.answer(body)
        except ValidationError as error:
            raise InvalidAnswerError(f"the answer to {self.method} {self.path} cannot be read: {error}") from error


def generate(prompt: Prompt, adapter: Adapter | None, options: GenerateOptions) -> Call[answers.Generation]:
    """`POST /v1/generate`, without a stream."""
    return Call("POST", "/v1/generate", answers.Generation.model_validate_json, json=_prompt(prompt, adapter, options))


def stream(prompt: Prompt, adapter: Adapter | None, options: GenerateOptions) -> Call[None]:
    """`POST /v1/generate` with a stream of events."""
    body = _prompt(prompt, adapter, options) | {"stream": True}
    return Call("POST", "/v1/generate", lambda body: None, json=body, streams=True)


def classify(
    inputs: str | bytes | Path | Sequence[ClassifyInput], adapter: Adapter, options: ClassifyOptions
) -> Call[answers.Classified]:
    """`POST /v1/classify` with one adapter, or a weighted sum."""
    body = {"adapter": _adapter(adapter), "inputs": _inputs(inputs)} | _known(options, ClassifyOptions)
    return Call("POST", "/v1/classify", answers.Classified.model_validate_json, json=body)


def classify_each(
    inputs: str | bytes | Path | Sequence[ClassifyInput], adapters: Sequence[str], options: ClassifyOptions
) -> Call[list[answers.Classified]]:
    """`POST /v1/classify` with several adapters."""
    if isinstance(adapters, str | bytes | Mapping) or not isinstance(adapters, Iterable):
        # As a sequence of characters a reference would pass for many.
        raise TypeError(f"adapters is {adapters!r}; give a list of references, such as ['acme/support']")
    references = [_text("adapters", reference) for reference in adapters]
    body = {"adapters": references, "inputs": _inputs(inputs)} | _known(options, ClassifyOptions)
    return Call(
        "POST", "/v1/classify", lambda body: answers.ClassifiedEach.model_validate_json(body).adapters, json=body
    )


def embed(
    inputs: str | bytes | Path | Sequence[EmbedInput], model: str, options: EmbedOptions
) -> Call[answers.Embeddings]:
    """`POST /v1/embeddings`. The vectors travel as base64, a fifth of their text."""
    body = {"model": _text("model", model), "input": _inputs(inputs), "encoding_format": "base64"} | _known(
        options, EmbedOptions
    )
    return Call("POST", "/v1/embeddings", answers.Embeddings.model_validate_json, json=body)


def list_adapters(limit: int, after: str | None, tenant: str | None) -> Call[answers.AdapterPage]:
    """`GET /v1/adapters`."""
    query = _given(limit=limit, after=after, tenant=tenant)
    return Call("GET", "/v1/adapters", answers.AdapterPage.model_validate_json, query)


def get_adapter(reference: str) -> Call[answers.AdapterDetail]:
    """`GET /v1/adapters/{tenant}/{name}`."""
    return Call("GET", _adapter_path(reference), answers.AdapterDetail.model_validate_json)


def delete_adapter(reference: str) -> Call[answers.DeletedAdapter]:
    """`DELETE /v1/adapters/{tenant}/{name}`."""
    return Call("DELETE", _adapter_path(reference), answers.DeletedAdapter.model_validate_json, changes=True)


def pin_adapter(reference: str) -> Call[answers.PinnedAdapter]:
    """`PUT /v1/adapters/{tenant}/{name}/pin`."""
    path = _adapter_path(reference) + "/pin"
    return Call("PUT", path, answers.PinnedAdapter.model_validate_json, changes=True)


def unpin_adapter(reference: str) -> Call[answers.PinnedAdapter]:
    """`DELETE /v1/adapters/{tenant}/{name}/pin`."""
    path = _adapter_path(reference) + "/pin"
    return Call("DELETE", path, answers.PinnedAdapter.model_validate_json, changes=True)


def upload_adapter(
    name: str, source: str | Path | bytes, config: str | Path | bytes | None, progress: Progress | None
) -> Call[answers.PublishedAdapter]:
    """`POST /v1/adapters`. Raises OSError or ValueError if the source cannot be read."""
    form = UploadForm(_text("name", name), source, config, progress)
    return Call("POST", "/v1/adapters", answers.PublishedAdapter.model_validate_json, upload=form, changes=True)


def list_models(limit: int, after: str | None) -> Call[answers.ModelPage]:
    """`GET /v1/models`."""
    return Call("GET", "/v1/models", answers.ModelPage.model_validate_json, _given(limit=limit, after=after))


def get_model(model: str) -> Call[answers.Model]:
    """`GET /v1/models/{model}`."""
    return Call("GET", f"/v1/models/{_quoted(model)}", answers.Model.model_validate_json)


def health() -> Call[answers.Health]:
    """`GET /healthz`."""
    return Call("GET", "/healthz", answers.Health.model_validate_json, probes=True)


def ready() -> Call[answers.Readiness]:
    """`GET /readyz`."""
    return Call("GET", "/readyz", answers.Readiness.model_validate_json, probes=True)


def _prompt(prompt: Prompt, adapter: Adapter | None, options: GenerateOptions) -> dict[str, Any]:
    if isinstance(prompt, bytes | bytearray | memoryview):
        # As a sequence of integers they would pass for token ids.
        raise TypeError("prompt has bytes; send a text (decode it), or a list of token ids")
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(f"prompt is {prompt!r}; send a text, or a list of token ids")
    fields = _known(options, GenerateOptions)
    if isinstance(stop := fields.get("stop"), str):
        fields["stop"] = [stop]
    form: ResponseFormat | None = fields.get("response_format")
    if isinstance(form, type):
        schema = {"name": _SCHEMA_NAME.sub("_", form.__name__)[:64], "schema": form.model_json_schema()}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    text = {"prompt": prompt} if isinstance(prompt, str) else {"token_ids": list(prompt)}
    return {"adapter": None if adapter is None else _adapter(adapter)} | text | fields


def _adapter(adapter: Adapter) -> str | list[dict[str, str | float]]:
    if not isinstance(adapter, Mapping):
        return _text("adapter", adapter)
    return [{"adapter": _text("adapter", reference), "weight": weight} for reference, weight in adapter.items()]


def _inputs(inputs: Any) -> list[Any]:
    """The inputs of a body. Raises OSError if the file of an image cannot be read."""
    if isinstance(inputs, str | bytes | Path):
        inputs = [inputs]
    if isinstance(inputs, bytearray | memoryview | Mapping) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs is of type {type(inputs).__name__}; give a text, the bytes of an image, or a list")
    return [_input(value) for value in inputs]


def _input(value: Any) -> Any:
    if isinstance(value, bytes | Path):
        data = value if isinstance(value, bytes) else value.read_bytes()
        return {"image": base64.b64encode(data).decode()}
    if isinstance(value, bytearray | memoryview):
        raise TypeError(f"inputs has an item of type {type(value).__name__}; give the image as bytes")
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value):
        text, text_pair = value
        return {"text": text, "text_pair": text_pair}
    return value


def _text(field: str, value: object) -> str:
    """Return a value that must be a text. Anything else is refused here: it could be sent as another text."""
    if not isinstance(value, str):
        raise TypeError(f"{field} is {value!r}; give a str, such as 'acme/support'")
    return value


def _known(options: Any, kind: type) -> dict[str, Any]:
    """A copy of the options. A name that is none of them is refused here: it could change what the call means."""
    if unknown := sorted(options.keys() - kind.__annotations__.keys()):
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {', '.join(kind.__annotations__)}")
    return dict(options)


def _given(**query: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in query.items() if value is not None}


def _adapter_path(reference: str) -> str:
    if _text("reference", reference).count("/") != 1:
        raise ValueError(f"{reference!r} is no adapter; write tenant/name, perhaps with @alias, @v3 or @digest")
    return f"/v1/adapters/{_quoted(reference)}"


def _quoted(reference: str) -> str:
    """A reference as a part of a path. One that would lead to another path is refused."""
    if any(part in ("", ".", "..") for part in _text("model", reference).split("/")):
        raise ValueError(f"{reference!r} is no adapter or model; write tenant/name")
    return quote(reference, safe="/@")
