"""Count-based baselines for the embedded base: a token unigram and an interpolated modified Kneser-Ney model.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 4. A token id
has 12 bits, so five of them pack into one int64 with the newest token lowest: sorting the packed n-grams also sorts
their contexts, and every table look-up is a binary search over all positions at once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TOKEN_BITS = 12
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def pack(tokens: npt.NDArray[np.uint16], order: int) -> Ints:
    """The n-gram ending at each position from ``order - 1`` on; shape (len(tokens) - order + 1,)."""
    packed = np.zeros(len(tokens) - order + 1, dtype=np.int64)
    for offset in range(order):
        packed = (packed << TOKEN_BITS) | tokens[offset : offset + len(packed)].astype(np.int64)
    return packed


def look_up(keys: Ints, wanted: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Index of each ``wanted`` in the sorted ``keys``, and whether it is there."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return index, keys[index] == wanted


@dataclass(frozen=True)
class OrderTable:
    """One order's n-grams (sorted) with discounted counts, and its contexts with totals and left-over mass."""

    grams: Ints
    discounted: Floats
    contexts: Ints
    totals: Floats
    left_over: Floats

    @classmethod
    def build(cls, grams: Ints, counts: Ints) -> "OrderTable":
        """Discount ``counts`` (raw ones at the highest order, continuation counts below)."""
        n1, n2, n3, n4 = (max(int(np.count_nonzero(counts == k)), 1) for k in (1, 2, 3, 4))
        base = n1 / (n1 + 2 * n2)
        discounts = np.clip([0.0, 1 - 2 * base * n2 / n1, 2 - 3 * base * n3 / n2, 3 - 4 * base * n4 / n3], 0, None)
        discount = discounts[np.minimum(counts, 3)]
        contexts, starts = np.unique(grams >> TOKEN_BITS, return_index=True)
        totals = np.add.reduceat(counts, starts).astype(np.float64)
        left_over = np.add.reduceat(discount, starts)
        return cls(grams, np.maximum(counts - discount, 0.0), contexts, totals, left_over / totals)

    def interpolate(self, grams: Ints, lower: Floats) -> Floats:
        """Probability of each gram's last token: this order's share plus the left-over mass times ``lower``."""
        context, known = look_up(self.contexts, grams >> TOKEN_BITS)
        gram, seen = look_up(self.grams, grams)
        share = np.where(seen, self.discounted[gram] / self.totals[context], 0.0)
        return np.where(known, share + self.left_over[context] * lower, lower)


class KneserNey:
    """Interpolated modified Kneser-Ney over token ids below 4,096; ``order`` is at most 5."""

    def __init__(self, tokens: npt.NDArray[np.uint16], order: int = 5, vocabulary: int = 4096):
        self.order, self.vocabulary = order, vocabulary
        grams, counts = np.unique(pack(tokens, order), return_counts=True)
        tables = [OrderTable.build(grams, counts)]
        for shorter in range(order - 1, 0, -1):
            suffixes = grams & ((1 << TOKEN_BITS * shorter) - 1)
            grams, counts = np.unique(suffixes, return_counts=True)
            tables.append(OrderTable.build(grams, counts))
        self.tables = tables[::-1]

    def log2_probabilities(self, tokens: npt.NDArray[np.uint16]) -> Floats:
        """log2 p of each token from position ``order - 1`` on, given the ``order - 1`` before it."""
        packed = pack(tokens, self.order)
        probability = np.full(len(packed), 1.0 / self.vocabulary)
        for length, table in enumerate(self.tables, start=1):
            probability = table.interpolate(packed & ((1 << TOKEN_BITS * length) - 1), probability)
        result: Floats = np.log2(probability)
        return result


def unigram_log2_probabilities(
    training: npt.NDArray[np.uint16], tokens: npt.NDArray[np.uint16], vocabulary: int = 4096
) -> Floats:
    """log2 p of each token by its add-one-smoothed share of the training tokens."""
    counts = np.bincount(training, minlength=vocabulary) + 1.0
    result: Floats = np.log2(counts / counts.sum())[tokens]
    return result
