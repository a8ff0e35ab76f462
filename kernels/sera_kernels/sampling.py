# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The choice of each row's next token on a GPU: two Triton launches read the logits once, or a few times in part.

The first launch splits each row into tiles of `TILE` scores, and a program reduces a tile: its highest score, its best
score with noise, the sum of its exponentials, and the highest score of each chunk of `CHUNK` scores. The second launch
has a program for each row. It combines the tiles.

Nothing is sorted. The chunks' highest scores give a lower bound of the least score that top-k or top-p keeps: the k-th
highest of them is at most the k-th highest score, and they have at most the mass of all scores above the same value.
Chunks with a score at or above the bound are listed, and only listed chunks are read again. Then:

* A row with top-k bisects over the scores' bits for the threshold. Each pass over the listed chunks also moves both
  ends to the next score that exists. The best kept score with noise wins.
* Any other row starts from the tiles' best scores with noise, without limits. If the mass above the best of them is
  less than top-p, and min-p keeps the token, the token wins, after one pass. Else its tile is read again for its best
  score above the token's, and so on. From the ninth pass on, bisection bounds the number of passes.

The noise, the scale and the comparisons are those of `sera_serve.engine.sampling`. The order of additions differs, and
the logarithms may differ in their last bit.

The grids follow from shapes alone, no operation is atomic, and the host reads no values. CUDA graphs can hold both
launches. Triton 3.6 or newer is required. Without a GPU, the kernels run if TRITON_INTERPRET=1 was set before this
module is imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

TILE = 2048
"""Scores that a program of the first launch reduces."""
CHUNK = 32
"""Scores of a chunk. A smaller chunk makes the bound tighter and the list of maxima longer."""
LISTED_TILE = 128
"""Chunks that the second launch reads at a time for a row with top-k, whose list is short."""
TRIAL_TILE = 512
"""The same for other rows, whose list may be all chunks."""
GUESSES = 8
"""Passes of a row without top-k before bisection starts."""
REDUCE_WARPS = 8
FINISH_WARPS = 16
FIGURES = 4
"""Figures that the first launch writes for each tile."""

# Above every key and every token, and below every key.
_TOO_FAR = tl.constexpr(0x7FFFFFFF)
_TOO_LOW = tl.constexpr(-0x80000000)
_GREEDY_BELOW = tl.constexpr(1e-6)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# Of a count of tokens: the token is in the prompt.
_IN_PROMPT = tl.constexpr(1 << 30)
# One number a row: their places in a static step's buffer have any alignment, and no other is worth a compilation.
_BY_ROW = ["temperature", "top_k", "top_p", "min_p", "keys", "repetition", "frequency", "presence"]
# The rows of `figures`.
_HIGHEST, _BEST, _BEST_LOGIT, _MASS = (tl.constexpr(i) for i in range(FIGURES))


def choose_tokens_triton(
    logits: Tensor,
    limits: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor] | None,
    truncate: bool,
    penalties: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
) -> Tensor:
    """Return the next token of each row, int64 (rows,), or -1 where the scores are not finite.

    `sera_serve.engine.sampling.choose_tokens` defines the semantics, and its arguments are the same.

    Args:
        logits: (rows, vocabulary), float32, bfloat16 or float16, contiguous in the last dimension.
        limits: temperature, top_k, top_p, min_p, keys: (rows,) each. None if all rows are greedy.
        truncate: Whether any row limits its tokens.
        penalties: counts (rows, vocabulary), repetition, frequency, presence (rows,).
        bias: float32 (rows, vocabulary).
    """
    rows, vocabulary = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return tokens
    temperature, top_k, top_p, min_p, keys = limits or (None,) * 5
    counts, repetition, frequency, presence = penalties or (None,) * 4
    splits = triton.cdiv(vocabulary, TILE)
    limited = limits is not None and truncate
    # With bias or penalties, large tiles would not fit the registers.
    plain = counts is None and bias is None
    figures = torch.empty(rows, FIGURES, splits, dtype=torch.float32, device=device)
    found = torch.empty(rows, 2, splits, dtype=torch.int32, device=device)
    chunks = splits * (TILE // CHUNK)
    maxima = torch.empty(rows, chunks, dtype=torch.float32, device=device) if limited else None
    listed = torch.empty(rows, chunks, dtype=torch.int32, device=device) if limited else None
    # The interpreter has no libdevice, and its logarithm is exact.
    constants = {
        "SAMPLED": limits is not None,
        "LIMITED": limited,
        "CHUNK": CHUNK,
        "TILE": TILE,
        "FIGURES": FIGURES,
        "LIBDEVICE": isinstance(reduce_kernel, triton.JITFunction),
        # A product and a sum in one rounding would give other penalties than the CPU.
        "enable_fp_fusion": False,
    }
    shared = (
        logits, logits.stride(0), vocabulary, temperature, top_k, top_p, min_p, keys,
        counts, counts.stride(0) if counts is not None else 0, repetition, frequency, presence,
        bias, bias.stride(0) if bias is not None else 0,
        figures, found, maxima,
    )  # fmt: skip
    with torch.cuda.device_of(logits):
        reduce_kernel[(splits, rows)](*shared, num_warps=REDUCE_WARPS, **constants)
        finish_kernel[(rows,)](
            *shared, listed, tokens,
            SPLITS=splits,
            SPLITS_BLOCK=triton.next_power_of_2(splits),
            CHUNKS_BLOCK=triton.next_power_of_2(chunks),
            LISTED_TILE=LISTED_TILE if plain else LISTED_TILE // 2,
            TRIAL_TILE=TRIAL_TILE if plain else LISTED_TILE // 2,
            GUESSES=GUESSES,
            num_warps=FINISH_WARPS if limited else 1,
            **constants,
        )  # fmt: skip
    return tokens


@triton.jit
def _scores(source, at, inside):
    """The scores of the tokens `at`, with bias and penalties; -inf where not `inside`.

    `source` is the row, the vocabulary, and the kernel's arguments from which scores come.
    """
    row, _, logits, row_stride, counts, counts_stride, repetition, frequency, presence, bias, bias_stride = source
    wide = row.to(tl.int64)
    x = tl.load(logits + wide * row_stride + at, mask=inside, other=-float("inf")).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + wide * bias_stride + at, mask=inside, other=0.0)
    if counts is not None:
        count = tl.load(counts + wide * counts_stride + at, mask=inside, other=0)
        factor = tl.load(repetition + row)
        x = tl.where(count != 0, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + factor), x * factor), x)
        output = (count & (_IN_PROMPT - 1)).to(tl.float32)
        x = x - tl.load(frequency + row) * output
        x = tl.where(output > 0, x - tl.load(presence + row), x)
    return x


@triton.jit
def _log(x, LIBDEVICE: tl.constexpr):
    # Triton's own logarithm is bad near 1 on a GPU, and the largest noise comes from there.
    return libdevice.log(x) if LIBDEVICE else tl.log(x)


@triton.jit
def _hash(key, tokens):
    """The 23 bits that `gumbel_noise` of `sera_serve.engine.sampling` makes its noise from; `tokens` are int32."""
    product = key.to(tl.int64) * 0x9E3779B1 + (tokens + 1).to(tl.int64) * 0x85EBCA77
    h = (product ^ (product >> 32)).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return (h ^ (h >> 16)) >> 9


@triton.jit
def _noise(bits, LIBDEVICE: tl.constexpr):
    uniform = (bits.to(tl.float32) + 0.5) * (2.0**-23)
    return -_log(-_log(uniform, LIBDEVICE), LIBDEVICE)


@triton.jit
def _quick_noise(bits):
    """The noise to 2e-5, by the hardware's logarithm to base 2."""
    from_one = (bits | 0x3F800000).to(tl.float32, bitcast=True)
    uniform = (from_one - 1.0) + 2.0**-24
    rest = (2.0 - from_one) - 2.0**-24
    # Near 1, the logarithm's absolute error is too much: its series in 1 - uniform.
    series = rest * (1.0 + rest * (0.5 + rest * (1 / 3 + rest * 0.25)))
    return tl.log2(tl.where(rest < 0.0625, series, tl.log2(uniform) * -_LN2)) * -_LN2


@triton.jit
def _best_with_noise(x, at, keep, t, key, LIBDEVICE: tl.constexpr):
    """The best of scores `x` / t + noise where `keep`, its token, and its score without noise; -inf if there is none.

    The noise of all tokens is computed to 2e-5. Most often that leaves one token, whose exact noise is computed.
    """
    bits = _hash(key, at)
    quick = tl.where(keep, x * (1.0 / t) + _quick_noise(bits), -float("inf"))
    ahead = tl.max(quick)
    # Rounding of the products is relative to the score, and noise is less than 17.
    near = keep & ((quick >= ahead - (1e-4 + (tl.abs(ahead) + 20.0) * 1e-6)) | (quick == ahead))
    number = tl.sum(near.to(tl.int32))
    best = tl.full((), -float("inf"), tl.float32)
    token = tl.max(tl.where(near, at, 0))
    logit = tl.max(tl.where(near, x, -float("inf")))
    if number == 1:
        best = tl.div_rn(logit, t) + _noise(_hash(key, token), LIBDEVICE)
    if number > 1:
        noisy = tl.where(near, tl.div_rn(x, tl.zeros_like(x) + t) + _noise(bits, LIBDEVICE), -float("inf"))
        best = tl.max(noisy)
        token = tl.min(tl.where(near & (noisy == best), at, _TOO_FAR))
        logit = tl.max(tl.where(at == token, x, -float("inf")))
    return best, token, logit


@triton.jit
def _key(x):
    """int32 in the order of float32 `x`."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """The mean of two int32, rounded down."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _limits(row, vocabulary, top_k, top_p):
    """top_k (the vocabulary if all are kept) and top_p."""
    k = tl.load(top_k + row)
    return tl.where((k > 0) & (k < vocabulary), k, vocabulary), tl.load(top_p + row)


@triton.jit
def _highest(x):
    """The highest of all elements, not a number if any of them is not."""
    return tl.where(tl.max((x != x).to(tl.int32)) > 0, float("nan"), tl.max(x))


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _mass(x, highest, scale):
    """exp((x - highest) / temperature); `scale` is log2(e) / temperature."""
    return tl.exp2((x - highest) * scale)


@triton.jit(do_not_specialize_on_alignment=_BY_ROW)
def reduce_kernel(
    logits, row_stride, vocabulary, temperature, top_k, top_p, min_p, keys,
    counts, counts_stride, repetition, frequency, presence, bias, bias_stride,
    figures, found, maxima,
    SAMPLED: tl.constexpr, LIMITED: tl.constexpr,
    CHUNK: tl.constexpr, LIBDEVICE: tl.constexpr, TILE: tl.constexpr, FIGURES: tl.constexpr,
):  # fmt: skip
    """Reduce one tile of one row."""
    split, row, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    source = (
        row, vocabulary, logits, row_stride,
        counts, counts_stride, repetition, frequency, presence, bias, bias_stride,
    )  # fmt: skip
    at = split * TILE + tl.arange(0, TILE)
    x = _scores(source, at, at < vocabulary)
    highest = _highest(x)
    figures += row * FIGURES * splits + split
    found += row * 2 * splits + split
    tl.store(figures + _HIGHEST * splits, highest)
    tl.store(found, tl.min(tl.where(x == highest, at, _TOO_FAR)))
    if SAMPLED:
        t = tl.load(temperature + row)
        if t >= _GREEDY_BELOW:
            by_count = False
            if LIMITED:
                k, p = _limits(row, vocabulary, top_k, top_p)
                by_count = k < vocabulary
                if by_count | (p < 1.0):
                    mass = tl.where(x == -float("inf"), 0.0, _mass(x, highest, _LOG2E / t))
                    tl.store(figures + _MASS * splits, tl.sum(mass))
                    chunks: tl.constexpr = TILE // CHUNK
                    first = (row * splits + split) * chunks
                    tl.store(maxima + first + tl.arange(0, chunks), tl.max(tl.reshape(x, (chunks, CHUNK)), 1))
            if not by_count:
                best, token, logit = _best_with_noise(x, at, at < vocabulary, t, tl.load(keys + row), LIBDEVICE)
                tl.store(figures + _BEST * splits, best)
                tl.store(figures + _BEST_LOGIT * splits, logit)
                tl.store(found + splits, token)


@triton.jit
def _listed_scores(start, many, listed, source, CHUNK: tl.constexpr, LISTED_TILE: tl.constexpr):
    """The scores (LISTED_TILE, CHUNK) of listed chunks from the `start`-th on, and their tokens."""
    index = start + tl.arange(0, LISTED_TILE)
    chunk = tl.load(listed + index, mask=index < many, other=0)
    at = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x = _scores(source, at, (index < many)[:, None] & (at < source[1]))
    return x, at


@triton.jit
def _above(pivot, highest, scale, many, listed, source, CHUNK: tl.constexpr, LISTED_TILE: tl.constexpr):
    """Of the listed scores: how many keys are above `pivot`, their mass, the least of them, and the greatest other."""
    number = tl.zeros((LISTED_TILE, CHUNK), tl.int32)
    mass = tl.zeros((LISTED_TILE, CHUNK), tl.float32)
    least = tl.full((LISTED_TILE, CHUNK), _TOO_FAR, tl.int32)
    greatest = tl.full((LISTED_TILE, CHUNK), _TOO_LOW, tl.int32)
    for start in range(0, many, LISTED_TILE):
        x = _listed_scores(start, many, listed, source, CHUNK, LISTED_TILE)[0]
        keys = _key(x)
        above = keys > pivot
        number += above.to(tl.int32)
        mass += tl.where(above, _mass(x, highest, scale), 0.0)
        least = tl.minimum(least, tl.where(above, keys, _TOO_FAR))
        greatest = tl.maximum(greatest, tl.where(above, _TOO_LOW, keys))
    return tl.sum(number), tl.sum(mass), tl.min(least), tl.max(greatest)


@triton.jit
def _list_chunks(maxima, chunks, listed, k, target, highest, scale, CHUNKS_BLOCK: tl.constexpr):
    """List the chunks that matter; return their number, and the bound below which no score is kept, as a key.

    The bound is the least key with fewer than `k` of the chunks' highest scores above it, and less mass than `target`.
    """
    chunk = tl.arange(0, CHUNKS_BLOCK)
    x = tl.load(maxima + chunk, mask=chunk < chunks, other=-float("inf"))
    keys = _key(x)
    masses = tl.where(x > -float("inf"), _mass(x, highest, scale), 0.0)
    lowest = _key(tl.full((), -float("inf"), tl.float32))
    low, high = lowest - 1, _key(highest)
    middle = _middle(low, high)
    while middle != low:
        above = keys > middle
        if (tl.sum(above.to(tl.int32)) < k) & (tl.sum(tl.where(above, masses, 0.0)) < target):
            high = tl.maximum(tl.max(tl.where(above, _TOO_LOW, keys)), low + 1)
        else:
            low = tl.min(tl.where(above, keys, _TOO_FAR)) - 1
        middle = _middle(low, high)
    # Scores a few bits lower may be equal after the division by the temperature.
    bound = tl.maximum(high - 8, lowest)
    take = (keys >= bound) & (chunk < chunks)
    tl.store(listed + tl.cumsum(take.to(tl.int32), 0) - 1, chunk, mask=take)
    # Other threads of this program read the list.
    tl.debug_barrier()
    return tl.sum(take.to(tl.int32)), bound


@triton.jit
def _choose_by_count(
    many, bound, listed, source, t, k, p, floor, key, highest,
    CHUNK: tl.constexpr, LISTED_TILE: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """The best score with noise, and its token, of a row with top-k: find the threshold, then draw."""
    scale = _LOG2E / t
    low, high = bound - 1, _key(highest)
    number_limit, mass_limit = k, float("inf")
    phases = tl.where(p < 1.0, 2, 1)
    for _phase in range(phases):
        # The least key with fewer scores above it than one limit, and less mass than the other.
        high = _key(highest)
        number_above, mass_above = 0, 0.0
        middle = _middle(low, high)
        while middle != low:
            number, mass, least, greatest = _above(middle, highest, scale, many, listed, source, CHUNK, LISTED_TILE)
            if (number < number_limit) & (mass < mass_limit):
                high = tl.maximum(greatest, low + 1)
                number_above, mass_above = number, mass
            else:
                low = least - 1
            middle = _middle(low, high)
        # top-p applies to the k likeliest. Scores equal to the last one count as often as there is room for them.
        mass_limit = p * (mass_above + (k - number_above).to(tl.float32) * _mass(_value(high), highest, scale))
        number_limit = _TOO_FAR
        low = high - 1
    threshold = tl.maximum(tl.div_rn(_value(high), t), floor)
    best = -float("inf")
    best_token = 0
    for start in range(0, many, LISTED_TILE):
        x, at = _listed_scores(start, many, listed, source, CHUNK, LISTED_TILE)
        keep = tl.div_rn(x, tl.zeros_like(x) + t) >= threshold
        score, token, _logit = _best_with_noise(x, at, keep, t, key, LIBDEVICE)
        # Chunks are listed in order: among equals the lowest token comes first.
        if score > best:
            best, best_token = score, token
    return best, best_token


@triton.jit
def _last_equal(x, t):
    """The key of the highest float32 that gives the same as `x` when divided by `t`. At most four are equal."""
    key = _key(x)
    scaled = tl.div_rn(x, t)
    for _ in tl.static_range(3):
        key = tl.where(tl.div_rn(_value(key + 1), t) == scaled, key + 1, key)
    return key


@triton.jit
def _choose_by_trial(
    split, bests, tokens, best_logits, many, bound, listed, source, t, target, floor, key, highest,
    SPLITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, TRIAL_TILE: tl.constexpr, GUESSES: tl.constexpr,
    LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """The best score with noise, and its token, of a row without top-k: try the best token, else leave it out.

    `bests`, `tokens` and `best_logits` are of each tile's best token.
    """
    scale = _LOG2E / t
    # Tokens with keys up to `low` are left out, those from `high` on are kept unless they are below `floor`.
    low, high = bound - 1, tl.where(target < float("inf"), _key(highest), bound)
    passes, rounds = 0, 0
    score = tl.max(bests)
    token = tl.min(tl.where(bests == score, tokens, _TOO_FAR))
    logit = tl.max(tl.where(tokens == token, best_logits, -float("inf")))
    pivot = _last_equal(logit, t)
    low_score = tl.div_rn(logit, t) < floor
    # At most GUESSES + 32 passes, and all tiles read again after each. A program that does not end would stop the GPU.
    while ((pivot < high) | low_score) & (rounds < (GUESSES + 33) * (SPLITS + 1)):
        rounds += 1
        if (pivot <= low) | low_score:
            tile = token // TILE
            at = (tile * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK))[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            x = _scores(source, at, at < source[1])
            keep = (_key(x) > low) & (tl.div_rn(x, tl.zeros_like(x) + t) >= floor)
            new_best, new_token, new_logit = _best_with_noise(x, at, keep, t, key, LIBDEVICE)
            bests = tl.where(split == tile, new_best, bests)
            tokens = tl.where(split == tile, new_token, tokens)
            best_logits = tl.where(split == tile, new_logit, best_logits)
        else:
            if passes >= GUESSES:
                pivot = _middle(low, high)
            mass = _above(pivot, highest, scale, many, listed, source, CHUNK, TRIAL_TILE)[1]
            if mass < target:
                high = pivot
            else:
                low = pivot
            passes += 1
        score = tl.max(bests)
        token = tl.min(tl.where(bests == score, tokens, _TOO_FAR))
        logit = tl.max(tl.where(tokens == token, best_logits, -float("inf")))
        pivot = _last_equal(logit, t)
        low_score = tl.div_rn(logit, t) < floor
    return score, token


@triton.jit(do_not_specialize_on_alignment=_BY_ROW)
def finish_kernel(
    logits, row_stride, vocabulary, temperature, top_k, top_p, min_p, keys,
    counts, counts_stride, repetition, frequency, presence, bias, bias_stride,
    figures, found, maxima, listed, tokens,
    SAMPLED: tl.constexpr, LIMITED: tl.constexpr,
    CHUNK: tl.constexpr, LIBDEVICE: tl.constexpr, TILE: tl.constexpr, FIGURES: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr, CHUNKS_BLOCK: tl.constexpr,
    LISTED_TILE: tl.constexpr, TRIAL_TILE: tl.constexpr, GUESSES: tl.constexpr,
):  # fmt: skip
    """Choose the token of one row."""
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS_BLOCK)
    there = split < SPLITS
    figures += row * FIGURES * SPLITS + split
    found += row * 2 * SPLITS + split
    highs = tl.load(figures + _HIGHEST * SPLITS, mask=there, other=-float("inf"))
    highest = _highest(highs)
    token = tl.min(tl.where(highs == highest, tl.load(found, mask=there, other=_TOO_FAR), _TOO_FAR))
    score = highest
    if SAMPLED:
        t = tl.load(temperature + row)
        top = tl.div_rn(highest, tl.maximum(t, _GREEDY_BELOW))
        # The search below ends only if the highest score is finite.
        score = tl.where(t >= _GREEDY_BELOW, top, highest)
        if (t >= _GREEDY_BELOW) & _finite(top):
            bests = tl.load(figures + _BEST * SPLITS, mask=there, other=-float("inf"))
            best_tokens = tl.load(found + SPLITS, mask=there, other=_TOO_FAR)
            if LIMITED:
                source = (
                    row, vocabulary, logits, row_stride,
                    counts, counts_stride, repetition, frequency, presence, bias, bias_stride,
                )  # fmt: skip
                key = tl.load(keys + row)
                k, p = _limits(row, vocabulary, top_k, top_p)
                by_count = k < vocabulary
                floor = tl.full((), -float("inf"), tl.float32)
                if min_p is not None:
                    least = tl.load(min_p + row)
                    if least > 0.0:
                        floor = tl.minimum(top, top + _log(least, LIBDEVICE))
                target = tl.full((), float("inf"), tl.float32)
                many = 0
                bound = _key(target * -1.0)
                chunks: tl.constexpr = SPLITS * (TILE // CHUNK)
                listed += row * chunks
                if by_count | (p < 1.0):
                    scale = _LOG2E / t
                    if not by_count:
                        mass = tl.load(figures + _MASS * SPLITS, mask=there, other=0.0)
                        target = p * tl.sum(tl.where(mass > 0, mass * _mass(highs, highest, scale), 0.0))
                    # Of the k likeliest tokens, none may be missing. Sums in another order differ by less than 1e-5.
                    many, bound = _list_chunks(
                        maxima + row * chunks, chunks, listed, k, target * 1.00001, highest, scale, CHUNKS_BLOCK
                    )
                if by_count:
                    score, token = _choose_by_count(
                        many, bound, listed, source, t, k, p, floor, key, highest, CHUNK, LISTED_TILE, LIBDEVICE
                    )
                else:
                    best_logits = tl.load(figures + _BEST_LOGIT * SPLITS, mask=there, other=-float("inf"))
                    score, token = _choose_by_trial(
                        split, bests, best_tokens, best_logits, many, bound, listed, source,
                        t, target, floor, key, highest, SPLITS, TILE, CHUNK, TRIAL_TILE, GUESSES, LIBDEVICE,
                    )  # fmt: skip
            else:
                score = tl.max(bests)
                token = tl.min(tl.where(bests == score, best_tokens, _TOO_FAR))
    chosen = _finite(highest) & _finite(score)
    tl.store(tokens + row, tl.where(chosen, token, -1).to(tl.int64))
