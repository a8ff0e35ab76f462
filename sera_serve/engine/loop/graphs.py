"""Steps as CUDA graphs: captured once for each key, replayed with other contents of the buffers.

Everything is in the order of one stream: the thread's current one, on which eager steps run too. A launch copies new
pages and the staged inputs, replays the graph, copies the tokens back and records an event. The host waits for the
event alone, so it can stage and launch the next step meanwhile.
"""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Callable

import torch

from sera_kernels import ShapeClasses
from sera_serve.engine.loop.captures import FIRST_CLASSES, Captures, least_covering
from sera_serve.engine.loop.hugging_face import ServedDecoder
from sera_serve.engine.loop.row_tables import DeviceRows, RowTables
from sera_serve.engine.loop.static_step import StaticBatch, StaticKey, StaticLaunch, StaticStep
from sera_serve.engine.request import classes_of

logger = logging.getLogger("sera_serve.engine")

# Of a step with prompts. Up to so many, the host takes longer to launch the operations than a GPU to compute them.
_MOST_TOKENS = 512


def token_buckets(rows: int, most: int) -> list[int]:
    """Sizes of captured steps, ascending; the larger they are, the further apart.

    Args:
        rows: The most requests of a step; one size is just that, the largest step of decodes alone.
        most: The most tokens of a step, not below `rows`.
    """
    sizes = {1, 2, 4, 8, *range(16, 65, 8), *range(96, 257, 32), *range(320, most, 64)}
    return sorted({size for size in sizes if size < most} | {rows, most})


class NotCapturable(Exception):
    """The base's forward pass waits for the device, so no graph can hold it. The message names the place."""


def check_capturable(run: Callable[[], object]) -> None:
    """Run once, and check that no operation waits for the device.

    Models do, where Python decides by a tensor's value, and so do torch's products of experts on some GPUs. torch
    watches the whole process for it: no other thread may use the device meanwhile.

    Raises:
        NotCapturable: One does.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch says so at its first call, to the log of every server, or as an error where warnings are errors.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise NotCapturable(f"{place.name} ({place.filename}, line {place.lineno}) waits for the device") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


class StepGraphs:
    """The graphs of one model; `sera_serve.engine.loop.static_step.StaticSteps` on a GPU."""

    def __init__(self, decoder: ServedDecoder, tables: RowTables) -> None:
        """Set up without capturing, for the running requests of `tables`; the decoder is on a CUDA device."""
        model = decoder.model
        self._decoder, self._tables = decoder, tables
        self._rows = len(tables.pages)
        self._device_rows = DeviceRows(tables, model.device, model.vocabulary, model.logits_dtype)
        # Without a kernel over pages, attention gathers the longest context for each token.
        self.most_tokens = max(self._rows, _MOST_TOKENS if decoder.pool.has_paged_decode else 0)
        self._buckets = token_buckets(self._rows, self.most_tokens)
        # Further kinds are captured when the first step has them.
        self._captured = [FIRST_CLASSES, ShapeClasses()]
        self._captures = Captures(self._padding, "a step")

    def capture_all(self) -> None:
        """Capture what requests will need, the largest first, so that the smaller ones fit its memory.

        Raises:
            NotCapturable: The base's steps cannot be captured.
        """
        started = time.monotonic()
        least = self._key_of(self._buckets[0], ShapeClasses(), sampled=False, truncated=False)
        check_capturable(self._captures.warmed_up(least).run)
        for tokens in reversed(self._buckets):
            for classes in self._captured:
                for sampled, truncated in ((True, True), (True, False), (False, False)):
                    self._captures.captured(self._key_of(tokens, classes, sampled, truncated))
        took = time.monotonic() - started
        logger.info("captured %d graphs of steps in %.1f s", len(self._captures), took)

    def can_run(self, batch: StaticBatch) -> bool:
        """See `StaticSteps`."""
        return self._captures.can_run(lambda: self._key(batch))

    def launch(self, batch: StaticBatch, ahead: int) -> StaticLaunch:
        """See `StaticSteps`."""
        key = self._key(batch)
        step, graph = self._captures.get(key)
        if key.classes not in self._captured:
            self._captured.append(key.classes)
        self._device_rows.bring(self._tables)
        turn = step.stage(batch, self._tables, ahead)
        step.upload(turn)
        graph.replay()
        step.download(turn)
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[int]:
            done.synchronize()
            return step.tokens(turn, len(batch.requests))

        return StaticLaunch(wait, self._device_rows.logits[: len(batch.requests)])

    def _key(self, batch: StaticBatch) -> StaticKey:
        requests = batch.requests
        return self._key_of(
            tokens=next(size for size in self._buckets if size >= batch.tokens),
            classes=least_covering(self._captured, classes_of(requests)),
            sampled=any(request.params.temperature > 0 for request in requests),
            truncated=any(request.has_truncation for request in requests),
        )

    def _key_of(self, tokens: int, classes: ShapeClasses, sampled: bool, truncated: bool) -> StaticKey:
        """The key of a step; one with more tokens than requests may run has prompts, and one graph for any sampling."""
        if tokens > self._rows:
            sampled = truncated = True
        return StaticKey(tokens, min(tokens, self._rows), classes, sampled, truncated)

    def _padding(self, key: StaticKey) -> StaticStep:
        """A step of padding alone: it writes nothing but the scratch page."""
        step = StaticStep(self._decoder, self._device_rows, key)
        step.upload(step.stage(StaticBatch(), self._tables))
        return step
