"""Rotary scaling that depends on the batch: each sequence gets the frequencies that it has alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from sera_serve.base import FrozenBase, ModelInputs, freeze_base
from sera_serve.base.rotary import (
    LONG,
    SHORT,
    PerSequenceRotary,
    RotaryContext,
    RotaryScaling,
    install_per_sequence_rotary,
    rotary_scaling,
    row_lengths,
)
from sera_serve.errors import InvalidConfiguration
from support.factories import byte_tokenizer, continued, encoded, greedy

THRESHOLD = 32
SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "short_factor": [1.0] * 8,
    "long_factor": [8.0] * 8,
    "original_max_position_embeddings": THRESHOLD,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "phi3": lambda: Phi3Config(original_max_position_embeddings=THRESHOLD, rope_parameters=dict(LONGROPE), **SHAPE),
    "phimoe, an attention factor a side": lambda: PhimoeConfig(
        original_max_position_embeddings=THRESHOLD,
        rope_parameters=LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.9},
        num_local_experts=2,
        num_experts_per_tok=1,
        **SHAPE,
    ),
    "llama": lambda: LlamaConfig(rope_parameters=dict(LONGROPE), **SHAPE),
    "gemma3, one type of layer": lambda: Gemma3TextConfig(
        head_dim=16,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": dict(LONGROPE),
        },
        **SHAPE,
    ),
}
every_longrope = pytest.mark.parametrize("architecture", CONFIGS)


def tiny(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval().requires_grad_(False)


def frozen(model: PreTrainedModel) -> FrozenBase:
    return freeze_base(copy.deepcopy(model), byte_tokenizer(), "tiny")


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: PreTrainedModel, sequence: list[int]) -> Tensor:
    """Logits (length, vocabulary) of the stock model for one sequence in one pass."""
    return model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]


def packed(model: PreTrainedModel, sequences: list[list[int]]) -> list[Tensor]:
    """Logits of each sequence, all of them in one row that a block-diagonal causal mask divides."""
    lengths = [len(sequence) for sequence in sequences]
    blocks = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
    mask = torch.zeros(blocks.shape).masked_fill(~blocks, torch.finfo(torch.float32).min)[None, None]
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    masks = dict.fromkeys(getattr(model.config, "layer_types", None) or [], mask) or mask
    output = model(input_ids=ids, position_ids=positions[None], attention_mask=masks, use_cache=False)
    return list(output.logits[0].split(lengths))


def long_tokens(sequences: list[list[int]], scaling: RotaryScaling) -> Tensor:
    return torch.tensor([scaling.side(len(sequence)) == LONG for sequence in sequences for _ in sequence])


def differ(got: list[Tensor], want: list[Tensor]) -> list[bool]:
    return [not torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(got, want, strict=True)]


PAIR = [tokens(20, 1), tokens(60, 2)]


@every_longrope
def test_packed_sequences_do_not_change_each_other(architecture: str) -> None:
    model = tiny(architecture)
    want = [alone(model, sequence) for sequence in PAIR]
    # What this is about: the stock module gives the short sequence the long sequence's frequencies.
    assert differ(packed(model, PAIR), want) == [True, False]
    base = frozen(model)
    context = base.rotary_context
    assert context is not None
    context.long_tokens = long_tokens(PAIR, base.rotary)
    assert differ(packed(base.model, PAIR), want) == [False, False]


@pytest.mark.parametrize("lengths", [(THRESHOLD,), (THRESHOLD + 1,), (1, THRESHOLD, THRESHOLD + 1), (5, 6)])
def test_the_threshold_itself_is_on_the_short_side(lengths: tuple[int, ...]) -> None:
    model = tiny("phi3")
    base = frozen(model)
    sequences = [tokens(length, seed) for seed, length in enumerate(lengths)]
    assert base.rotary_context is not None
    base.rotary_context.long_tokens = long_tokens(sequences, base.rotary)
    got = packed(base.model, sequences)
    assert differ(got, [alone(model, sequence) for sequence in sequences]) == [False] * len(lengths)


def test_a_packed_batch_without_long_sequences_needs_no_mask() -> None:
    model = tiny("phi3")
    sequences = [tokens(20, 1), tokens(THRESHOLD, 2)]
    got = packed(frozen(model).model, sequences)
    assert differ(got, [alone(model, sequence) for sequence in sequences]) == [False, False]


@every_longrope
def test_padded_rows_do_not_change_each_other(architecture: str) -> None:
    model = tiny(architecture)
    base = frozen(model)
    lengths = [5, THRESHOLD, THRESHOLD + 1, 60]
    batch = base.pad([ModelInputs.of(tokens(length, length)) for length in lengths])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    want = [
        model.base_model(input_ids=row[None, :length]).last_hidden_state[0]
        for row, length in zip(ids, lengths, strict=True)
    ]
    stock = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert differ([row[:n] for row, n in zip(stock, lengths, strict=True)], want) == [True, True, False, False]
    got = base.hidden_states(ids, mask)
    assert differ([row[:n] for row, n in zip(got, lengths, strict=True)], want) == [False] * 4
    assert base.rotary_context is not None and base.rotary_context.long_tokens is None


def test_without_a_mask_each_row_of_positions_decides() -> None:
    model = tiny("phi3")
    base = frozen(model)
    ids = torch.tensor([PAIR[0] + [258] * 40, PAIR[1]])
    mask = (ids != 258).long()
    got = base.model(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(1) - 1, use_cache=False).logits
    assert differ([got[0, :20], got[1]], [alone(model, sequence) for sequence in PAIR]) == [False, False]


def test_chunks_of_a_long_prompt_give_what_the_whole_prompt_gives() -> None:
    model = tiny("phi3")
    base = frozen(model)
    context, sequence = base.rotary_context, PAIR[1]
    assert context is not None

    def chunked(long: bool) -> Tensor:
        cache, logits = None, []
        for first in range(0, len(sequence), 16):
            chunk = sequence[first : first + 16]
            context.long_tokens = torch.full((len(chunk),), long)
            output = continued(base, chunk, cache)
            cache = output.past_key_values
            logits.append(output.logits[0])
        return torch.cat(logits)

    want = alone(model, sequence)
    assert differ([chunked(True), chunked(False)], [want, want]) == [False, True]


def decoded(base: FrozenBase, prompt: list[int], count: int, *, recompute: bool) -> list[int]:
    """Greedy decoding with a cache that is dropped when the sequence changes sides, if `recompute`."""
    sequence, cache, side = list(prompt), None, base.rotary.side(len(prompt))
    context = base.rotary_context
    assert context is not None
    for _ in range(count):
        if recompute and base.rotary.side(len(sequence)) != side:
            cache, side = None, base.rotary.side(len(sequence))
        fed = sequence if cache is None else sequence[-1:]
        context.long_tokens = torch.full((len(fed),), base.rotary.side(len(sequence)) == LONG)
        output = continued(base, fed, cache)
        cache = output.past_key_values
        sequence.append(int(output.logits[0, -1].argmax()))
    context.long_tokens = None
    return sequence[len(prompt) :]


@pytest.mark.parametrize("length", [8, THRESHOLD - 1, THRESHOLD, THRESHOLD + 1])
def test_a_sequence_that_crosses_the_threshold_gives_what_generate_gives(length: int) -> None:
    stock = frozen(tiny("phi3"))
    base = frozen(tiny("phi3"))
    for module in list(stock.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PerSequenceRotary):
                setattr(module, name, child.rotary)
    stock.model.generation_config.eos_token_id = base.model.generation_config.eos_token_id = None
    prompt = tokens(length, 5)
    want = greedy(stock, prompt, 40)
    assert decoded(base, prompt, 40, recompute=True) == want
    assert greedy(base, prompt, 40) == want
    assert (decoded(base, prompt, 40, recompute=False) != want) == (length <= THRESHOLD)


def test_two_model_objects_can_run_at_the_same_time() -> None:
    model = tiny("phi3")
    base = frozen(model)
    shared = base.share_weights()
    assert shared.rotary_context is not None and shared.rotary_context is not base.rotary_context
    assert shared.model.get_input_embeddings().weight is base.model.get_input_embeddings().weight
    pointers = [
        {buffer.data_ptr() for module in rotaries(each.model) for buffer in module.buffers()} for each in (base, shared)
    ]
    assert pointers[0] and not pointers[0] & pointers[1]
    want = [alone(model, sequence) for sequence in PAIR]

    def run(each: FrozenBase, index: int) -> bool:
        return any(differ([alone(each.model, PAIR[index])], [want[index]])[0] for _ in range(20))

    with ThreadPoolExecutor(2) as threads:
        assert not any(threads.map(run, (base, shared), (0, 1)))


def rotaries(model: PreTrainedModel) -> list[PerSequenceRotary]:
    return [module for module in model.modules() if isinstance(module, PerSequenceRotary)]


def test_installing_twice_changes_nothing() -> None:
    model = tiny("phi3")
    context = install_per_sequence_rotary(model)
    before = rotaries(model)
    assert install_per_sequence_rotary(model) is context
    assert rotaries(model) == before and len(before) == 1
    assert rotary_scaling(model) == RotaryScaling("longrope", THRESHOLD)


def test_sides() -> None:
    longrope, dynamic = RotaryScaling("longrope", 32), RotaryScaling("dynamic", 32)
    assert [longrope.side(length) for length in (1, 32, 33)] == [SHORT, SHORT, LONG]
    assert dynamic.side(33) == RotaryScaling("fixed").side(1 << 20) == SHORT


@pytest.mark.parametrize("parameters", [None, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}])
def test_other_bases_keep_their_modules(parameters: dict[str, Any] | None) -> None:
    base = frozen(AutoModelForCausalLM.from_config(LlamaConfig(rope_parameters=parameters, **SHAPE)))
    assert base.rotary == RotaryScaling("fixed")
    assert base.rotary_context is None and not rotaries(base.model)
    # No batch for them says anything about sides.
    ids, mask = encoded(base, ["ab", "abc"], 64)
    assert base.hidden_states(ids, mask).shape == (2, 3, 64)


def test_dynamic_scaling_is_served_up_to_the_length_at_which_it_begins() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(rope_parameters=dict(DYNAMIC), **SHAPE | {"max_position_embeddings": 48})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    base = frozen(model)
    assert base.rotary == RotaryScaling("dynamic", 48)
    assert base.max_length == 48
    # Up to this length, sequences do not change each other; one token more changes its neighbour.
    for length, changes in ((48, False), (49, True)):
        pair = [PAIR[0], tokens(length, 2)]
        fresh = copy.deepcopy(model)
        want = [alone(copy.deepcopy(model), sequence) for sequence in pair]
        assert differ(packed(fresh, pair), want) == [changes, False]


def test_a_base_that_cannot_be_served_by_sequence_is_refused_by_name() -> None:
    parameters = {
        "sliding_attention": dict(LONGROPE),
        "full_attention": LONGROPE | {"original_max_position_embeddings": 64},
    }
    config = Gemma3TextConfig(
        head_dim=16, layer_types=["sliding_attention", "full_attention"], rope_parameters=parameters, **SHAPE
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InvalidConfiguration, match="'two lengths' cannot be served") as raised:
        freeze_base(model, byte_tokenizer(), "two lengths")
    assert raised.value.param == "base"
    assert "longrope from 32 tokens, longrope from 64 tokens" in raised.value.message


def test_scaling_whose_modules_cannot_be_found_is_refused() -> None:
    model = tiny("phi3")
    del model.base_model.rotary_emb.rope_type
    with pytest.raises(InvalidConfiguration, match="no rotary module"):
        freeze_base(model, byte_tokenizer(), "tiny")


def test_a_block_of_rows_is_undone_after_a_failure() -> None:
    context = RotaryContext(4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match="inside"), row_lengths(context, mask):
        assert context.long_tokens is not None
        assert context.long_tokens.tolist() == [[True] * 5, [False] * 5]
        raise ValueError("inside")
    assert context.long_tokens is None
