"""The task retrieve: images and captions in one space, the triplet loss with hard negatives, and recall@k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sera_serve.base import FrozenBase, ModelInputs
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.image_batches import ImageRows
from sera_serve.trainer.data.images import ImageExamples, load_retrieve_data
from sera_serve.trainer.data.labelled import ImageExample
from sera_serve.trainer.data.token_rows import by_length
from sera_serve.trainer.model import AdapterModel
from sera_serve.trainer.recall import mean_cosine, retrieval_metrics, triplet_loss
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks.protocol import TaskKind, TrainingTask

# Images, or captions, of one evaluation batch.
_EVAL_BATCH = 64
# Mean cosine of different images from which they are one point to the loss. A base that was trained has less.
_ONE_POINT = 0.95
_COLLAPSED = (
    "after an epoch the embeddings of all images were nearly the same: the hardest negatives pull them to one "
    "point, where the loss is twice the margin and recall is chance; try a lower learning rate"
)


class RetrieverModel(AdapterModel):
    """Two adapted towers, and the triplet loss of their embeddings."""

    def __init__(self, base: FrozenBase, margin: float) -> None:
        super().__init__(base, None)
        self.frozen = base
        self.margin = margin

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, groups: Tensor
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch of pairs.

        Args:
            pixel_values: float32 (rows, 3, height, width).
            input_ids: int64 (rows, length), right-padded: the caption of each image.
            attention_mask: (rows, length), 1 at real tokens.
            groups: int64 (rows,): equal numbers are the same image.
        """
        images = self.frozen.image_embeddings(pixel_values)
        texts = self.frozen.text_embeddings(input_ids, attention_mask)
        return {"loss": triplet_loss(images, texts, groups, self.margin)}


class RetrieveTask(TrainingTask):
    """Task retrieve. A training row is one caption and its image, so an image with five captions has five rows."""

    def __init__(self, settings: TrainSettings, base: FrozenBase, data: ImageExamples[str], max_length: int) -> None:
        """Make the task.

        Args:
            settings: Options of the run.
            base: A dual base, with the adapter attached.
            data: The rows.
            max_length: Tokens of the longest caption; longer ones are cut.

        Raises:
            InvalidConfiguration: The base has no two towers.
        """
        spec = data.spec or base.image_spec
        if base.kind != "dual" or base.image_tower is None or spec is None:
            raise InvalidConfiguration(
                f"base {base.name} does not embed images and texts into one space; take a CLIP base", param="base"
            )
        self.base = base
        self.image_spec = spec
        self.max_length = max_length
        self.margin = settings.margin
        self.notes = list(data.notes)
        self.model = RetrieverModel(base, self.margin)
        self._images = data.images
        self._group = {
            image: i for i, image in enumerate(dict.fromkeys(r.image for r in data.train + data.eval + data.test))
        }
        train = self._rows(data.train, "training", settings.augment_seed)
        self.train_rows = train
        self.eval_rows = self._rows(data.eval, "evaluation")
        self.test_rows = self._rows(data.test, "test")
        self.lengths = [len(row["inputs"]) for row in train.fields]
        self.train_tokens = sum(self.lengths) + base.image_tower.tokens * len(self.lengths)

    def _rows(self, part: list[ImageExample[str]], name: str, augment_seed: int | None = None) -> ImageRows:
        captions = [row.target for row in part]
        tokens: list[list[int]] = self.base.tokenizer(captions, verbose=False)["input_ids"] if captions else []
        cut = sum(len(ids) > self.max_length for ids in tokens)
        if cut:
            self.notes.append(f"{cut} of {len(part)} {name} captions were cut to {self.max_length} tokens")
            # The tokenizer's own truncation keeps the closing token, whose state is the embedding.
            tokens = self.base.tokenizer(captions, truncation=True, max_length=self.max_length)["input_ids"]
        fields = [
            {"inputs": ModelInputs.of(ids), "group": self._group[row.image]}
            for ids, row in zip(tokens, part, strict=True)
        ]
        return ImageRows(self._images, [row.image for row in part], fields, self.image_spec, augment_seed)

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Build the tensors of one batch: the keyword arguments of the model."""
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            **self.base.pad([row["inputs"] for row in rows], torch.device("cpu")),
            "groups": torch.tensor([row["group"] for row in rows]),
        }

    @torch.no_grad()
    def embeddings(self, rows: ImageRows) -> tuple[NDArray[np.float32], NDArray[np.float32], list[int]]:
        """Embed each different image and each caption of `rows`.

        Returns:
            Images (images, width) in the order of their first rows, captions (rows, width), the image of each caption.
        """
        self.model.eval()
        groups = [row["group"] for row in rows.fields]
        first = {group: i for i, group in reversed(list(enumerate(groups)))}
        order = sorted(first.values())
        images = [
            self.base.image_embeddings(rows.pixels(order[start : start + _EVAL_BATCH]).to(self.base.device))
            for start in range(0, len(order), _EVAL_BATCH)
        ]
        width = images[0].shape[1]
        texts = torch.empty(len(groups), width)
        for batch in by_length([len(row["inputs"]) for row in rows.fields], _EVAL_BATCH):
            inputs = self.base.pad([rows.fields[i]["inputs"] for i in batch])
            texts[batch] = self.base.text_embeddings(**inputs).float().cpu()
        place = {groups[row]: i for i, row in enumerate(order)}
        return torch.cat(images).float().cpu().numpy(), texts.numpy(), [place[group] for group in groups]

    def evaluate(self, rows: Sequence[Any]) -> dict[str, float]:
        """Compute recall@1, 5 and 10 both ways, their sum, and the loss; see `retrieval_metrics`."""
        assert isinstance(rows, ImageRows)
        images, texts, owners = self.embeddings(rows)
        if mean_cosine(images) > _ONE_POINT and _COLLAPSED not in self.notes:
            self.notes.append(_COLLAPSED)
        return retrieval_metrics(images, texts, owners, self.margin)

    def bundle_fields(self) -> dict[str, Any]:
        """The preprocessing of images, and the length to which the server truncates texts, as training did."""
        return {"image": self.image_spec, "max_length": self.max_length}


RETRIEVE = TaskKind(load=load_retrieve_data, build=RetrieveTask, takes_images=True)
