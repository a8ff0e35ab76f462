"""The triplet loss and recall@k, against sums by hand and against plain loops."""

import numpy as np
import pytest
import torch

from sera_serve.trainer import recall
from sera_serve.trainer.recall import mean_cosine, retrieval_metrics, triplet_loss


def angles(*degrees: float) -> np.ndarray:
    """Vectors of the plane, of different lengths, which cosine similarity ignores."""
    radians = np.radians(degrees)
    lengths = np.arange(1, len(degrees) + 1)
    return (np.stack([np.cos(radians), np.sin(radians)], 1) * lengths[:, None]).astype(np.float32)


def test_recall_of_a_case_by_hand() -> None:
    # Images at 0, 90 and 180 degrees. Captions of image 0 at 80 and 5, of image 1 at 95, of image 2 at 100.
    images, texts = angles(0, 90, 180), angles(80, 5, 95, 100)
    found = retrieval_metrics(images, texts, [0, 0, 1, 2], margin=0.2)
    # Images: 0 finds 5 degrees first; 1 finds 95 first; 2 has 100 nearest, which is its own.
    # Captions: 80 is nearest to image 1 (false), then 0; 5 and 95 are right; 100 is nearest to 1 (false), then 2.
    assert [found[f"i2t_r{k}"] for k in (1, 5, 10)] == [1, 1, 1]
    assert [found[f"t2i_r{k}"] for k in (1, 5, 10)] == [0.5, 1, 1]
    assert found["rsum"] == 5.5
    cos = lambda degrees: np.cos(np.radians(degrees))  # noqa: E731
    by_image = [max(0, 0.2 + cos(95) - cos(80)), max(0, 0.2 + cos(95) - cos(5))]
    by_image += [max(0, 0.2 + cos(10) - cos(5)), max(0, 0.2 + cos(85) - cos(80))]
    by_text = [0.2 + cos(10) - cos(80), max(0, 0.2 + cos(85) - cos(5)), max(0, 0.2 + cos(85) - cos(5))]
    by_text += [0.2 + cos(10) - cos(80)]
    assert found["loss"] == pytest.approx((sum(by_image) + sum(by_text)) / 4, abs=1e-7)


@pytest.mark.parametrize("block", [3, 512])
def test_recall_equals_plain_loops(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_BLOCK", block)
    draw = np.random.default_rng(3)
    images = draw.normal(size=(40, 6)).astype(np.float32)
    owner = [i for i in range(40) for _ in range(draw.integers(1, 6))]
    draw.shuffle(owner)
    texts = (images[owner] + draw.normal(size=(len(owner), 6))).astype(np.float32)
    found = retrieval_metrics(images, texts, owner, margin=0.2)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    for k in (1, 5, 10):
        hits = 0
        for i in range(40):
            ranked = sorted(range(len(owner)), key=lambda c: -cosine(images[i], texts[c]))
            hits += any(owner[c] == i for c in ranked[:k])
        assert found[f"i2t_r{k}"] == hits / 40
        hits = 0
        for c in range(len(owner)):
            ranked = sorted(range(40), key=lambda i: -cosine(images[i], texts[c]))
            hits += owner[c] in ranked[:k]
        assert found[f"t2i_r{k}"] == hits / len(owner)
    assert 0 < found["i2t_r1"] < found["i2t_r10"] <= 1


def test_a_false_item_that_ties_comes_first() -> None:
    # Image 1 is a copy of image 0, and captions 0 and 1 are copies: nobody can tell them apart.
    images, texts = angles(30, 30, 170), angles(40, 40, 160)
    found = retrieval_metrics(images, texts, [0, 1, 2], margin=0.2)
    assert (found["i2t_r1"], found["t2i_r1"]) == (1 / 3, 1 / 3)
    assert (found["i2t_r5"], found["t2i_r5"]) == (1, 1)


def test_embeddings_that_are_all_equal_or_zero_find_nothing() -> None:
    for vectors in (np.ones((20, 4), np.float32), np.zeros((20, 4), np.float32)):
        found = retrieval_metrics(vectors, vectors, list(range(20)), margin=0.2)
        assert found["rsum"] == 0


def loops(images: torch.Tensor, texts: torch.Tensor, groups: list[int], margin: float) -> float:
    total = 0.0
    similar = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
    for i, group in enumerate(groups):
        others = [j for j, other in enumerate(groups) if other != group]
        if others:
            total += max(0.0, margin + max(float(similar[i, j]) for j in others) - float(similar[i, i]))
            total += max(0.0, margin + max(float(similar[j, i]) for j in others) - float(similar[i, i]))
    return total / len(groups)


def test_the_loss_takes_the_hardest_negative_and_spares_captions_of_the_same_image() -> None:
    torch.manual_seed(4)
    images, texts = torch.randn(9, 5), torch.randn(9, 5)
    groups = [0, 1, 2, 0, 3, 4, 4, 4, 5]
    found = triplet_loss(images, texts, torch.tensor(groups), 0.3)
    assert float(found) == pytest.approx(loops(images, texts, groups, 0.3), abs=1e-6)
    as_if_different = triplet_loss(images, texts, torch.arange(9), 0.3)
    assert float(as_if_different) != pytest.approx(float(found), abs=1e-3)


def test_the_loss_of_a_batch_without_negatives_is_zero_with_zero_gradients() -> None:
    images, texts = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    loss = triplet_loss(images, texts, torch.zeros(3, dtype=torch.int64), 0.3)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(images.grad, torch.zeros(3, 5))


def test_the_loss_of_the_metrics_is_that_of_training_on_the_whole_set() -> None:
    torch.manual_seed(5)
    images, owner = torch.randn(4, 5), [0, 0, 1, 2, 3, 3]
    texts = torch.randn(6, 5)
    found = retrieval_metrics(images.numpy(), texts.numpy(), owner, 0.4)
    assert found["loss"] == pytest.approx(float(triplet_loss(images[owner], texts, torch.tensor(owner), 0.4)), abs=1e-6)


def test_the_mean_cosine_of_different_rows() -> None:
    assert mean_cosine(angles(0, 90, 180)) == pytest.approx(-1 / 3, abs=1e-6)
    assert mean_cosine(angles(30, 30, 30, 30)) == pytest.approx(1)
    assert mean_cosine(angles(10)) == mean_cosine(angles()) == 0
