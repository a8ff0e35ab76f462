"""Overflows of adapters: made visible in the logits, and told to the client and the log.

Most layers hand infinity and NaN on. A normalization hides an overflow: it divides by the root of a sum of squares, and
where that sum is infinite the quotient is 0, or a layer norm's bias. The logits are then finite, and mean nothing.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store import ResolvedAdapter
from sera_serve.engine.request import Request
from sera_serve.errors import AdapterOverflow, BaseOverflow
from sera_serve.layers import ServedLinear

logger = logging.getLogger("sera_serve.engine")

# The norm of a vector whose sum of squares is just infinite in float32. torch's layer norm gives zeros for it. For a
# vector that is ten times as large it gives NaN, which hides nothing.
_INJECTED = 4e19
# An adapter whose updates are at most so many times as long as their inputs cannot overflow in float32 or bfloat16: a
# normalized state has a norm of some hundreds, and between two normalizations at most two updates are multiplied with
# each other and one follows, so that nothing there comes near 1e19, whose square is infinite.
_SAFE_STRETCH = 1e4
# Seconds between two warnings about one adapter, and the most adapters whose last warning is remembered.
_WARN_EVERY_S = 60.0
_REMEMBERED = 1024


class OverflowReporter:
    """Says why a request ends whose logits are infinite or not a number. One thread uses it."""

    def __init__(self) -> None:
        self._warned: dict[str, float] = {}

    def error(self, request: Request) -> AdapterOverflow | BaseOverflow:
        """The error for the client; about the adapter it also warns the log, once a minute."""
        adapter = request.adapter
        if adapter is None:
            return BaseOverflow(
                "the base model overflows on this input: its logits are infinite or not a number; send another input, "
                "or serve the base in bfloat16 or float32"
            )
        now = time.monotonic()
        if now - self._warned.get(adapter.digest, -math.inf) >= _WARN_EVERY_S:
            # At the end: the first is forgotten first.
            self._warned.pop(adapter.digest, None)
            self._warned[adapter.digest] = now
            if len(self._warned) > _REMEMBERED:
                del self._warned[next(iter(self._warned))]
            logger.warning(
                "adapter %s (%s) overflows: its logits are infinite or not a number",
                _named(adapter),
                adapter.digest,
            )
        return AdapterOverflow(
            f"adapter '{_named(adapter)}' overflows on this input: its logits are infinite or not a "
            "number; publish it with a smaller scaling or smaller values, such as from a training with a lower "
            "learning rate",
            param="adapter",
        )


def _named(adapter: ResolvedAdapter) -> str:
    # The name of a combination has the versions of its parts.
    return f"{adapter.adapter}@v{adapter.version}" if adapter.version else adapter.adapter


class RowGauge:
    """Finds the rows of a classification pass in which anything is infinite, not a number, or overflows when squared.

    It adds up the norms of what every adaptable layer gives and of what every normalization takes. Where they are
    finite, so are the sums of squares of the normalizations and, by the inequality of Cauchy and Schwarz, the scores of
    attention. That takes an eighth of the time of a pass of short texts, so only passes with an adapter that could
    overflow are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare for a model with serving layers attached, which one runner uses alone."""
        self._layers = [module for module in model.modules() if isinstance(module, ServedLinear)]
        self._norms = [module for module in model.modules() if is_norm(module)]
        # Half precision overflows at 65,504, which no bound on an adapter rules out.
        self._is_half = getattr(model, "dtype", None) is torch.float16

    def must_watch(self, stretches: Iterable[float]) -> bool:
        """Whether a pass of adapters with these values (`AdapterLayout.stretch`) could overflow."""
        return self._is_half or any(stretch > _SAFE_STRETCH for stretch in stretches)

    @contextmanager
    def watching(self, rows: int, device: torch.device) -> Iterator[Tensor]:
        """Watch a pass of so many rows. The tensor, float32 (rows,), is finite where a row of the pass is sound."""
        total = torch.zeros(rows, dtype=torch.float32, device=device)

        def add(states: Tensor) -> None:
            # Experts take tokens without their rows; what overflows there is in the residual stream, or in products.
            if len(states) == rows:
                total.add_(torch.linalg.vector_norm(states.flatten(1), dim=1, dtype=torch.float32))

        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.enter_context(layer.register_forward_hook(lambda module, args, output: add(output)))
            for norm in self._norms:
                hooks.enter_context(norm.register_forward_pre_hook(lambda module, args: add(args[0])))
            yield total


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or root-mean-square norm; architectures have classes of their own for them."""
    is_leaf = next(module.children(), None) is None
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or (is_leaf and "Norm" in type(module).__name__)


def expose_overflows(model: nn.Module, logits: Callable[[], Tensor]) -> None:
    """Make an overflow in any normalization of a decoder show as logits that are not finite.

    A hook makes the output of a normalization NaN where its sum of squares is infinite. Each costs two operations a
    step, so the hooks are only where they are needed: at the last normalization, and at those whose overflow the last
    one does not see. In most decoders all normalizations read the residual stream, which keeps a large value to the
    end. An overflow is put into one normalization of each kind to find out: the one of a later layer is alike.

    Args:
        model: For one runner's use alone.
        logits: Runs a pass over a few tokens, and returns its logits.
    """
    if getattr(model, "dtype", None) is torch.float16:
        # Its largest number, squared and summed in float32, is finite.
        return
    norms = {path: module for path, module in model.named_modules() if is_norm(module)}
    order: list[str] = []
    with ExitStack() as hooks:
        for path, norm in norms.items():
            hooks.enter_context(norm.register_forward_pre_hook(_noting(order, path)))
        logits()
    kinds: dict[str, str] = {}
    for path in order:
        kinds.setdefault(_kind(path), path)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    last = _kind(order[-1]) if order else None
    for kind in sorted(kinds, key=lambda kind: kind != last):
        if kind == last or not _is_seen(norms[kinds[kind]], logits, weights):
            for path, module in norms.items():
                if _kind(path) == kind:
                    module.register_forward_hook(_poison)


def _kind(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _noting(order: list[str], path: str) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: order.append(path)


def _is_seen(norm: nn.Module, logits: Callable[[], Tensor], weights: set[int]) -> bool:
    """Whether the logits are not finite when what this normalization reads is as large as after an overflow."""

    def inject(module: nn.Module, args: tuple[Any, ...]) -> None:
        # In place, as a layer before it would: the residual stream is the same tensor. Weights stay as they are.
        if args[0].untyped_storage().data_ptr() not in weights:
            pattern = torch.linspace(-1, 1, args[0].shape[-1], device=args[0].device)
            args[0].copy_(pattern * (_INJECTED / torch.linalg.vector_norm(pattern)))

    with norm.register_forward_pre_hook(inject):
        return not bool(logits().isfinite().all())


def _poison(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """0 times the norm: nothing where it is finite, and NaN where it is not."""
    output.add_(torch.linalg.vector_norm(args[0], dim=-1, keepdim=True, dtype=torch.float32), alpha=0)
