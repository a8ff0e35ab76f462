"""What the loop knows of each running request, by row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sera_kernels import NO_ADAPTER
from sera_serve.engine.request import GenerationRequest


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
        self.min_p = np.zeros(rows, np.float32)
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
        params = request.params
        self.temperature[row], self.top_k[row] = params.temperature, params.top_k
        self.top_p[row], self.min_p[row] = params.top_p, params.min_p
        self.seed[row], self.truncates[row] = request.seed, request.has_truncation
        self.is_long[row] = request.rotary_side > 0
        self.advance(request)

    def grow(self, request: GenerationRequest) -> None:
        """Note the last page of a request."""
        self.pages[request.row, len(request.pages) - 1] = request.pages[-1]

    def slots_at(self, rows: NDArray[np.int64], at: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32, the adapter slot of the token at each of these places of the requests of these rows."""
        return np.where(at >= self.adapter_from[rows], self.slot[rows], np.int32(NO_ADAPTER))

    def advance(self, request: GenerationRequest) -> None:
        """Note how far a request is, and the token that runs next."""
        self.computed[request.row] = request.computed
        self.next_token[request.row] = request.tokens[request.computed]
