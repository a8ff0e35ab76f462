"""Runs several training runs side by side in one thread, and joins their passes through the base.

Each run is the ordinary training run, in a greenlet of its own, over a model object of its own that shares the base's
weights. Where it would run the base forward to train, it waits here instead. When all runs wait, one pass is made for
all of them. So initial values, order of rows, losses, optimisers, schedules, checkpoints and evaluation are the very
code of a run of its own.
"""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from sera_serve.base import FrozenBase
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import attached_layers
from sera_serve.trainer.loop import AdapterTrainer
from sera_serve.trainer.together.shared_pass import Batch, SharedPass

_ARGUMENTS = {"input_ids", "attention_mask", "token_type_ids", "use_cache", "logits_to_keep"}


class _Backward:
    """The request of a run that has made its own backward pass, and waits for the base's."""


_BACKWARD = _Backward()


@dataclass(eq=False)
class Member:
    """One run among others.

    Attributes:
        key: Names the run.
        body: The run: trains over the base that it is given, from beginning to end. It raises nothing.
    """

    key: int
    body: Callable[[FrozenBase, Member], None]
    _greenlet: Any = None
    _generators: tuple[Any, ...] | None = None
    _main: Any = None
    view: FrozenBase | None = field(default=None, repr=False)

    def start(self, base: FrozenBase, main: Any) -> None:
        """Make the run's model object and its greenlet."""
        view = self.view = _view(base, self)
        self._main = main
        self._greenlet = greenlet(lambda _: self.body(view, self), main)

    def resume(self, answer: Any = None) -> Batch | _Backward | None:
        """Let the run go on until it needs the base, or to its end (None).

        `answer` is what it waits for; an exception is raised in the run. Its random generators are its own.
        """
        with self.drawing():
            request = self._greenlet.switch(answer)
        return None if self._greenlet.dead else cast("Batch | _Backward", request)

    def stop(self) -> None:
        """End the run where it waits. Its checkpoints stay."""
        if self._greenlet is not None and not self._greenlet.dead:
            self._greenlet.throw(GreenletExit)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let the block draw from the run's random generators, which begin as those of the process are."""
        outside = _generator_states()
        if self._generators is not None:
            _restore_generators(self._generators)
        try:
            yield
        finally:
            self._generators = _generator_states()
            _restore_generators(outside)

    def ask(self, request: Batch | _Backward) -> Any:
        """Wait, in the run's own greenlet, for the answer to a request."""
        answer = self._main.switch(request)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _generator_states() -> tuple[Any, ...]:
    """Copy the states of Python's, numpy's and torch's global generators."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_generators(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


class MemberTrainer(AdapterTrainer):
    """The training loop of a run among others: after its own backward pass it waits for that of the base."""

    def __init__(self, *arguments: Any, member: Member) -> None:
        self._member = member
        super().__init__(*arguments)

    def complete_gradients(self) -> None:
        """Wait for the base's backward pass, with which the gradients of the adapter come."""
        if self.task.model.base_model is not None:
            self._member.ask(_BACKWARD)


def run_together(base: FrozenBase, members: Iterable[Member], *, together: int) -> None:
    """Run all members to their ends, at most `together` at a time; the next one begins when one has ended.

    Args:
        base: The frozen base. Nothing is attached to it.
        members: The runs, with keys of their own.
        together: The most runs that train at the same time, and so the most batches in memory.
    """
    waiting, live = deque(members), list[Member]()
    by_key = {member.key: member for member in waiting}
    passes = SharedPass(base, lambda key: by_key[key].drawing())
    answers: dict[int, Any] = {}
    try:
        while waiting or live:
            while waiting and len(live) < together:
                member = waiting.popleft()
                member.start(base, getcurrent())
                live.append(member)
            batches = [(m, r) for m, r in _advance(live, answers, passes) if isinstance(r, Batch)]
            answers = {}
            if not batches:
                continue
            try:
                results = passes.forward([batch for _, batch in batches])
                answers = {m.key: result for (m, _), result in zip(batches, results, strict=True)}
                if any(isinstance(request, Batch) for _, request in _advance(live, answers, passes)):
                    raise RuntimeError("a run asked for a second pass before its backward pass")
                passes.backward(results)
                answers = {}
            except RuntimeError as error:
                # Out of memory, or a batch that the base cannot take: all that were in the pass end with it.
                answers = {member.key: error for member, _ in batches}
    finally:
        for member in live:
            member.stop()


def _advance(live: list[Member], answers: dict[int, Any], passes: SharedPass) -> list[tuple[Member, Batch | _Backward]]:
    """Give each run its answer, and return what each asks for next. Runs that end leave the list."""
    asked = []
    for member in list(live):
        request = member.resume(answers.get(member.key))
        if request is None:
            live.remove(member)
            passes.forget(member.key)
        else:
            asked.append((member, request))
    return asked


def _view(base: FrozenBase, member: Member) -> FrozenBase:
    """A model object over the same weights, whose forward passes for training are made together with others.

    Passes without gradients, such as those of an evaluation, run at once.
    """
    view = base.share_weights()
    backbone = view.model
    if base.kind == "decoder":
        _redirect(view.model, member, "logits")
        backbone = view.model.base_model
    _redirect(backbone, member, "last_hidden_state")
    return view


def _redirect(model: nn.Module, member: Member, result: str) -> None:
    own = model.forward

    @functools.wraps(own)
    def forward(*positional: Any, **inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*positional, **inputs)
        unknown = [*("an argument without a name" for _ in positional), *sorted(inputs.keys() - _ARGUMENTS)]
        if unknown:
            raise InvalidConfiguration(
                f"this task runs the base with {unknown[0]}, which several jobs cannot share; train it alone",
                param="task",
            )
        ids: Tensor = inputs["input_ids"]
        kept = int(inputs.get("logits_to_keep", 0)) or ids.shape[1] if result == "logits" else None
        assert member.view is not None
        batch = Batch(
            key=member.key,
            layers=attached_layers(member.view.model),
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            token_type_ids=inputs.get("token_type_ids"),
            kept=kept,
        )
        return types.SimpleNamespace(**{result: member.ask(batch)})

    model.forward = forward
