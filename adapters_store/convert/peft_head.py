"""Fifth stage of an import: the classifier's head, whose layout depends on the architecture of the base.

The layouts are those of transformers' `...ForSequenceClassification` and `...ForImageClassification` models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.convert.import_base import ImportBase
from adapters_store.convert.peft_config import PeftConfig
from adapters_store.convert.peft_errors import UnsupportedAdapter
from adapters_store.convert.peft_layers import PeftLayer, TensorReader
from adapters_store.errors import InvalidConfig, MissingTensor, WrongShape
from adapters_store.format.config import Activation, HeadSpec, Pooling

Shape = tuple[int, ...]

# Rows of a head without names of labels. A bundle's configuration of 1 MiB holds no more made-up names; zeros in an
# archive of 1 MB may have millions of rows.
_MAX_UNNAMED = 1 << 16


@dataclass(frozen=True)
class _Layout:
    """Where the two layers of an architecture's head are.

    Attributes:
        dense: The first layer in the checkpoint, or None if it is a layer of the base.
        activation: What follows the first layer.
        projection: The layer that gives the logits.
        base_layer: The first layer as a layer of the base.
    """

    dense: str | None
    activation: Activation
    projection: str
    base_layer: str | None = None


_POOLED = _Layout(None, "tanh", "classifier", "pooler.dense")
_TANH = _Layout("classifier.dense", "tanh", "classifier.out_proj")
_GELU = _Layout("classifier.dense", "gelu", "classifier.out_proj")
# By the class of the base. Each pools the state of the first token.
_LAYOUTS: dict[str, _Layout] = {
    "BertModel": _POOLED,
    "AlbertModel": _Layout(None, "tanh", "classifier", "pooler"),
    "RobertaModel": _TANH,
    "XLMRobertaModel": _TANH,
    "CamembertModel": _TANH,
    "MPNetModel": _TANH,
    "ElectraModel": _GELU,
    "DistilBertModel": _Layout("pre_classifier", "relu", "classifier"),
    "DebertaV2Model": _Layout("pooler.dense", "gelu", "classifier"),
}


@dataclass(frozen=True)
class PeftHead:
    """A classifier's head.

    Attributes:
        spec: The hidden layer, or None for one linear layer.
        tensors: Under the names of a bundle.
        labels: As many as the projection has rows.
        pooling: Which hidden state it reads.
    """

    spec: HeadSpec | None
    tensors: dict[str, Tensor]
    labels: tuple[str, ...]
    pooling: Pooling


@dataclass(frozen=True)
class HeadKeys:
    """A head whose tensors' shapes are checked, and of which none is read: the tensors by their names.

    Attributes:
        layout: Where the architecture has its layers; None for a head of one linear layer.
        dense: Weight and bias of the hidden layer; None where it is the base's own, or there is none.
        weight: The projection's weight, (labels, width).
        bias: The projection's bias, (labels,); None is zeros.
        labels: As many as the projection has rows.
        pooling: Which hidden state the head reads.
        elements: Elements of the weights in a bundle.
    """

    layout: _Layout | None
    dense: tuple[str, str] | None
    weight: str
    bias: str | None
    labels: tuple[str, ...]
    pooling: Pooling
    elements: int

    @property
    def base_layer(self) -> str | None:
        """The layer of the base whose LoRA goes into the head; None where the head has none."""
        return None if self.layout is None else self.layout.base_layer


def match_head(
    reader: TensorReader,
    keys: Mapping[str, str],
    config: PeftConfig,
    base: ImportBase,
    labels: tuple[str, ...] | None,
) -> HeadKeys | None:
    """Find the tensors of a checkpoint's head, and check their shapes. No tensor is read.

    Args:
        reader: The checkpoint's tensors.
        keys: Names of the head's tensors, by their names in the model for the task.
        config: The configuration.
        base: The base.
        labels: Names of the labels, or None for LABEL_0, LABEL_1 and so on.

    Returns:
        The head; None for an adapter that generates.

    Raises:
        UnsupportedAdapter: The head has another form than a bundle can hold, or none is there for a classifier.
        MissingTensor, WrongShape, InvalidConfig: A tensor or the labels are wrong.
    """
    if not keys:
        if config.task_type == "SEQ_CLS":
            raise MissingTensor(
                "task_type is SEQ_CLS, and the checkpoint has no classifier (score or classifier); add the name of the "
                "head to modules_to_save, and train again",
                param="adapter_config.modules_to_save",
            )
        return None
    pooling: Pooling
    if base.kind == "decoder":
        layout, pooling = None, "last_token"
        projection = "score"
    elif base.kind == "vision":
        # ViT's and DeiT's classifiers read the class token after the last normalisation, as the base gives it.
        layout, projection, pooling = None, "classifier", "cls"
    elif base.kind == "dual":
        raise UnsupportedAdapter(
            f"classifiers of {base.info.architecture} read the mean of the patches before the last normalisation, and "
            "the server after it; train one with train_adapter --task image-classify, or import an adapter without a "
            "head",
            param=next(iter(keys.values())),
        )
    else:
        layout = _LAYOUTS.get(base.info.architecture)
        if layout is None:
            raise UnsupportedAdapter(
                f"the layout of classifiers of {base.info.architecture} is not known; known are those of "
                f"{', '.join(_LAYOUTS)}",
                param=next(iter(keys.values())),
            )
        projection, pooling = layout.projection, "cls"
    left = dict(keys)
    width = base.info.hidden_size
    elements = 0
    dense = None
    if layout is not None:
        dense, width = _match_first_layer(reader, left, layout, base)
        elements = width * base.info.hidden_size
    weight = _take(reader, left, f"{projection}.weight", (None, width))
    rows = reader.shape(weight)[0]
    elements += rows * width
    # Decoders' `score` has no bias.
    bias_name = f"{projection}.bias"
    bias = _take(reader, left, bias_name, (rows,)) if bias_name in left else None
    if left:
        name = next(iter(left.values()))
        raise UnsupportedAdapter(
            f"tensor {name!r} is no part of the head of {base.info.architecture}; name the base that the adapter was "
            "trained on",
            param=name,
        )
    if not labels and rows > _MAX_UNNAMED:
        raise UnsupportedAdapter(
            f"the head has {rows} rows, and no id2label names them; the most without it is {_MAX_UNNAMED}",
            param="adapter_config.id2label",
        )
    names = labels or tuple(f"LABEL_{index}" for index in range(rows))
    _check_labels(names, rows)
    return HeadKeys(layout, dense, weight, bias, names, pooling, elements)


def read_head(reader: TensorReader, keys: HeadKeys, base: ImportBase, layers: dict[str, PeftLayer]) -> PeftHead:
    """Read the head of a checkpoint. A LoRA on the pooler of the base is taken from `layers` and goes into the head.

    Args:
        reader: The checkpoint's tensors.
        keys: The tensors of the head.
        base: The base.
        layers: The adapted layers, by path; changed in place.

    Raises:
        NotFinite: A tensor has NaN or infinity, or a row of a layer with DoRA has the length 0.
    """
    tensors: dict[str, Tensor] = {}
    spec = None
    if keys.layout is not None:
        dense, dense_bias = _first_layer(reader, keys, base, layers)
        spec = HeadSpec(activation=keys.layout.activation, width=len(dense))
        tensors |= {"head.dense.weight": dense, "head.dense.bias": dense_bias}
    weight = reader.read(keys.weight)
    bias = torch.zeros(len(weight)) if keys.bias is None else reader.read(keys.bias)
    tensors |= {"head.weight": weight, "head.bias": bias.to(weight.dtype)}
    return PeftHead(spec, tensors, keys.labels, keys.pooling)


def _match_first_layer(
    reader: TensorReader, keys: dict[str, str], layout: _Layout, base: ImportBase
) -> tuple[tuple[str, str] | None, int]:
    """Names of weight (width, hidden) and bias (width,) of the hidden layer, None where it is the base's; its width."""
    path = layout.dense or layout.base_layer
    assert path is not None
    # A checkpoint may carry a pooler of its own.
    if layout.dense is not None or f"{path}.weight" in keys:
        weight = _take(reader, keys, f"{path}.weight", (None, base.info.hidden_size))
        width = reader.shape(weight)[0]
        return (weight, _take(reader, keys, f"{path}.bias", (width,))), width
    if path not in base.shapes or not base.weight(path).any():
        raise UnsupportedAdapter(
            f"the head of {base.info.architecture} reads the pooler of the base, and this base has none; load the base "
            "from a checkpoint with its pooler",
            param="base",
        )
    return None, base.shapes[path][1]


def _first_layer(
    reader: TensorReader, keys: HeadKeys, base: ImportBase, layers: dict[str, PeftLayer]
) -> tuple[Tensor, Tensor]:
    """Weight (width, hidden) and bias (width,) of the head's hidden layer."""
    path = keys.base_layer
    if keys.dense is not None:
        weight, bias = (reader.read(name) for name in keys.dense)
    else:
        assert path is not None
        found = base.bias(path)
        weight = base.weight(path).cpu().float()
        bias = torch.zeros(len(weight)) if found is None else found.cpu().float()
    layer = None if path is None else layers.pop(path, None)
    if layer is None:
        return weight, bias
    gain, offset = layer.gain_and_offset(weight, bias)
    merged = weight.double() + layer.scaling * (layer.b.double() @ layer.a.double())
    if gain is not None:
        merged = gain.double()[:, None] * merged
        return merged.float(), bias
    return merged.float(), bias if offset is None else bias + offset


def _take(reader: TensorReader, keys: dict[str, str], name: str, shape: tuple[int | None, ...]) -> str:
    """Take the tensor of that name in the model for the task from `keys`, check its shape, and give its name."""
    if name not in keys:
        raise MissingTensor(
            f"the checkpoint has no {name}, which its classifier needs and which is no part of the base; add "
            f"{name.rpartition('.')[0].partition('.')[0]!r} to modules_to_save, and train again",
            param=name,
        )
    key = keys.pop(name)
    found = reader.shape(key)
    if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise WrongShape(f"tensor {key!r} has shape {found}; the base takes ({wanted})", param=key)
    return key


def _check_labels(labels: tuple[str, ...], rows: int) -> None:
    if rows < 2:
        raise UnsupportedAdapter(
            "the head has one output: a regression, which an import does not carry over; train one with train_adapter "
            "--task regress",
            param="head",
        )
    if len(labels) != rows or len(set(labels)) != rows:
        raise InvalidConfig(
            f"id2label has {len(set(labels))} different labels, the head has {rows} rows; correct id2label",
            param="adapter_config.id2label",
        )
