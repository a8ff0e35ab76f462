"""What an import must know of the base model that an adapter is imported for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adapters_store.format.config import BaseInfo, ImageSpec


@dataclass(frozen=True)
class ImportBase:
    """A base model as an importer sees it. Its callables block, and read weights where they lie.

    Attributes:
        info: The identity that the imported bundle carries.
        kind: A decoder generates, and classifies on the last token; an encoder classifies; vision and dual take images.
        shapes: (d_in, d_out) of every linear layer that an adapter may adapt, by dotted path.
        prefix: The name of this model within a model for a task, such as `roberta`; may be empty.
        vocab_size: Rows of the input embedding; 0 for a base that reads no text.
        chat_template: The chat template of the base's tokenizer, or None.
        weight: The weight (d_out, d_in) of the layer at a path of `shapes`, on its own device.
        bias: The bias (d_out,) of that layer, or None where it has none.
        image: The base's own preprocessing of images; None for a base that takes none.
    """

    info: BaseInfo
    kind: Literal["decoder", "encoder", "vision", "dual"]
    shapes: Mapping[str, tuple[int, int]]
    prefix: str
    vocab_size: int
    chat_template: str | None
    weight: Callable[[str], Tensor]
    bias: Callable[[str], Tensor | None]
    image: ImageSpec | None = None
