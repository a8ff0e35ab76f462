"""Whether answers are those of the adapter that was asked for, computed on the base with the adapter merged in."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch

from benchmarks.fleet import Fleet
from benchmarks.http_load import Answer
from sera_serve.base import merge_adapter

# Two tokens whose logits (about 10) differ less than this are equally likely to float32's rounding.
TIE = 1e-3


def wrong_answers(fleet: Fleet, answers: Iterable[Answer]) -> list[str]:
    """What is wrong with each of the answers that is: its length, its adapter, or a token that is not greedy.

    One forward pass over prompt and answer tells whether every token is the likeliest after those before it, which is
    what greedy generation on the merged model gives; and unlike it, it can tell a tie from an error.
    """
    found = []
    for answer in answers:
        if not answer.right_length:
            found.append(f"{answer.adapter}: {answer.status} {answer.error}, {len(answer.tokens)} tokens")
        elif (gap := _gap(fleet, answer)) > TIE:
            found.append(f"{answer.adapter}: a token is {gap:.4f} less likely than the likeliest")
    return found


@torch.inference_mode()
def _gap(fleet: Fleet, answer: Answer) -> float:
    """The greatest difference of a token's logit from the best of its step."""
    merged = replace(fleet.base, model=copy.deepcopy(fleet.base.model))
    merge_adapter(merged, fleet.bundle(answer.request.adapter))
    prompt, tokens = answer.request.prompt, torch.tensor(answer.tokens)
    logits = merged.model(torch.tensor([[*prompt, *answer.tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    return float((logits.max(-1).values - logits.gather(1, tokens[:, None])[:, 0]).max())
