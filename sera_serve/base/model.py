"""A frozen base model with its tokenizer, its identity, and its hidden states of texts and images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from adapters_store import (
    AdapterBundle,
    AdapterConfig,
    BaseInfo,
    ImageSpec,
    NotMergeable,
    Pooling,
    WrongTask,
    check_base,
    dense_factors,
)
from sera_serve.base.image_tower import BaseKind, ImageTower, hidden_size_of, image_tower, pool_image_states
from sera_serve.base.preprocess import ModelInputs, Preprocessor
from sera_serve.base.rotary import (
    RotaryContext,
    RotaryScaling,
    rotary_context,
    rotary_scaling,
    row_lengths,
    shared_tensors,
)
from sera_serve.errors import UnsupportedTask
from sera_serve.layers import adaptable_linears, linear_widths
from sera_serve.layers.quantized_linear import QuantizedLinear
from sera_serve.quantization import QuantizationKind


@dataclass(frozen=True)
class FrozenBase:
    """A base model with frozen weights, its tokenizer, and its identity.

    Attributes:
        name: The source of the base: "embedded", the last part of a path, or a hub id.
        model: The model, in evaluation mode, with every parameter frozen.
        text_tokenizer: The base's tokenizer, with a padding token; None for a vision base, which reads no text.
        info: The fingerprint that adapters carry. It is computed before any change of dtype.
        kind: A decoder generates, and classifies on the last token; an encoder classifies; a vision base, such as ViT,
            classifies images; a dual base, such as CLIP, embeds images and texts into one space.
        image_spec: The base's own preprocessing of images; None for a base that takes none.
    """

    name: str
    model: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerBase | None
    info: BaseInfo
    kind: BaseKind
    image_spec: ImageSpec | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            UnsupportedTask: The base reads no text.
        """
        if self.text_tokenizer is None:
            raise UnsupportedTask(
                f"base {self.name!r} takes images and no text; send images, or serve a base that reads text",
                param="model",
            )
        return self.text_tokenizer

    @property
    def reads_text(self) -> bool:
        """Whether the base takes texts."""
        return self.text_tokenizer is not None

    @cached_property
    def image_tower(self) -> ImageTower | None:
        """The shape of the tower for images; None for a base that takes none."""
        return image_tower(self.model.config) if self.kind in ("vision", "dual") else None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return cast(torch.device, self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return cast(torch.dtype, self.model.dtype)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states. A classifier head's rows have the same width: that of a dual base's images."""
        return hidden_size_of(self.model.config)

    @property
    def embedding_size(self) -> int:
        """Width of an embedding: of a dual base, that of the space that both towers embed into."""
        return int(self.model.config.projection_dim) if self.kind == "dual" else self.hidden_size

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the base was made for. Dynamic rotary scaling begins beyond it.

        Of a vision base, the tokens of one image. Of a dual base, the longest text.
        """
        if self.text_tokenizer is None:
            return self._tower().tokens
        limits = [self._num_positions]
        # Tokenizers without a limit say 1e30.
        limits.append(self.tokenizer.model_max_length)
        return int(min(limit for limit in limits if limit is not None))

    @cached_property
    def _num_positions(self) -> int | None:
        """Tokens that the base has positions for; None where nothing bounds them. Every request asks."""
        most: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        table = next(
            (module for name, module in self.model.named_modules() if name.endswith("position_embeddings")), None
        )
        padding = getattr(table, "padding_idx", None)
        # RoBERTa's kind counts a text's positions from the one after that of padding.
        return most if most is None or padding is None else most - padding - 1

    @cached_property
    def preprocessor(self) -> Preprocessor:
        """Turns the texts of requests into tokens; raises UnsupportedTask for a base that reads no text."""
        return Preprocessor(self.model, self.tokenizer, self.kind)

    @cached_property
    def rotary(self) -> RotaryScaling:
        """Whether the rotary frequencies depend on a sequence's length, and from which length on."""
        return rotary_scaling(self.model, self.name)

    @cached_property
    def rotary_context(self) -> RotaryContext | None:
        """Where a batch says which of its tokens use the long frequencies. None if the base needs no such choice."""
        return rotary_context(self.model)

    @property
    def default_pooling(self) -> Pooling:
        """Pooling of a classifier whose adapter names none."""
        return "last_token" if self.kind == "decoder" else "cls"

    @property
    def quantization(self) -> QuantizationKind | None:
        """How the weights of the linear layers are kept, or None if they are not quantized."""
        found = (layer.kind for layer in self.model.modules() if isinstance(layer, QuantizedLinear))
        return next(found, None)

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (d_in, d_out) of every linear layer that an adapter may adapt, by dotted path."""
        return {path: linear_widths(module) for path, module in adaptable_linears(self.model).items()}

    def pad(
        self, rows: Sequence[ModelInputs], device: torch.device | None = None, shape: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Pad rows on the right into one batch.

        Args:
            rows: Texts.
            device: Where the batch goes; None is the base's.
            shape: Rows and tokens of the batch, at least as many as there are; None is as many. Rows of padding have no
                real token.

        Returns:
            The keyword arguments of `hidden_states`, each int64 of that shape: `input_ids`, `attention_mask`, and
            `token_type_ids` if a row has them.
        """
        shape = shape or (len(rows), max(map(len, rows)))
        columns = {
            # Some tokenizers have no padding token. Nothing looks at what the mask hides.
            "input_ids": np.full(shape, self.tokenizer.pad_token_id or 0, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
        }
        if any(row.token_type_ids for row in rows):
            columns["token_type_ids"] = np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            length = len(row)
            columns["input_ids"][index, :length] = row.input_ids
            columns["attention_mask"][index, :length] = 1
            if row.token_type_ids:
                columns["token_type_ids"][index, :length] = row.token_type_ids
        there = device or self.device
        return {name: torch.from_numpy(column).to(there, non_blocking=True) for name, column in columns.items()}

    def pad_images(self, rows: Sequence[ModelInputs]) -> Tensor:
        """Put the pixels of image rows into one batch (rows, 3, height, width), on the base's device, in its dtype."""
        pixels = np.stack([row.pixels for row in rows if row.pixels is not None])
        return torch.from_numpy(pixels).to(self.device, self.dtype, non_blocking=True)

    def pooled_states(
        self, input_ids: Tensor, attention_mask: Tensor, pooling: Pooling, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Compute one vector a row from the last hidden states.

        Args:
            input_ids: int64 (rows, length), right-padded.
            attention_mask: (rows, length), 1 at real tokens.
            pooling: The state of the last real token, of the first token, or the mean over the real tokens.
            token_type_ids: int64 (rows, length), or None for segment 0 throughout.

        Returns:
            (rows, hidden_size), in the base's dtype.
        """
        return pool_states(self.hidden_states(input_ids, attention_mask, token_type_ids), attention_mask, pooling)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Compute the last hidden states (rows, length, hidden_size); arguments as in `pooled_states`.

        Each row gets the rotary frequencies of its own length, not those of the longest row.
        """
        if self.kind == "dual":
            backbone = self.model.get_submodule("text_model")
        else:
            backbone = self.model.base_model if self.kind == "decoder" else self.model
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.kind == "decoder":
            # No token follows: a cache would copy the keys and values of every layer, and keep them until the end.
            inputs["use_cache"] = False
        with row_lengths(self.rotary_context, attention_mask):
            states: Tensor = backbone(**inputs).last_hidden_state
        return states

    def image_states(self, pixel_values: Tensor) -> Tensor:
        """Compute the last states of an image tower, after its last layer normalisation.

        transformers' CLIP normalises the state of the class token alone. Here every token is normalised, so that the
        mean over the patches is of the same scale as the class token.

        Args:
            pixel_values: (rows, 3, height, width), normalised as the adapter's or the base's `ImageSpec` says.

        Returns:
            (rows, tokens, hidden_size). The class token is the first; DeiT's token of distillation the second.

        Raises:
            UnsupportedTask: The base takes no images.
        """
        self._tower()
        if self.kind == "vision":
            states: Tensor = self.model(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
            return states
        tower = self.model.get_submodule("vision_model")
        last = tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        return cast(Tensor, tower.get_submodule("post_layernorm")(last))

    def pooled_images(self, pixel_values: Tensor, pooling: Pooling) -> Tensor:
        """Compute one vector an image (rows, hidden_size); see `image_states` and `pool_image_states`."""
        return pool_image_states(self.image_states(pixel_values), pooling, self._tower().prefix_tokens)

    def image_embeddings(self, pixel_values: Tensor) -> Tensor:
        """Embed images: of a dual base the projected class token, as `get_image_features`; of a vision base its state.

        Returns:
            (rows, embedding_size), not normalised to length 1.

        Raises:
            UnsupportedTask: The base takes no images.
        """
        return self.project_image(self.image_states(pixel_values)[:, 0])

    def text_embeddings(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts with a dual base: the projected state of the end token, as `get_text_features`.

        Args:
            input_ids: int64 (rows, length), right-padded.
            attention_mask: (rows, length), 1 at real tokens.

        Returns:
            (rows, embedding_size), not normalised to length 1.

        Raises:
            UnsupportedTask: The base does not have two towers.
        """
        return self.project_text(self.text_pooled(input_ids, attention_mask))

    def text_pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The state of each text's end token in a dual base (rows, text width); see `text_embeddings`."""
        if self.kind != "dual":
            raise UnsupportedTask(
                f"base {self.name!r} does not embed texts and images into one space; serve a CLIP base", param="model"
            )
        tower = self.model.get_submodule("text_model")
        return cast(Tensor, tower(input_ids=input_ids, attention_mask=attention_mask).pooler_output)

    def project_text(self, pooled: Tensor) -> Tensor:
        """Project pooled states of texts into the shared space of a dual base."""
        return cast(Tensor, self.model.get_submodule("text_projection")(pooled))

    def project_image(self, pooled: Tensor) -> Tensor:
        """Project pooled states of images into the shared space of a dual base. A vision base has none."""
        if self.kind != "dual":
            return pooled
        return cast(Tensor, self.model.get_submodule("visual_projection")(pooled))

    def share_weights(self) -> FrozenBase:
        """Make a second model object over the same weights, so that each can be wrapped and configured on its own."""
        memo = {id(tensor): tensor for tensor in shared_tensors(self.model)}
        return replace(self, model=copy.deepcopy(self.model, memo))

    def _tower(self) -> ImageTower:
        if self.image_tower is None:
            raise UnsupportedTask(
                f"base {self.name!r} takes text and no images; send text, or serve a ViT, DeiT or CLIP base",
                param="model",
            )
        return self.image_tower


def pool_states(states: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Reduce (rows, length, hidden) to (rows, hidden); see `FrozenBase.pooled_states`."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "mean":
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)
    last = attention_mask.sum(1) - 1
    return states[torch.arange(len(states), device=states.device), last]


def check_task(config: AdapterConfig, base: FrozenBase) -> None:
    """Check that a base serves an adapter's task: images on a vision base, images and retrieval on a dual one.

    Raises:
        WrongTask: It does not, or the adapter's images are of another size than the base's.
    """
    tower = base.image_tower
    served = {"vision": ("image-classify",), "dual": ("image-classify", "retrieve")}.get(base.kind)
    if served is None and config.task not in ("image-classify", "retrieve"):
        return
    if served is None or config.task not in served:
        takes = " and ".join(served or ("tasks of text",))
        raise WrongTask(
            f"the adapter is for {config.task}, and base {base.name!r}, of kind {base.kind}, serves {takes}; publish "
            "it on a server of its own base",
            param="task",
        )
    spec = config.image
    if spec is not None and tower is not None and (spec.height, spec.width) != (tower.height, tower.width):
        raise WrongTask(
            f"image has {spec.height} x {spec.width} pixels, and the base reads {tower.height} x {tower.width}; train "
            "the adapter with the base's own size",
            param="image",
        )


def check_length(config: AdapterConfig, base: FrozenBase) -> None:
    """Check that a base has positions for the longest texts of an adapter.

    Raises:
        WrongTask: It has fewer.
    """
    if config.max_length is not None and config.max_length > base.max_length:
        raise WrongTask(
            f"max_length is {config.max_length}, and base {base.name!r} reads {base.max_length} tokens; give at most "
            "as many",
            param="max_length",
        )


def merge_adapter(base: FrozenBase, bundle: AdapterBundle) -> None:
    """Merge an adapter into the weights and biases of its layers, in place: W' = diag(gain) (W + scaling * A C B).

    b' = gain * b + offset. Both are computed in float64 and rounded once, to the parameter's dtype. A classifier's head
    is not merged.

    Raises:
        WrongBase, UnknownModule, WrongShape: The adapter was made for another base. No weight is changed.
        NotMergeable: The adapter has an offset for a layer without a bias, or the base is quantized. No weight is
            changed.
    """
    if base.quantization is not None:
        raise NotMergeable(
            f"the base is quantized to {base.quantization}, and rounding would change the adapter; load the base "
            "without --quantize to merge",
            param="quantize",
        )
    check_base(bundle.config, base.info, base.module_shapes())
    layers = {path: base.model.get_submodule(path) for path in bundle.config.modules}
    for path, layer in layers.items():
        offset = bundle.tensors.get(f"{path}.offset")
        if offset is not None and offset.any() and getattr(layer, "bias", None) is None:
            raise NotMergeable(
                f"layer {path!r} of the base has no bias that the adapter's offset could be merged into; a model of "
                "the same architecture cannot hold it: serve the adapter instead",
                param=f"{path}.offset",
            )
    with torch.no_grad():
        for path, layer in layers.items():
            weight = layer.get_parameter("weight")
            delta = dense_factors(bundle, path).delta_weight().to(weight.device)
            # nn.Linear stores (d_out, d_in), GPT-2's Conv1D (d_in, d_out).
            is_transposed = isinstance(layer, Conv1D)
            merged = weight.double() + (delta if is_transposed else delta.T)
            gain, offset = (bundle.tensors.get(f"{path}.{name}") for name in ("gain", "offset"))
            if gain is not None:
                gain = gain.to(weight.device).double()
                merged *= gain if is_transposed else gain[:, None]
            weight.copy_(merged.to(weight.dtype))
            if getattr(layer, "bias", None) is not None:
                bias = layer.get_parameter("bias")
                shifted = bias.double() if gain is None else gain * bias.double()
                if offset is not None:
                    shifted = shifted + offset.to(bias.device).double()
                bias.copy_(shifted.to(bias.dtype))
