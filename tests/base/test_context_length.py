"""How many tokens a base reads: as many as it has positions for, and its tokenizer allows."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from sera_serve.base import freeze_base
from support.factories import byte_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 40,
}


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        (BertModel(BertConfig(**SHAPE), add_pooling_layer=False), 40),
        # Their positions begin after that of padding.
        (RobertaModel(RobertaConfig(**SHAPE, pad_token_id=1), add_pooling_layer=False), 38),
        (XLMRobertaModel(XLMRobertaConfig(**SHAPE, pad_token_id=1), add_pooling_layer=False), 38),
        (MPNetModel(MPNetConfig(**SHAPE, pad_token_id=1), add_pooling_layer=False), 38),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedModel) else str(value),
)
def test_a_text_is_as_long_as_the_positions_reach(model: PreTrainedModel, tokens: int) -> None:
    tokenizer = byte_tokenizer()
    # What transformers gives where nothing says more.
    tokenizer.model_max_length = int(1e30)
    base = freeze_base(model, tokenizer, "tiny", "encoder")
    assert base.max_length == tokens
    ids = torch.full((1, tokens), 65)
    assert base.hidden_states(ids, torch.ones_like(ids)).isfinite().all()
    longer = torch.full((1, tokens + 1), 65)
    with pytest.raises((IndexError, RuntimeError)):
        base.hidden_states(longer, torch.ones_like(longer))
    tokenizer.model_max_length = 16
    assert base.max_length == 16
