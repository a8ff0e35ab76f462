"""What the loop stands on in transformers: each public interface by itself, so that a changed one is named."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import sera_serve.engine
from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.config import ServeSettings
from sera_serve.engine import GenerationResult, ServingEngine
from sera_serve.engine.loop import hugging_face
from sera_serve.engine.loop.attention import KeyValuePool, Part, StepContext, running
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.torch_attention import TorchAttention
from sera_serve.errors import InvalidConfiguration
from support.engine import SHAPE, Start, collect
from support.factories import byte_tokenizer, random_adapter

GROUPED: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
IDS = torch.tensor([[5, 6, 7, 5, 6]])


def test_the_number_and_the_dtype_of_logits_are_those_of_a_pass() -> None:
    """Some models have more logits than their configuration says, and of another dtype than their weights."""
    paged = PagedModel(LlamaForCausalLM(LlamaConfig(**GROUPED)).to(torch.bfloat16))
    assert (paged.vocabulary, paged.logits_dtype) == (259, torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED)).to(torch.bfloat16)
    head = nn.Linear(64, 260, dtype=torch.bfloat16)
    head.register_forward_hook(lambda module, arguments, output: output.float())
    model.set_output_embeddings(head)
    paged = PagedModel(model)
    assert (paged.vocabulary, paged.logits_dtype, paged.dtype) == (260, torch.float32, torch.bfloat16)


class Calls(Cache):  # type: ignore[misc]
    """A cache that keeps nothing, and notes what it is given; what it returns is what attention must see."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.updates: list[tuple[int, Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.updates.append((layer_idx, key_states, value_states))
        return key_states + 1, value_states + 2


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The arguments of each call of an attention function that is registered as `sera_test`, with no mask."""
    calls: list[dict[str, Any]] = []

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
        calls.append({"module": module, "query": query, "key": key, "value": value, "mask": mask, **others})
        return torch.zeros_like(query).transpose(1, 2), None

    masks: list[dict[str, Any]] = []

    def no_mask(*args: Any, **others: Any) -> None:
        masks.append(others)

    AttentionInterface.register("sera_test", attention)
    AttentionMaskInterface.register("sera_test", no_mask)
    yield calls
    assert len(masks) == 1, "the registered mask is asked for once a pass"


def handed(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """A cache as an argument of a forward pass, under the name that this release of transformers has for it."""
    return {hugging_face.cache_argument(model): cache}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**GROUPED)).eval()


@torch.no_grad()
def test_a_registered_attention_function_is_called_for_every_layer(attended: list[dict[str, Any]]) -> None:
    model = llama()
    before = model(input_ids=IDS).logits
    model.set_attn_implementation("sera_test")
    after = model(input_ids=IDS, use_cache=True, **handed(model, Calls())).logits
    assert [call["module"].layer_idx for call in attended] == [0, 1]
    for call in attended:
        assert call["query"].shape == (1, 4, 5, 16)
        assert call["key"].shape == call["value"].shape == (1, 2, 5, 16), "heads are not repeated for a group"
        assert call["scaling"] == 16**-0.5
        assert call["mask"] is None, "the registered mask is what attention gets"
    assert not torch.equal(before, after), "what it returns is used"


@torch.no_grad()
def test_a_cache_object_is_handed_keys_and_values_of_every_layer(attended: list[dict[str, Any]]) -> None:
    model, cache = llama(), Calls()
    model.set_attn_implementation("sera_test")
    model(input_ids=IDS, use_cache=True, **handed(model, cache))
    assert [layer for layer, _, _ in cache.updates] == [0, 1]
    for (_, key, value), call in zip(cache.updates, attended, strict=True):
        assert key.shape == value.shape == (1, 2, 5, 16)
        assert torch.equal(call["key"], key + 1) and torch.equal(call["value"], value + 2)


@torch.no_grad()
def test_position_ids_turn_each_token_by_its_own_position(attended: list[dict[str, Any]]) -> None:
    model, cache = llama(), Calls()
    model.set_attn_implementation("sera_test")
    # Two sequences packed into one row: the second begins at position 0 again.
    model(input_ids=IDS, position_ids=torch.tensor([[0, 1, 2, 0, 9]]), use_cache=True, **handed(model, cache))
    _, keys, values = cache.updates[0]
    # The same token, at the same position and at another one.
    torch.testing.assert_close(keys[:, :, 0], keys[:, :, 3])
    torch.testing.assert_close(values[:, :, 1], values[:, :, 4])
    assert not torch.allclose(keys[:, :, 1], keys[:, :, 4], atol=0.1)


@torch.no_grad()
def test_logits_to_keep_takes_an_index_of_tokens() -> None:
    model = llama()
    everything = model(input_ids=IDS, logits_to_keep=0).logits
    assert everything.shape == (1, 5, 259)
    index = torch.tensor([1, 4])
    torch.testing.assert_close(model(input_ids=IDS, logits_to_keep=index).logits, everything[:, index])


def paged(model: PreTrainedModel) -> tuple[PagedModel, StepContext]:
    """A model and a step of one token on its scratch page."""
    served = PagedModel(model)
    pool = KeyValuePool(served.shapes, 1, served.dtype, served.device, TorchAttention())
    return served, StepContext(pool, torch.zeros(1, dtype=torch.int64), [Part(1, torch.tensor([1]).numpy())])


ONE = torch.zeros(1, 1, dtype=torch.int64)


@torch.no_grad()
def test_steps_are_not_nested_and_the_model_runs_within_a_step_alone() -> None:
    served, step = paged(llama())
    with pytest.raises(RuntimeError, match="outside a step"):
        served.model(input_ids=ONE)
    with running(step), pytest.raises(RuntimeError, match="already running"):
        served.logits(ONE, ONE, step, 0)
    assert served.logits(ONE, ONE, step, 0).shape == (1, 259), "a step that failed leaves nothing behind"


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"indexer": 1, "alibi": torch.zeros(1)}, "alibi, indexer"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
@torch.no_grad()
def test_an_argument_of_attention_that_is_not_known_is_refused_by_name(
    argument: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, step = paged(llama())
    forward = type(served.model.model.layers[0].self_attn).forward

    def with_argument(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs, **argument)

    monkeypatch.setattr(type(served.model.model.layers[0].self_attn), "forward", with_argument)
    with pytest.raises(InvalidConfiguration, match=f"LlamaAttention takes {named}, which") as refusal:
        served.logits(ONE, ONE, step, 0)
    assert refusal.value.param == "base"
    # None is how models say that they do not use an argument.
    monkeypatch.setattr(
        type(served.model.model.layers[0].self_attn),
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, **kwargs, position_bias=None, is_causal=True),
    )
    served.logits(ONE, ONE, step, 0)


def test_an_engine_refuses_such_a_base_before_it_serves(
    decoder: FrozenBase, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = type(decoder.model.model.layers[0].self_attn)
    forward = attention.forward

    def with_argument(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Accepted by the model's own attention, which the shapes are learned from.
        extra = {"position_bias": torch.zeros(1)} if self.config._attn_implementation == "sera_paged" else {}  # type: ignore[union-attr]
        return forward(self, *args, **kwargs, **extra)

    monkeypatch.setattr(attention, "forward", with_argument)
    with pytest.raises(InvalidConfiguration, match="position_bias"):
        ServingEngine(decoder, store, ServeSettings(pool_mib=1, kv_cache_tokens=64))


def not_causal_by_its_config() -> PreTrainedModel:
    config = LlamaConfig(**GROUPED)
    config.is_causal = False
    return LlamaForCausalLM(config)


def not_causal_by_its_modules() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(Gemma3TextConfig(head_dim=16, use_bidirectional_attention=True, **GROUPED))


def causal_within_chunks() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        Llama4TextConfig(head_dim=16, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=64, **GROUPED)
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (not_causal_by_its_config, "attention that is not causal"),
        (not_causal_by_its_modules, "attention that is not causal"),
        (causal_within_chunks, "chunked_attention"),
    ],
)
def test_a_mask_that_attention_is_not_told_of_is_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(InvalidConfiguration, match=named):
        PagedModel(make().eval())


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
def test_what_lies_in_pages_of_others_does_not_matter(
    compiled: bool, decoder: FrozenBase, store: AdapterStore, start_engine: Start
) -> None:
    store.publish(random_adapter(decoder, SHAPE, 1), "a/one")
    prompts = ["x" * length for length in (1, 31, 32, 33, 70, 100)]

    def run(engine: ServingEngine) -> list[list[int]]:
        async def all_at_once() -> list[GenerationResult]:
            asked = [(prompt, adapter) for prompt in prompts for adapter in (None, "a/one")]
            return await asyncio.gather(*(collect(engine, prompt=p, adapter=a, max_new_tokens=40) for p, a in asked))

        return [result.token_ids for result in asyncio.run(all_at_once())]

    want = run(start_engine(decoder, store))
    engine = ServingEngine(decoder, store, ServeSettings(pool_mib=8, kv_cache_tokens=1024, max_batch_tokens=50))
    runner = engine.runners["generate"].runner
    runner._compiled = runner._compiled and compiled
    for pages in runner.decoder.pool._stores.values():
        pages.fill_(float("nan"))
    engine.start()
    try:
        assert run(engine) == want
        assert run(engine) == want, "in pages that others have left"
    finally:
        engine.stop()


def test_one_file_of_the_engine_imports_models() -> None:
    """The loop's file for models; `stream` and `structured` name a tokenizer's type and no more."""
    folder = Path(sera_serve.engine.__file__).parent
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "transformers" for name in names):
                assert isinstance(node, ast.ImportFrom) and node.module == "transformers", "public names alone"
                found.setdefault(str(path.relative_to(folder)), set()).update(alias.name for alias in node.names)
    assert set(found) == {"loop/hugging_face.py", "stream.py", "structured.py"}
    assert found["stream.py"] == found["structured.py"] == {"PreTrainedTokenizerBase"}


def test_a_base_with_such_experts_is_served_without_reading_the_device() -> None:
    """`grouped_mm` has no loop over experts, for which the device would be read."""
    config = GptOssConfig(head_dim=16, num_local_experts=2, num_experts_per_tok=1, **GROUPED)
    base = freeze_base(AutoModelForCausalLM.from_config(config), byte_tokenizer(), "tiny")
    served, _ = paged(base.model)
    assert served.model.config._experts_implementation == "grouped_mm"
