"""The task image-classify: a pooled state of an image tower, a linear head, cross-entropy over the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sera_serve.base import FrozenBase, Pooling
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import attached_layers
from sera_serve.layers.attach import replace_module
from sera_serve.trainer.data.image_batches import ImageRows
from sera_serve.trainer.data.images import ImageExamples, load_image_classify_data
from sera_serve.trainer.data.labelled import ImageExample
from sera_serve.trainer.heads import HeadModel
from sera_serve.trainer.model import new_head
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks.classify import label_metrics
from sera_serve.trainer.tasks.multi_label import multi_label_metrics
from sera_serve.trainer.tasks.protocol import TaskKind, TrainingTask

# Path of a dual base's image tower.
DUAL_TOWER = "vision_model."
# Images of one evaluation batch.
_EVAL_BATCH = 64


class ImageClassifyTask(TrainingTask):
    """Task image-classify. Without an adapter, the states of the frozen tower are computed once.

    With sets of labels, each label has a sigmoid of its own, and the loss is the binary cross-entropy.
    """

    def __init__(self, settings: TrainSettings, base: FrozenBase, data: ImageExamples[Any], max_length: int) -> None:
        """Make the task.

        Args:
            settings: Options of the run.
            base: A vision or dual base, with the adapter attached.
            data: The rows, with a label each, or a set of labels.
            max_length: For tasks on texts.

        Raises:
            InvalidConfiguration: The base takes no images, or the pooling is for text.
        """
        tower, spec = base.image_tower, data.spec or base.image_spec
        if tower is None or spec is None:
            raise InvalidConfiguration(
                f"base {base.name} takes no images; take a ViT, DeiT or CLIP base, or --task classify for text",
                param="base",
            )
        pooling = settings.pooling or "cls"
        if pooling not in ("cls", "mean"):
            raise InvalidConfiguration(f"--pooling {pooling} is not for images; take cls or mean", param="pooling")
        self.base = base
        self.labels = data.labels
        self.multi_label = settings.multi_label
        self.pooling: Pooling = pooling
        self.image_spec = spec
        self._index = {label: i for i, label in enumerate(data.labels)}
        self.notes = list(data.notes)
        adapted = settings.adapter_config() is not None
        if adapted:
            self._keep_the_tower()
        head = new_head(base, len(data.labels))
        loss = functional.binary_cross_entropy_with_logits if self.multi_label else functional.cross_entropy

        def rows_of(part: Sequence[ImageExample[Any]], seed: int | None = None) -> ImageRows:
            fields = [{"labels": self._target(row)} for row in part]
            return ImageRows(data.images, [row.image for row in part], fields, spec, seed)

        rows = rows_of(data.train, settings.augment_seed), rows_of(data.eval), rows_of(data.test)
        self.model = HeadModel(base if adapted else None, head, loss, pooling, settings.dropout)
        parts: Sequence[Sequence[Any]] = rows if adapted else [self._features(part) for part in rows]
        self.train_rows, self.eval_rows, self.test_rows = parts
        self.lengths = [1] * len(data.train)
        self.train_tokens = tower.tokens * len(data.train)

    def _target(self, row: ImageExample[Any]) -> int | list[float]:
        """The index of a row's label; of a set of labels, 1 for each label that is in it."""
        if self.multi_label:
            return [float(label in row.target) for label in self.labels]
        return self._index[row.target]

    def _keep_the_tower(self) -> None:
        """Take the adapter from layers that no image passes on its way to the head: a dual base's text tower."""
        layers = attached_layers(self.base.model)
        idle = [path for path in layers if self.base.kind == "dual" and not path.startswith(DUAL_TOWER)]
        if idle and len(idle) == len(layers):
            raise InvalidConfiguration(
                f"--target-modules names no layer of the image tower of base {self.base.name}, such as {idle[0]}; take "
                "names that begin with vision_model",
                param="target_modules",
            )
        for path in idle:
            replace_module(self.base.model, path, layers[path].base)
        if idle:
            self.notes.append(f"{len(idle)} layers that no image passes are not adapted, such as {idle[0]}")

    @torch.no_grad()
    def _features(self, rows: ImageRows) -> list[dict[str, Any]]:
        features: list[dict[str, Any]] = []
        for batch in _batches(len(rows)):
            pixels = rows.pixels(batch).to(self.base.device)
            states = self.base.pooled_images(pixels, self.pooling).float().cpu()
            features += [{"features": state, **rows.fields[i]} for i, state in zip(batch, states, strict=True)]
        return features

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Build the tensors of one batch: the keyword arguments of the model."""
        field = "features" if "features" in rows[0] else "pixel_values"
        return {
            field: torch.stack([row[field] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    @torch.no_grad()
    def logits(self, rows: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Compute logits, float32 (rows, labels), and the true classes, int64 (rows,) or float32 (rows, labels)."""
        self.model.eval()
        logits, truth = [], []
        for batch in _batches(len(rows)):
            inputs = self.collate([rows[i] for i in batch])
            truth.append(inputs["labels"])
            found = self.model(**{name: tensor.to(self.base.device) for name, tensor in inputs.items()})
            logits.append(found["logits"].cpu())
        return torch.cat(logits), torch.cat(truth)

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute mean loss in nats, accuracy, macro F1 over the labels that occur, and Matthews correlation.

        Of sets of labels: micro F1 and the part of rows whose labels are all right, in place of accuracy and Matthews.
        """
        logits, truth = self.logits(rows)
        return multi_label_metrics(logits, truth) if self.multi_label else label_metrics(logits, truth)

    def bundle_fields(self) -> dict[str, Any]:
        """Labels, pooling, and the preprocessing of images, as training used them."""
        fields = {"labels": self.labels, "pooling": self.pooling, "image": self.image_spec}
        return fields | {"multi_label": self.multi_label}


def _batches(count: int) -> list[range]:
    return [range(start, min(start + _EVAL_BATCH, count)) for start in range(0, count, _EVAL_BATCH)]


IMAGE_CLASSIFY = TaskKind(load=load_image_classify_data, build=ImageClassifyTask, takes_images=True)
