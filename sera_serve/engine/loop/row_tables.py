"""What the loop knows of each running request, by row: on the host, and what the device has of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sera_kernels import NO_ADAPTER
from sera_serve.engine.loop.pages import SCRATCH
from sera_serve.engine.request import GenerationRequest


class RowTables:
    """What the loop knows of each running request, by row, as arrays: a decode then costs no work for each request."""

    def __init__(self, rows: int, pages: int) -> None:
        """For so many requests of at most so many pages."""
        self.pages = np.zeros((rows, pages), np.int64)
        # Pages of each request, and how many of them `take_new_pages` has given out.
        self._page_counts = np.zeros(rows, np.int64)
        self._taken = np.zeros(rows, np.int64)
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
        self._page_counts[row], self._taken[row] = len(pages), 0
        self.slot[row] = NO_ADAPTER if request.lease is None else request.lease.slot
        self.adapter_from[row] = request.adapter_from
        params = request.params
        self.temperature[row], self.top_k[row] = params.temperature, params.top_k
        self.top_p[row], self.min_p[row] = params.top_p, params.min_p
        self.seed[row], self.truncates[row] = request.seed, request.has_truncation
        self.is_long[row] = request.rotary_side > 0
        self.advance(request)

    def grow(self, request: GenerationRequest) -> None:
        """Note the last page of a request."""
        self.pages[request.row, len(request.pages) - 1] = request.pages[-1]
        self._page_counts[request.row] = len(request.pages)

    def take_new_pages(self) -> NDArray[np.int64]:
        """int64 (2, new pages): places in `pages`, flattened, and the pages there that are new since the last call."""
        rows = np.flatnonzero(self._taken < self._page_counts)
        counts = self._page_counts[rows] - self._taken[rows]
        # Of each row the columns from the first that is new.
        columns = np.arange(counts.sum()) + np.repeat(self._taken[rows] - (counts.cumsum() - counts), counts)
        self._taken[rows] = self._page_counts[rows]
        places = np.repeat(rows, counts) * self.pages.shape[1] + columns
        return np.stack([places, self.pages.reshape(-1)[places]])

    def forget_taken(self) -> None:
        """Have `take_new_pages` give out the pages of all requests again."""
        self._taken[:] = 0

    def slots_at(self, rows: NDArray[np.int64] | int, at: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32, the adapter slot of the token at each of these places of the requests of these rows, or of one row."""
        return np.where(at >= self.adapter_from[rows], self.slot[rows], np.int32(NO_ADAPTER))

    def advance(self, request: GenerationRequest) -> None:
        """Note how far a request is, and the token that runs next."""
        self.computed[request.row] = request.computed
        self.next_token[request.row] = request.tokens[request.computed]


class DeviceRows:
    """What the device knows of each running request, by row; all static steps read it, and leave their tokens in it.

    It is made and written in inference mode, as steps run.

    Attributes:
        tokens: int64 (rows + 1,), the last token of each request.
        pages: int32 (rows + 1, pages), the pages of each request. What lies beyond them may be left from earlier ones.
            In both, the last row is for padding, whose page is the scratch page.
        logits: (rows, vocabulary), of the last step's requests in the step's own order. Tokens that the host chooses
            are chosen from them.
    """

    def __init__(self, tables: RowTables, device: torch.device, vocabulary: int, dtype: torch.dtype) -> None:
        """Allocate them for the rows of `tables`, and so many logits of a dtype."""
        rows, pages = tables.pages.shape
        self.logits = torch.zeros(rows, vocabulary, dtype=dtype, device=device)
        self.tokens = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.pages = torch.full((rows + 1, pages), SCRATCH, dtype=torch.int32, device=device)
        # Places of new pages, then the pages. Two on the host, because at most two steps are under way.
        self._new = torch.zeros(2 * rows * pages, dtype=torch.int32, device=device)
        is_pinned = device.type == "cuda"
        self._staging = [torch.zeros(self._new.shape, dtype=torch.int32, pin_memory=is_pinned) for _ in range(2)]
        self._turn = 0

    @property
    def padding(self) -> int:
        """The row for padding."""
        return len(self.tokens) - 1

    def bring(self, tables: RowTables) -> None:
        """Bring the pages that requests have got since the last call to the device, in the order of its stream."""
        try:
            self.upload(self.stage(tables))
        except BaseException:
            # They may not have arrived: all pages are brought again.
            tables.forget_taken()
            raise

    def stage(self, tables: RowTables) -> Tensor:
        """Take new pages from `tables`, and return what `upload` brings to the device."""
        new = tables.take_new_pages()
        self._turn = 1 - self._turn
        staged = self._staging[self._turn][: new.size]
        staged.numpy()[:] = new.reshape(-1)
        return staged

    def upload(self, staged: Tensor) -> None:
        """Bring what was staged to its places."""
        if len(staged):
            new = self._new[: len(staged)].copy_(staged, non_blocking=True)
            places, pages = new.view(2, -1)
            self.pages.view(-1).index_copy_(0, places.long(), pages)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device, in the order of its stream. The host goes on: a forward pass may still run there."""
    # CUDA has taken what ordinary memory holds when such a copy returns.
    return torch.from_numpy(array).to(device, non_blocking=True)
