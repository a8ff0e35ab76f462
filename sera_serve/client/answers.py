"""What the server answers, as typed values. Fields that a newer server adds are left out."""

from __future__ import annotations

import base64
import sys
from array import array
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, model_validator

Task = Literal["generate", "classify", "regress", "token-classify", "image-classify", "retrieve"]
"""What an adapter is for."""


class Answer(BaseModel):
    """Base class of answers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Usage(Answer):
    """Number of tokens of the prompt, and of generated tokens."""

    prompt_tokens: int
    completion_tokens: int


class LikelyToken(Answer):
    """A likely token at one position, and its log-probability."""

    token_id: int
    logprob: float


class ScoredToken(Answer):
    """A token and its log-probability, None for the first token of a prompt; and the most likely tokens there."""

    token_id: int
    logprob: float | None
    top: list[LikelyToken]


class Choice(Answer):
    """One generated text.

    Attributes:
        index: Which of the `n` texts.
        text: The text, without the stop string that ended it.
        token_ids: Every generated token, those of a stop string too.
        finish_reason: `stop`, or `length` where the tokens or the context ran out.
        stop_reason: The stop string or token of `stop_token_ids` that ended the text, else None.
        logprobs: One row for each token where they were asked for, else None.
    """

    index: int = 0
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    logprobs: list[ScoredToken] | None = None


_OF_A_CHOICE = frozenset(Choice.model_fields) - {"index"}


class Generation(Answer):
    """The `n` texts that were generated for one prompt. `text` and the like are those of the first.

    Attributes:
        id: The server's id of the generation.
        adapter: The adapter, or what names a weighted sum; None of the base model.
        version: The adapter's version; None of the base model and of a sum.
        choices: The texts.
        usage: Tokens of the prompt, counted once, and of all texts.
        prompt_logprobs: One row for each token of the prompt where they were asked for, else None.
    """

    id: str
    adapter: str | None
    version: int | None
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: list[ScoredToken] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_choice(cls, value: Any) -> Any:
        """The server's answer with a single text has no `choices`: the text's fields are its own."""
        if not isinstance(value, dict) or "choices" in value:
            return value
        outer = {name: field for name, field in value.items() if name not in _OF_A_CHOICE}
        choice = {name: field for name, field in value.items() if name in _OF_A_CHOICE}
        return outer | {"choices": [choice]}

    @property
    def text(self) -> str:
        """The first text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the first text."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the first text ended."""
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or token that ended the first text."""
        return self.choices[0].stop_reason

    @property
    def logprobs(self) -> list[ScoredToken] | None:
        """The log-probabilities of the first text."""
        return self.choices[0].logprobs


class GenerateEvent(Answer):
    """One event of a stream: the added text and tokens. The last event of each text adds none, and has the usage.

    Attributes:
        index: Which of the `n` texts.
        finish_reason: None but in the last event of a text.
        usage: None but in the last event of a text.
    """

    id: str
    adapter: str | None
    version: int | None
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None
    index: int = 0
    stop_reason: str | int | None = None
    logprobs: list[ScoredToken] | None = None


class Classification(Answer):
    """The most likely label of one input, and the probability of each label."""

    label: str
    probabilities: dict[str, float]


class LabelSet(Answer):
    """The labels of one input that may have several or none, and the probability of each label on its own."""

    labels: list[str]
    probabilities: dict[str, float]


class Score(Answer):
    """The number of one input."""

    score: float


class Span(Answer):
    """A part of one input: its first character, the one after its last, its label, how sure it is, and its text."""

    start: int
    end: int
    label: str
    score: float
    text: str


class Spans(Answer):
    """The spans of one input. `truncated`: the input is longer than 64 windows; its rest has no spans."""

    spans: list[Span]
    truncated: bool


class Classified(Answer):
    """What one adapter says of inputs, in their order. `version` is None of a weighted sum.

    `results` are of the adapter's task: `Classification` or `LabelSet` (classify and image-classify, one or several
    labels an input), `Score` (regress), `Spans` (token-classify).
    """

    adapter: str
    version: int | None
    results: list[Classification] | list[LabelSet] | list[Score] | list[Spans]


class ClassifiedEach(Answer):
    """Inputs classified by several adapters, in the adapters' order."""

    adapters: list[Classified]


def _vector(value: Any) -> Any:
    """The numbers of a vector that is base64 of little-endian float32."""
    if not isinstance(value, str):
        return value
    numbers = array("f")
    numbers.frombytes(base64.b64decode(value, validate=True))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


class Embedding(Answer):
    """The vector of one input, of float32 values."""

    index: int
    embedding: Annotated[list[float], BeforeValidator(_vector)]


class EmbeddingUsage(Answer):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    """One vector for each input, in their order."""

    model: str
    data: list[Embedding]
    usage: EmbeddingUsage

    @property
    def vectors(self) -> list[list[float]]:
        """The vectors alone: (inputs, hidden size)."""
        return [row.embedding for row in self.data]


class PublishedAdapter(Answer):
    """What an upload published. `warnings` says what an import left out."""

    adapter: str
    version: int
    digest: str
    warnings: list[str] = []


class AdapterSummary(Answer):
    """The latest version of one adapter, as a list shows it."""

    adapter: str
    version: int
    digest: str
    task: Task
    method: str
    base: str
    labels: list[str] | None
    ranks: list[int]
    splits: list[int]
    modules: int
    has_chat_template: bool
    parameters: int
    bytes: int
    created_at: str
    tier: Literal["device", "host", "store"]
    pinned: bool


class AdapterDetail(AdapterSummary):
    """One version of an adapter with its whole configuration."""

    versions: list[int]
    aliases: dict[str, int]
    config: dict[str, JsonValue]


class AdapterPage(Answer):
    """A part of the list of adapters. `next` is the `after` of the next page, and None on the last one."""

    adapters: list[AdapterSummary]
    next: str | None


class DeletedAdapter(Answer):
    """What was deleted."""

    adapter: str
    deleted: bool


class PinnedAdapter(Answer):
    """Which version of an adapter is pinned, or is no more."""

    adapter: str
    version: int
    pinned: bool


class Model(Answer):
    """The base, or an adapter. `created` is in seconds since 1970."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    task: Task


class ModelPage(Answer):
    """A part of the list of models. Where `has_more`, `last_id` is the `after` of the next page."""

    data: list[Model]
    has_more: bool
    last_id: str | None


class Health(Answer):
    """The server's process answers."""

    status: str


class Readiness(Answer):
    """The server takes requests. `store` says whether uploads can be stored: writable, full or read_only."""

    status: str
    store: str
