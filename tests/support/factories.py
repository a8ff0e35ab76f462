"""Bases and adapters with random weights, and the expected results from merged weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters_store import Activation, AdapterBundle, AdapterConfig, HeadSpec, ModuleSpec
from sera_serve import SeraConfig, attach_adapter
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.engine.loop.hugging_face import cache_argument
from sera_serve.layers import adapter_tensors, linear_widths, module_specs


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each byte, then <bos>, <eos> and <pad>: 259 tokens, no files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=256,
    )


def random_decoder(seed: int = 0, layers: int = 2) -> FrozenBase:
    """Make a Llama with random weights. The weights are large enough that greedy text does not repeat one token."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=259,
            max_position_embeddings=256,
            initializer_range=0.3,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )
    )
    return freeze_base(model, byte_tokenizer(), "random-llama")


def random_encoder(seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None, layers: int = 2) -> FrozenBase:
    """Make a BERT with random weights."""
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=259,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return freeze_base(
        BertModel(config, add_pooling_layer=False), tokenizer or byte_tokenizer(), "random-bert", "encoder"
    )


def random_adapter(
    base: FrozenBase,
    config: SeraConfig,
    seed: int,
    labels: list[str] | None = None,
    strength: float = 1.0,
    **fields: Any,
) -> AdapterBundle:
    """Make an adapter with an update of about `strength` times each layer's output. With labels, a classifier."""
    generator = torch.Generator().manual_seed(seed)
    shared = base.share_weights()
    layers = attach_adapter(shared.model, config)
    for layer in layers.values():
        for factor in (layer.sera_a, layer.sera_c, layer.sera_b):
            if factor is not None:
                factor.data.normal_(generator=generator)
        weight = layer.base.weight
        assert isinstance(weight, torch.Tensor)
        layer.sera_b.data *= strength * weight.norm() / layer.delta_weight().norm()
    tensors = {name: tensor.clone() for name, tensor in adapter_tensors(shared.model).items()}
    if labels is not None:
        tensors["head.weight"] = torch.randn(len(labels), base.hidden_size, generator=generator)
        tensors["head.bias"] = torch.randn(len(labels), generator=generator)
        fields = {"labels": labels, "pooling": base.default_pooling, "max_length": 64} | fields
    adapter_config = AdapterConfig(
        task="generate" if labels is None else "classify",
        method="sera",
        base=base.info,
        modules={path: ModuleSpec(**spec) for path, spec in module_specs(shared.model).items()},
        **fields,
    )
    return AdapterBundle(adapter_config, tensors)


def with_vectors(
    bundle: AdapterBundle, gain: Collection[str] = (), offset: Collection[str] = (), seed: int = 0
) -> AdapterBundle:
    """The adapter with random gains and offsets in the modules whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    modules, tensors = {}, dict(bundle.tensors)
    for path, spec in bundle.config.modules.items():
        has_gain, has_offset = (path.rpartition(".")[2] in names for names in (gain, offset))
        modules[path] = ModuleSpec(**{**dict(spec), "has_gain": has_gain, "has_offset": has_offset})
        if has_gain:
            tensors[f"{path}.gain"] = 1 + torch.randn(spec.d_out, generator=generator) / 3
        if has_offset:
            tensors[f"{path}.offset"] = torch.randn(spec.d_out, generator=generator)
    fields = {name: value for name, value in dict(bundle.config).items() if name != "format_version"}
    return AdapterBundle(AdapterConfig(**{**fields, "modules": modules}), tensors)


def with_hidden_layer(bundle: AdapterBundle, activation: Activation, width: int, seed: int = 0) -> AdapterBundle:
    """The classifier with a head of two layers."""
    generator = torch.Generator().manual_seed(seed)
    config, tensors = bundle.config, dict(bundle.tensors)
    tensors["head.dense.weight"] = torch.randn(width, config.base.hidden_size, generator=generator) / 4
    tensors["head.dense.bias"] = torch.randn(width, generator=generator)
    tensors["head.weight"] = torch.randn(config.num_labels, width, generator=generator)
    fields = {name: value for name, value in dict(config).items() if name != "format_version"}
    return AdapterBundle(AdapterConfig(**{**fields, "head": HeadSpec(activation=activation, width=width)}), tensors)


def encoded(base: FrozenBase, texts: Sequence[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask` of texts that are cut to `max_length` tokens, on the base's device."""
    padded = base.pad(base.preprocessor.rows(texts, max_length))
    return padded["input_ids"], padded["attention_mask"]


def merged(base: FrozenBase, bundle: AdapterBundle) -> FrozenBase:
    """Return a base with the adapter merged into its weights. The update is computed densely in float64."""
    result = replace(base, model=copy.deepcopy(base.model))
    for path, spec in bundle.config.modules.items():
        linear = result.model.get_submodule(path)
        assert linear_widths(linear) == (spec.d_in, spec.d_out)
        a = torch.block_diag(*bundle.tensors[f"{path}.sera_a"].double().view(spec.split, -1, spec.segment_rank))
        b_blocks = bundle.tensors[f"{path}.sera_b"].double().view(spec.segment_rank, spec.split, -1)
        b = torch.block_diag(*b_blocks.transpose(0, 1))
        mixed = a @ bundle.tensors[f"{path}.sera_c"].double() if spec.use_mixer else a
        delta = spec.scaling * (mixed @ b)
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        gain, offset = (bundle.tensors.get(f"{path}.{name}") for name in ("gain", "offset"))
        gain = torch.ones(spec.d_out) if gain is None else gain
        full = (weight.double() + (delta.T if isinstance(linear, nn.Linear) else delta)) * (
            gain.double()[:, None] if isinstance(linear, nn.Linear) else gain.double()
        )
        weight.data = full.to(weight.dtype)
        old = linear.bias
        if old is not None or offset is not None:
            bias = torch.zeros(spec.d_out) if old is None else old
            assert isinstance(bias, torch.Tensor)
            # A layer of the reference may have a bias that the architecture does not have.
            linear.bias = nn.Parameter(gain * bias + (0 if offset is None else offset), requires_grad=False)
    return result


def continued(base: FrozenBase, tokens: list[int], cache: Any) -> Any:
    """A pass of the model over `tokens` behind those in `cache`."""
    return base.model(torch.tensor([tokens]), use_cache=True, **{cache_argument(base.model): cache})


def greedy(base: FrozenBase, tokens: list[int], max_new_tokens: int) -> list[int]:
    """Return the tokens that transformers' own `generate` gives for one prompt."""
    output = base.model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    return [int(token) for token in output[0, len(tokens) :]]
