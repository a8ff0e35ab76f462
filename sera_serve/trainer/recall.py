"""Image-text retrieval: the triplet loss of training, and recall@k of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

RECALLS = (1, 5, 10)
# Similarities that differ by less are equal: equal vectors may get other last bits in a matrix product.
_TIE = 1e-12
# Images, or captions, that are compared with everything at once.
_BLOCK = 512


def triplet_loss(images: Tensor, texts: Tensor, groups: Tensor, margin: float) -> Tensor:
    """Compute the max-of-hinges loss with the hardest negative of the batch, in both directions.

    For a pair (i, c) with s the cosine similarity, i' the hardest other image and c' the hardest other caption:
    max(0, margin + s(i, c') - s(i, c)) + max(0, margin + s(i', c) - s(i, c)). Source: Faghri et al., "VSE++: Improving
    Visual-Semantic Embeddings with Hard Negatives", BMVC 2018, equation 6. Rows of the same image are no negatives of
    each other, as its captions are all true.

    Args:
        images: (rows, width), the image embedding of each pair, of any length.
        texts: (rows, width), its caption's.
        groups: int64 (rows,): equal numbers are the same image.
        margin: At most 2, the range of s.

    Returns:
        The mean over the rows; 0 where the batch has no negatives.
    """
    similarity = functional.normalize(images.float(), dim=-1) @ functional.normalize(texts.float(), dim=-1).T
    matched = similarity.diagonal()
    others = similarity.masked_fill(groups[:, None] == groups[None, :], -torch.inf)
    by_image = (margin + others.amax(1) - matched).clamp(min=0)
    by_text = (margin + others.amax(0) - matched).clamp(min=0)
    return (by_image + by_text).mean()


def retrieval_metrics(
    images: NDArray[np.float32], texts: NDArray[np.float32], image_of: Sequence[int], margin: float
) -> dict[str, float]:
    """Compute recall@1, 5 and 10 in both directions, their sum, and the loss with the whole set as one batch.

    A query's recall@k is 1 if a true match is among its k most similar items, by cosine similarity. `i2t` has the
    images as queries, any caption of which is a true match; `t2i` has the captions. A false item that is as similar as
    the best match comes before it. So embeddings that are all equal find nothing.

    Args:
        images: (images, width), of any length. Every image has at least one caption.
        texts: (captions, width).
        image_of: The image of each caption.
        margin: Of the loss; see `triplet_loss`.

    Returns:
        `loss`, `i2t_r1`, `i2t_r5`, `i2t_r10`, `t2i_r1`, `t2i_r5`, `t2i_r10`, from 0 to 1, and `rsum`, from 0 to 6.
    """
    unit_images, unit_texts, owner = _unit(images), _unit(texts), np.asarray(image_of)
    numbers = np.arange(len(unit_images))
    image_rank, _, hardest_text = _compared(unit_images, numbers, unit_texts, owner)
    text_rank, matched, hardest_image = _compared(unit_texts, owner, unit_images, numbers)
    hinges = np.maximum(margin + hardest_text[owner] - matched, 0) + np.maximum(margin + hardest_image - matched, 0)
    recalls = {
        f"{direction}_r{k}": float((rank < k).mean())
        for direction, rank in (("i2t", image_rank), ("t2i", text_rank))
        for k in RECALLS
    }
    return {"loss": float(hinges.mean()), **recalls, "rsum": sum(recalls.values())}


def _compared(
    queries: NDArray[np.float64], wanted: NDArray[Any], items: NDArray[np.float64], numbers: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Compare each query with every item. An item is a true match of a query whose `wanted` is its number.

    Returns:
        For each query the false items that come before its best true match, and the similarity of this match and of
        the hardest false item.
    """
    rank, best, hardest = np.empty(len(queries), np.int64), np.empty(len(queries)), np.empty(len(queries))
    for start in range(0, len(queries), _BLOCK):
        block = slice(start, start + _BLOCK)
        similarity = queries[block] @ items.T
        true = wanted[block, None] == numbers[None, :]
        false = np.where(true, -np.inf, similarity)
        best[block] = np.where(true, similarity, -np.inf).max(1)
        rank[block] = (false >= best[block, None] - _TIE).sum(1)
        hardest[block] = false.max(1)
    return rank, best, hardest


def mean_cosine(rows: NDArray[np.float32]) -> float:
    """Compute the mean cosine of different rows (rows, width); 0 with fewer than two."""
    unit = _unit(rows)
    total = unit.sum(0)
    pairs = len(unit) * (len(unit) - 1)
    return float((total @ total - (unit * unit).sum()) / pairs) if pairs else 0.0


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    # A vector of length 0 is similar to nothing: all its similarities are 0.
    unit: NDArray[np.float64] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
    return unit
