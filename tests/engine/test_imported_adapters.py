"""Imported PEFT adapters in one batch give, token for token, what PEFT itself generates."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig

from adapters_store import AdapterStore, compress_bundle
from sera_serve.base import FrozenBase
from sera_serve.engine import GenerationResult, Principal, ServingEngine
from sera_serve.errors import AdapterTooLarge
from sera_serve.residency import import_probe
from support.engine import collect
from support.peft_checkpoints import peft_states, quiet, read, save_checkpoint

Start = Callable[..., ServingEngine]
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 1}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "bias": {"lora_bias": True},
    "bdlora": {
        "target_modules": ["q_proj", "o_proj"],
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
    },
}
PROMPT, NEW_TOKENS = "Once upon a time", 12


def peft_tokens(base: FrozenBase, folder: Path) -> list[int]:
    tokens = base.tokenizer(PROMPT)["input_ids"]
    with quiet(), torch.no_grad():
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder)).eval()
        whole = model.generate(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=base.tokenizer.pad_token_id,
        )
    return [int(token) for token in whole[0, len(tokens) :]]


def test_peft_adapters_generate_what_peft_generates(
    decoder: FrozenBase, store: AdapterStore, start_engine: Start, tmp_path: Path
) -> None:
    engine = start_engine(decoder, store)
    expected: dict[str, list[int]] = {}
    for seed, (row, fields) in enumerate(ROWS.items()):
        folder = save_checkpoint(decoder.model, tmp_path / row, seed=seed, **fields)
        imported = engine.import_checkpoint(read(folder))
        store.publish(imported.bundle, f"acme/{row}")
        expected[f"acme/{row}"] = peft_tokens(decoder, folder)
        if row == "plain":
            # A SeRA of the LoRA's rank in every block is the LoRA.
            exact = compress_bundle(imported.bundle, split=2, rank=8, max_error=1e-6)
            store.publish(exact, "acme/compressed")
            expected["acme/compressed"] = expected["acme/plain"]

    async def together() -> list[GenerationResult]:
        calls = [collect(engine, adapter=name, prompt=PROMPT, max_new_tokens=NEW_TOKENS) for name in expected]
        return await asyncio.gather(*calls)

    for (name, tokens), result in zip(expected.items(), asyncio.run(together()), strict=True):
        assert result.token_ids == tokens, name
    assert len({tuple(tokens) for tokens in expected.values()}) >= len(ROWS) - 1


def test_a_checkpoint_that_does_not_fit_the_pool_is_refused(
    decoder: FrozenBase,
    store: AdapterStore,
    start_engine: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start_engine(decoder, store, pool_mib=1)
    folder = save_checkpoint(decoder.model, tmp_path, r=256, target_modules="all-linear")
    # The comparison would take many times the memory of the factors.
    monkeypatch.setattr(import_probe, "largest_error", lambda *_: pytest.fail("compared"))
    files = read(folder)
    # Those of an archive may be zeros, of which a MB expands to a GB.
    monkeypatch.setattr(files.weights, "data", lambda: pytest.fail("read"))
    with pytest.raises(AdapterTooLarge, match="raise pool_mib"):
        engine.import_checkpoint(files)


def test_an_embedding_adapter_of_an_encoder_gives_the_states_of_peft(
    encoder: FrozenBase, store: AdapterStore, start_engine: Start, tmp_path: Path
) -> None:
    engine = start_engine(encoder, store)
    folder = save_checkpoint(
        encoder.model, tmp_path / "vectors", target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"
    )
    store.publish(engine.import_checkpoint(read(folder)).bundle, "acme/vectors")

    def mean(model: torch.nn.Module) -> torch.Tensor:
        tokens = torch.tensor([encoder.tokenizer(PROMPT)["input_ids"]])
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.mean(1)[0]

    expected = peft_states(encoder.model, folder, mean)
    result = asyncio.run(engine.embed("acme/vectors", [PROMPT], Principal("acme"), pooling="mean", normalize=False))
    assert torch.allclose(torch.from_numpy(result.vectors[0]).double(), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(mean(encoder.model).double(), expected, rtol=1e-2)
