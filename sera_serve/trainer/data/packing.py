"""Packing: several short rows in one sequence, of which no row attends to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sera_serve.base import FrozenBase
from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.data.token_rows import TokenRow
from sera_serve.trainer.model import IGNORED

# Differences of logits that come from another order of the same sums, as a part of the largest logit.
_NOISE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows into as few sequences as first-fit decreasing finds.

    Args:
        lengths: Length of each row in tokens.
        capacity: Most tokens of a sequence. A longer row has a sequence of its own.

    Returns:
        The numbers of the rows of each sequence.
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((place for place, left in enumerate(room) if left >= lengths[i]), len(sequences))
        if place == len(sequences):
            sequences.append([])
            room.append(capacity)
        sequences[place].append(i)
        room[place] -= lengths[i]
    return sequences


def pack_rows(rows: Sequence[TokenRow], capacity: int, pad_id: int) -> dict[str, Tensor]:
    """Pack rows into sequences.

    Args:
        rows: Rows with a label for each token.
        capacity: Most tokens of a sequence.
        pad_id: The token after the last row of a sequence.

    Returns:
        `input_ids`, `position_ids` and `labels`, each int64 (sequences, longest sequence). Positions begin anew in each
        row. Every token of padding has position 0, so that each is a row of its own.
    """
    sequences = pack_lengths([len(row["input_ids"]) for row in rows], capacity)
    longest = max(sum(len(rows[i]["input_ids"]) for i in sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    position_ids = torch.zeros((len(sequences), longest), dtype=torch.int64)
    labels = torch.full((len(sequences), longest), IGNORED)
    for place, sequence in enumerate(sequences):
        start = 0
        for i in sequence:
            end = start + len(rows[i]["input_ids"])
            input_ids[place, start:end] = torch.tensor(rows[i]["input_ids"])
            position_ids[place, start:end] = torch.arange(end - start)
            labels[place, start:end] = torch.tensor(rows[i]["labels"])
            # The token before it is one of another row.
            labels[place, start] = IGNORED
            start = end
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def packed_length(base: FrozenBase, lengths: Sequence[int]) -> int:
    """Return the most tokens of a packed sequence of the rows of a step, which have these lengths.

    Flash attention looks at each row alone, and finds packed rows in a batch of one sequence only. Other attention
    computes a score for each pair of tokens of a sequence. There, sequences of the longest row's length were the
    fastest: on Alpaca's rows they took 0.8 of the time of sequences of 512 tokens, and 0.4 of one sequence of all rows.
    """
    return sum(lengths) if "flash" in str(base.model.config._attn_implementation) else max(lengths)


def packed_tokens(base: FrozenBase, lengths: Sequence[int]) -> int:
    """Compute the tokens of a step's packed sequences, padding included, of rows of these lengths."""
    sequences = pack_lengths(lengths, packed_length(base, lengths))
    return len(sequences) * max(sum(lengths[i] for i in sequence) for sequence in sequences)


@torch.no_grad()
def check_packing(base: FrozenBase) -> None:
    """Refuse a base whose rows would see each other, or whose positions depend on the length of a sequence.

    Raises:
        InvalidConfiguration: Two rows in one sequence have other logits than alone.
    """
    if base.rotary_context is None and _keeps_rows_apart(base):
        return
    raise InvalidConfiguration(
        f"base {base.name} does not keep packed rows apart; leave --packing out, or take another base", param="packing"
    )


def _keeps_rows_apart(base: FrozenBase) -> bool:
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randint(base.model.config.get_text_config().vocab_size, (1, 7), generator=generator).to(base.device)
        for _ in range(2)
    )
    positions = torch.arange(7, device=base.device)[None]
    packed = base.model(
        input_ids=torch.cat([first, second], 1), position_ids=torch.cat([positions, positions], 1), use_cache=False
    ).logits[0, 7:]
    alone = base.model(input_ids=second, use_cache=False).logits[0]
    error = (packed.float() - alone.float()).abs().max()
    return bool(error <= _NOISE.get(base.dtype, 1e-3) * alone.float().abs().max())
