"""Constraints: which tokens may come next, so that a generated text conforms to a schema, a regex or a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

ConstraintKind = Literal["json_object", "json_schema", "regex", "grammar", "tool_calls"]

FIELDS: dict[ConstraintKind, str] = {
    "json_object": "response_format",
    "json_schema": "response_format.json_schema.schema",
    "regex": "regex",
    "grammar": "grammar",
    "tool_calls": "tools",
}
"""The request field that each kind of constraint comes from."""

MAX_SCHEMA_CHARACTERS = 1 << 16
"""Characters of a schema's canonical JSON."""
MAX_REGEX_CHARACTERS = 4096
MAX_GRAMMAR_CHARACTERS = 1 << 14


@dataclass(frozen=True)
class ConstraintSpec:
    """What a client asked for.

    Attributes:
        kind: What the text must be. `tool_calls` is any text in which each `<tool_call>` is followed by the JSON of a
            call and by `</tool_call>`.
        text: The canonical JSON of the schema, the regex, or the grammar; empty for `json_object`. The schema of
            `tool_calls` is that of one call.
    """

    kind: ConstraintKind
    text: str = ""


class TokenConstraint(Protocol):
    """The state of one request's constraint. One thread at a time: `fill` may take long, and the others may not."""

    def fill(self, allowed: NDArray[np.uint32]) -> None:
        """Write which tokens may come next.

        Args:
            allowed: uint32 (ceil(vocabulary / 32),), written whole. Bit i of word w is token 32 w + i; 1 is allowed. An
                end token is allowed where the text may end.
        """

    def accept(self, token: int) -> None:
        """Note the token that came next; it was allowed."""

    def is_ended(self) -> bool:
        """Whether only an end token may follow."""
