"""The choice of each request's next token from a step's logits: adjustments, sampling, and log-probabilities.

Most requests adjust nothing: their rows are sampled in one call, and cost nothing more. Rows with penalties, a bias, a
constraint or barred end tokens are taken out and sampled by their kind, so that tables of the vocabulary's size are
made for them alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sera_serve.engine.loop.masks import MaskThreads, RowMasks
from sera_serve.engine.loop.row_tables import RowTables, to_device
from sera_serve.engine.request import GenerationRequest
from sera_serve.engine.results import LikelyTokens, TokenLogprobs
from sera_serve.engine.sampling import IN_PROMPT, NO_TOKEN, Penalties, SamplingRows, choose_tokens, sampling_keys

# Rows whose bias, penalties or log-probabilities are computed at once: each takes a few tensors of the vocabulary's
# size.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ChosenTokens:
    """What a step's logits gave.

    Attributes:
        tokens: A token for each request, or `NO_TOKEN`.
        failures: Requests that get no token for a reason of their own, with what their clients are told. Their logits
            may be sound.
        postponed: Requests that get their token in a later step, because their masks are not ready.
    """

    tokens: list[int]
    failures: dict[GenerationRequest, Exception] = field(default_factory=dict)
    postponed: set[GenerationRequest] = field(default_factory=set)


class TokenChooser:
    """Chooses tokens for one loop, whose thread alone uses it."""

    def __init__(self, tables: RowTables, vocabulary: int) -> None:
        """Set up for the requests of these tables, and so many logits."""
        self._tables = tables
        self._counts = CountTable(len(tables.seed))
        self._masks = MaskThreads(vocabulary)

    def start(self) -> None:
        """Start the first thread of masks; raises Overloaded where there can be none."""
        self._masks.start()

    def begin(self, requests: Iterable[GenerationRequest]) -> None:
        """Begin a step, and the masks of the requests that get a token by it."""
        # A preempted request has left without a word.
        self.forget_left()
        self._masks.begin(requests)

    def forget_left(self) -> None:
        """Drop what is held for requests that do not run any more."""
        self._counts.prune()
        self._masks.forget_left()

    def close(self) -> None:
        """Begin no mask any more."""
        self._masks.close()

    def choose(
        self, logits: Tensor, requests: Sequence[GenerationRequest], unfinished: set[GenerationRequest]
    ) -> ChosenTokens:
        """Choose the next token of each request, and note its log-probabilities where they are asked for.

        Args:
            logits: (requests, vocabulary).
            requests: In the order of the logits. `begin` was told of those that get a token.
            unfinished: Those whose prompt goes on in a later step. Of their tokens only `NO_TOKEN` has a meaning.
        """
        masks = RowMasks()
        if any(request.adjusts_now for request in requests):
            masks = self._masks_of(logits, requests, unfinished)
            tokens = self._choose_by_kind(logits, requests, unfinished, masks)
            # As of an unfinished prompt, their token only tells whether the logits are sound.
            unfinished = unfinished | masks.postponed
        else:
            tokens = choose_tokens(logits, self._sampling(requests, logits.device)).tolist()
        wanted = [
            (index, request)
            for index, request in enumerate(requests)
            if request.params.logprobs is not None and tokens[index] != NO_TOKEN and request not in unfinished
        ]
        for first in range(0, len(wanted), _ROWS_AT_ONCE):
            block = wanted[first : first + _ROWS_AT_ONCE]
            indices = [index for index, _ in block]
            found = token_logprobs(
                rows_of(logits, indices),
                [tokens[index] for index in indices],
                max(request.params.logprobs or 0 for _, request in block),
            )
            for (index, request), one in zip(block, found, strict=True):
                if one is None:
                    tokens[index] = NO_TOKEN
                else:
                    request.token_logprobs.append(one.of_top(request.params.logprobs or 0))
        return ChosenTokens(tokens, masks.failures, masks.postponed)

    def _masks_of(
        self, logits: Tensor, requests: Sequence[GenerationRequest], unfinished: set[GenerationRequest]
    ) -> RowMasks:
        constrained = [one for one in requests if one.constraint is not None and one not in unfinished]
        if not constrained:
            return RowMasks()

        def wait_for_logits() -> None:
            if logits.is_cuda:
                torch.cuda.current_stream(logits.device).synchronize()

        return self._masks.take(constrained, wait_for_logits)

    def _choose_by_kind(
        self,
        logits: Tensor,
        requests: Sequence[GenerationRequest],
        unfinished: set[GenerationRequest],
        masks: RowMasks,
    ) -> list[int]:
        """The tokens of requests of which some adjust their scores."""
        tokens = [NO_TOKEN] * len(requests)
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for index, request in enumerate(requests):
            if request in masks.failures:
                continue
            is_plain = request in unfinished or request in masks.postponed
            kind = (False, False) if is_plain else (request.has_penalties, request.has_bias_now)
            kinds.setdefault(kind, []).append(index)
        for (has_penalties, has_bias), indices in kinds.items():
            at_once = _ROWS_AT_ONCE if has_penalties or has_bias else len(indices)
            for first in range(0, len(indices), at_once):
                block = indices[first : first + at_once]
                rows = [requests[index] for index in block]
                scores = rows_of(logits, block)
                chosen = choose_tokens(
                    scores,
                    self._sampling(rows, logits.device),
                    self._penalties(rows, scores) if has_penalties else None,
                    bias_of(rows, masks.allowed, scores) if has_bias else None,
                )
                for index, token in zip(block, chosen.tolist(), strict=True):
                    tokens[index] = token
        return tokens

    def _sampling(self, requests: Sequence[GenerationRequest], device: torch.device) -> SamplingRows | None:
        tables = self._tables
        rows = np.array([request.row for request in requests], np.int64)
        if not tables.temperature[rows].any():
            return None
        lengths = np.array([len(request.tokens) for request in requests], np.uint64)
        columns = [tables.temperature, tables.top_k, tables.top_p, tables.min_p]
        temperature, top_k, top_p, min_p = (to_device(column[rows], device) for column in columns)
        keys = to_device(sampling_keys(tables.seed[rows], lengths), device)
        has_min_p = bool(tables.min_p[rows].any())
        return SamplingRows(
            temperature,
            top_k,
            top_p,
            keys,
            min_p if has_min_p else None,
            truncate=bool(tables.truncates[rows].any()),
        )

    def _penalties(self, requests: Sequence[GenerationRequest], scores: Tensor) -> Penalties:
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        asked = [request.params for request in requests]
        repetition, frequency, presence = (
            to_device(np.array([getattr(params, name) for params in asked], np.float32), scores.device)
            for name in names
        )
        counts = self._counts.rows(requests, scores.shape[1], scores.device)
        return Penalties(counts, repetition, frequency, presence)


class CountTable:
    """How often each token of the vocabulary is in a request, for requests with penalties alone.

    The counts follow from the tokens of the request and are brought up to date where they are read. So chunks of the
    prompt, hits of the prefix cache and preemptions, which change no token, change no count.
    """

    def __init__(self, num_rows: int) -> None:
        """Empty, for so many requests at most: the table is made for the first one, and dropped after the last."""
        self._num_rows = num_rows
        self._table: Tensor | None = None
        self._places: dict[GenerationRequest, int] = {}
        self._counted: dict[GenerationRequest, int] = {}

    def prune(self) -> None:
        """Drop the requests that do not run any more."""
        for request in [request for request in self._places if request.row < 0]:
            del self._places[request], self._counted[request]
        if not self._places:
            self._table = None

    def rows(self, requests: Sequence[GenerationRequest], vocabulary: int, device: torch.device) -> Tensor:
        """int32 (requests, vocabulary), the counts as `Penalties` defines them; running requests."""
        table = self._room(requests, vocabulary, device)
        added: list[tuple[int, int]] = []
        for request in requests:
            place = self._places[request]
            counted = self._counted.get(request, 0)
            if not counted:
                table[place] = to_device(counts_of(request, vocabulary), device)
            else:
                added += [(place, token) for token in request.tokens[counted:]]
            self._counted[request] = len(request.tokens)
        if added:
            places, tokens = to_device(np.array(added, np.int64), device).T
            ones = torch.ones(len(added), dtype=torch.int32, device=device)
            table.index_put_((places, tokens), ones, accumulate=True)
        return table[to_device(np.array([self._places[request] for request in requests], np.int64), device)]

    def _room(self, requests: Sequence[GenerationRequest], vocabulary: int, device: torch.device) -> Tensor:
        """The table, with a place for each request."""
        new = [request for request in requests if request not in self._places]
        table, wanted = self._table, len(self._places) + len(new)
        if table is None or wanted > len(table):
            size = max(wanted, min(2 * len(table), self._num_rows) if table is not None else 1)
            larger = torch.zeros(size, vocabulary, dtype=torch.int32, device=device)
            if table is not None:
                larger[: len(table)] = table
            self._table = table = larger
        taken = set(self._places.values())
        free = (place for place in range(len(table)) if place not in taken)
        for request in new:
            self._places[request] = next(free)
        return table


def counts_of(request: GenerationRequest, vocabulary: int) -> NDArray[np.int32]:
    """int32 (vocabulary,): how often each token was generated, plus `IN_PROMPT` for tokens of the prompt."""
    tokens = np.fromiter(request.tokens, np.int64, len(request.tokens))
    counts = np.bincount(tokens[request.prompt_tokens :], minlength=vocabulary).astype(np.int32)
    counts[np.unique(tokens[: request.prompt_tokens])] += IN_PROMPT
    return counts


def bias_of(
    requests: Sequence[GenerationRequest], masks: dict[GenerationRequest, NDArray[np.uint32]], scores: Tensor
) -> Tensor:
    """float32 (requests, vocabulary): what is added to the scores; -inf bars a token.

    Args:
        requests: In the order of the scores.
        masks: From `allowed_tokens`, for requests with a constraint.
        scores: (requests, vocabulary).
    """
    vocabulary, device = scores.shape[1], scores.device
    bias = torch.zeros(scores.shape, dtype=torch.float32, device=device)
    masked = [(index, masks[request]) for index, request in enumerate(requests) if request in masks]
    if masked:
        # As bits to the device, which is a thirty-second of what the bias takes.
        words = to_device(np.stack([mask for _, mask in masked]).view(np.int32), device)
        bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=device)) & 1
        barred = bits.flatten(1)[:, :vocabulary] == 0
        rows = to_device(np.array([index for index, _ in masked], np.int64), device)
        bias[rows] = torch.where(barred, -torch.inf, 0.0)
    # A bias may have a thousand entries: each request makes its arrays once.
    entries = [(index, *request.bias_entries) for index, request in enumerate(requests) if request.params.logit_bias]
    entries += [
        (index, tokens, np.full(len(tokens), -np.inf, np.float32))
        for index, request in enumerate(requests)
        if request.bars_end and (tokens := np.array(list(request.end_tokens), np.int64)).size
    ]
    if entries:
        at_rows = np.concatenate([np.full(len(tokens), index) for index, tokens, _ in entries])
        at = to_device(np.stack([at_rows, np.concatenate([tokens for _, tokens, _ in entries])]), device)
        values = to_device(np.concatenate([values for _, _, values in entries]), device)
        bias.index_put_((at[0], at[1]), values, accumulate=True)
    return bias


def token_logprobs(logits: Tensor, tokens: Sequence[int], top_count: int) -> list[TokenLogprobs | None]:
    """Log-probabilities of tokens, each with the `top_count` likeliest of its row; None where one is not finite.

    Args:
        logits: (rows, vocabulary), of the model alone.
        tokens: One for each row.
        top_count: How many of the likeliest tokens.
    """
    logprobs = logits.float().log_softmax(1)
    own = logprobs.gather(1, to_device(np.array(tokens, np.int64), logits.device).unsqueeze(1))
    values, indices = logprobs.topk(min(top_count, logits.shape[1]), dim=1)
    # One array from the device in place of two.
    figures = torch.cat((own, values), 1).cpu().numpy()
    likeliest = indices.int().cpu().numpy()
    are_finite: list[bool] = np.isfinite(figures).all(1).tolist()
    found: list[TokenLogprobs | None] = []
    for row, (token, logprob) in enumerate(zip(tokens, figures[:, 0].tolist(), strict=True)):
        top = LikelyTokens(likeliest[row].tobytes(), figures[row, 1:].tobytes()) if top_count else ()
        found.append(TokenLogprobs(token, logprob, top) if are_finite[row] else None)
    return found


def take_prompt_logprobs(
    logits: Tensor, chunks: list[tuple[GenerationRequest, int, int]], overflowed: set[GenerationRequest]
) -> Tensor:
    """Note the log-probabilities of prompts; returns the logits without the rows that were for them alone.

    Args:
        logits: (kept tokens, vocabulary).
        chunks: Requests, with the first row and the number of rows of each.
        overflowed: Gets the requests with a log-probability that is not finite.
    """
    wanted = np.ones(len(logits), bool)
    for request, first, count in chunks:
        _note_prompt(logits[first : first + count], request, overflowed)
        wanted[first : first + count - 1] = False
    # Not by the mask: the host would wait to hear how many rows it has.
    return logits[to_device(np.flatnonzero(wanted), logits.device)]


def _note_prompt(logits: Tensor, request: GenerationRequest, overflowed: set[GenerationRequest]) -> None:
    """Note those of the chunk that begins at `request.computed`; logits (tokens of the chunk, vocabulary)."""
    have, tokens = request.prompt_token_logprobs, request.tokens
    if not request.computed and not have:
        have.append(TokenLogprobs(tokens[0], None))
    # The logits at a position are for the token after it. After a preemption the first of them are known already.
    start = max(request.computed + 1, len(have))
    end = min(request.computed + len(logits) + 1, request.prompt_tokens)
    for position in range(start, end, _ROWS_AT_ONCE):
        block = tokens[position : min(position + _ROWS_AT_ONCE, end)]
        row = position - request.computed - 1
        for one in token_logprobs(logits[row : row + len(block)], block, request.params.prompt_logprobs or 0):
            if one is None:
                overflowed.add(request)
                return
            have.append(one)


def rows_of(logits: Tensor, indices: Sequence[int]) -> Tensor:
    """These rows of the logits; the logits themselves if they are all of them, which are in order."""
    if len(indices) == len(logits):
        return logits
    return logits[to_device(np.array(indices, np.int64), logits.device)]
