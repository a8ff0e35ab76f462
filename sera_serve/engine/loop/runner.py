"""Runs a planned step: packs its tokens, runs the model, samples. Tables by row spare most work for each request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sera_kernels import NO_ADAPTER, AdapterBatch
from sera_serve.base import RotaryContext
from sera_serve.engine.loop.attention import KeyValuePool, Part, StepContext, decode_parts
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.loop.plan import StepPlan
from sera_serve.engine.request import GenerationRequest, TokenLogprobs
from sera_serve.engine.sampling import perturbed_scores, sampling_keys
from sera_serve.layers import AdapterContext

StaticStep = Callable[[list[GenerationRequest]], list[int]]


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave.

    Attributes:
        requests: Those with a new token.
        tokens: The new token of each.
    """

    requests: list[GenerationRequest]
    tokens: list[int]


class RowTables:
    """What the loop knows of each running request, by row, as arrays: a decode then costs no work for each request."""

    def __init__(self, rows: int, pages: int) -> None:
        """For so many requests of at most so many pages."""
        self.pages = np.zeros((rows, pages), np.int64)
        self.next_token = np.zeros(rows, np.int64)
        self.computed = np.zeros(rows, np.int64)
        self.slot = np.full(rows, NO_ADAPTER, np.int32)
        self.adapter_from = np.zeros(rows, np.int64)
        self.temperature = np.zeros(rows, np.float32)
        self.top_k = np.zeros(rows, np.int32)
        self.top_p = np.ones(rows, np.float32)
        self.seed = np.zeros(rows, np.uint64)
        self.truncates = np.zeros(rows, bool)
        self.is_long = np.zeros(rows, bool)

    def enter(self, request: GenerationRequest) -> None:
        """Fill the row of a request that has just got it."""
        row, pages = request.row, request.pages
        # Padding repeats the request's own first page: what lies in another's might be NaN.
        self.pages[row] = pages[0]
        self.pages[row, : len(pages)] = pages
        self.slot[row], self.adapter_from[row] = request.adapter_slot, request.adapter_from
        self.temperature[row], self.top_k[row], self.top_p[row] = request.temperature, request.top_k, request.top_p
        self.seed[row], self.truncates[row] = request.seed, request.has_truncation
        self.is_long[row] = request.rotary_side > 0

    def grow(self, request: GenerationRequest) -> None:
        """Note the last page of a request."""
        self.pages[request.row, len(request.pages) - 1] = request.pages[-1]

    def decode_slots(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32, the adapter slot of the token that runs next in each row."""
        return np.where(self.computed[rows] >= self.adapter_from[rows], self.slot[rows], np.int32(NO_ADAPTER))

    def advance(self, request: GenerationRequest) -> None:
        """Note how far a request is, and the token that runs next."""
        self.computed[request.row] = request.computed
        self.next_token[request.row] = request.tokens[request.computed]


class StepRunner:
    """Runs steps on one model and one pool; the loop's thread alone uses it."""

    def __init__(
        self,
        model: PagedModel,
        context: AdapterContext,
        pool: KeyValuePool,
        rows: int,
        max_pages: int,
        rotary: RotaryContext | None = None,
    ) -> None:
        """Set up.

        Args:
            model: The decoder.
            context: The context of its serving layers.
            pool: Keys and values.
            rows: The most requests that run.
            max_pages: The most pages of a request.
            rotary: Where a base with a rotary threshold reads which tokens of a step are beyond it.
        """
        self.tables = RowTables(rows, max_pages)
        self.static_step: StaticStep | None = None
        """Runs a step of decodes alone where it is set: on static buffers, as a graph would."""
        self._model, self._context, self._pool = model, context, pool
        self._rotary = rotary
        self._compiled = pool.arrays is not None

    def run(self, plan: StepPlan) -> StepOutcome:
        """Run a step; nothing of the requests is changed but their log-probabilities."""
        self._enter(plan)
        # A static step hands on no logits.
        if (
            self.static_step is not None
            and not plan.chunks
            and all(request.logprobs is None for request in plan.decodes)
        ):
            return StepOutcome(plan.decodes, self.static_step(plan.decodes))
        tables = self.tables
        rows = np.array([request.row for request in plan.decodes], np.int64)
        order = np.argsort(tables.computed[rows], kind="stable")
        rows = rows[order]
        at = tables.computed[rows]
        # Only the pages of the longest: a table is as wide as the context is long.
        pages = tables.pages[rows, : int(at[-1]) // PAGE_SIZE + 1 if len(at) else 0]
        ids: list[NDArray[Any]] = [tables.next_token[rows]]
        positions: list[NDArray[Any]] = [at]
        slots: list[NDArray[Any]] = [tables.decode_slots(rows)]
        places = [np.take_along_axis(pages, (at // PAGE_SIZE)[:, None], 1)[:, 0] * PAGE_SIZE + at % PAGE_SIZE]
        parts = decode_parts(at + 1, pages, self._compiled)
        sampled = [plan.decodes[i] for i in order.tolist()]
        keep = list(range(len(sampled)))
        total = len(sampled)
        # Prompts of one length that begin here are attended in one call.
        chunks = sorted(plan.chunks, key=lambda chunk: (chunk[0].computed > 0, chunk[1]))
        with_prompt: list[tuple[GenerationRequest, int, int]] = []
        for request, count in chunks:
            start, end = request.computed, request.computed + count
            position, own = np.arange(start, end), tables.pages[request.row]
            ids.append(np.array(request.tokens[start:end], np.int64))
            positions.append(position)
            slots.append(_chunk_slots(request, position))
            places.append(own[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
            _add_chunk(parts, start, count, own)
            if _wants_prompt_logprobs(request):
                with_prompt.append((request, len(keep), count))
                keep += range(total, total + count)
                if end == len(request.tokens):
                    sampled.append(request)
            elif end == len(request.tokens):
                sampled.append(request)
                keep.append(total + count - 1)
            total += count
        if self._rotary is not None:
            self._rotary.long_tokens = self._long_tokens(rows, chunks)
        logits = self._forward(
            [np.concatenate(ids), np.concatenate(positions), np.concatenate(slots), np.concatenate(places)],
            parts,
            keep if plan.chunks else None,
        )
        if with_prompt:
            logits = _take_prompt_logprobs(logits, with_prompt)
        return StepOutcome(sampled, self._sample(logits, sampled))

    def probe(self) -> None:
        """Run one token of the base model on the scratch page; raises what the forward pass raises."""
        if self._rotary is not None:
            # Left from a failed step, of another number of tokens.
            self._rotary.long_tokens = None
        zero = np.zeros(1, np.int64)
        packed: list[NDArray[Any]] = [zero, zero, np.full(1, NO_ADAPTER, np.int32), zero]
        self._forward(packed, [Part(1, np.array([1]))], None).argmax(-1).tolist()

    def _enter(self, plan: StepPlan) -> None:
        for request in plan.entered:
            self.tables.enter(request)
        for request in plan.grown:
            self.tables.grow(request)
        # Of a request's pages only the last is read beyond the request's end.
        partial = [request.pages[-1] for request in plan.grown]
        partial += [request.pages[-1] for request in plan.entered if len(request.tokens) % PAGE_SIZE]
        if partial:
            self._pool.clear(partial)

    def _forward(self, packed: list[NDArray[Any]], parts: list[Part], keep: list[int] | None) -> Tensor:
        device = self._model.device
        base_only = bool((packed[2] == NO_ADAPTER).all())
        ids, positions, slots, places = (torch.from_numpy(array).to(device) for array in packed)
        # An empty list would make an index of another dtype.
        kept: Tensor | int = 0 if keep is None else torch.tensor(keep, dtype=torch.int64, device=device)
        step = StepContext(self._pool, places, parts)
        with self._context.run(None if base_only else AdapterBatch(slots)):
            return self._model.logits(ids[None], positions[None], step, kept)

    def _sample(self, logits: Tensor, requests: list[GenerationRequest]) -> list[int]:
        """A token for each request, from float32 (requests, vocabulary) logits."""
        rows = np.array([request.row for request in requests], np.int64)
        tables, scores = self.tables, logits
        if tables.temperature[rows].any():
            device = logits.device
            lengths = np.array([len(request.tokens) for request in requests], np.uint64)
            keys = sampling_keys(tables.seed[rows], lengths)
            scores = perturbed_scores(
                logits,
                torch.from_numpy(tables.temperature[rows]).to(device),
                torch.from_numpy(tables.top_k[rows]).to(device),
                torch.from_numpy(tables.top_p[rows]).to(device),
                torch.from_numpy(keys).to(device),
                truncate=bool(tables.truncates[rows].any()),
            )
        tokens: list[int] = scores.argmax(-1).tolist()
        for index, request in enumerate(requests):
            if request.logprobs is not None:
                request.token_logprobs.append(_logprobs(logits[index], tokens[index], request.logprobs))
        return tokens

    def _long_tokens(self, rows: NDArray[np.int64], chunks: list[tuple[GenerationRequest, int]]) -> Tensor:
        """bool (tokens,), which tokens of the step belong to requests beyond the rotary threshold."""
        sides = [self.tables.is_long[rows], *(np.full(count, request.rotary_side > 0) for request, count in chunks)]
        long = np.concatenate(sides)
        return torch.from_numpy(long).to(self._model.device)


def _add_chunk(parts: list[Part], start: int, count: int, pages: NDArray[np.int64]) -> None:
    if start:
        end = start + count
        parts.append(Part(count, np.array([end]), pages[None, : -(-end // PAGE_SIZE)]))
    elif parts and parts[-1].table is None and parts[-1].new == count:
        parts[-1].lengths = np.append(parts[-1].lengths, count)
    else:
        parts.append(Part(count, np.array([count])))


def _chunk_slots(request: GenerationRequest, position: NDArray[np.int64]) -> NDArray[np.int32]:
    slots = np.full(len(position), request.adapter_slot, np.int32)
    slots[position < request.adapter_from] = NO_ADAPTER
    return slots


def _wants_prompt_logprobs(request: GenerationRequest) -> bool:
    return request.prompt_logprobs is not None and len(request.prompt_token_logprobs) < request.prompt_tokens


def _take_prompt_logprobs(logits: Tensor, chunks: list[tuple[GenerationRequest, int, int]]) -> Tensor:
    """Note the log-probabilities of prompts; returns the logits without the rows that were for them alone.

    Args:
        logits: float32 (kept tokens, vocabulary).
        chunks: Requests, with the first row and the number of rows of each.
    """
    wanted = torch.ones(len(logits), dtype=torch.bool)
    for request, first, count in chunks:
        have, top = request.prompt_token_logprobs, request.prompt_logprobs or 0
        if not request.computed and not have:
            have.append(TokenLogprobs(request.tokens[0], None))
        for offset in range(count):
            # The logits at a position are for the token after it.
            position = request.computed + offset + 1
            if len(have) <= position < request.prompt_tokens:
                have.append(_logprobs(logits[first + offset], request.tokens[position], top))
        ends = request.computed + count == len(request.tokens)
        wanted[first : first + count - ends] = False
    return logits[wanted.to(logits.device)]


def _logprobs(logits: Tensor, token: int, top: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(0)
    values, indices = logprobs.topk(min(top, len(logprobs)))
    likeliest = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, logprobs[token].item(), likeliest)
