"""Llama bases with random weights, a tokenizer without files, and random adapters for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, ModuleSpec
from benchmarks.gpu.operands import Member
from benchmarks.gpu.setting import Setting
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.layers import adaptable_linears, linear_widths

# As in `byte_tokenizer`; what ends a text is the tokenizer's to say.
_SPECIAL = {"bos_token_id": 256, "eos_token_id": None, "pad_token_id": 258}


def llama_config(small: bool, layers: int) -> LlamaConfig:
    """Llama-3-8B with another number of layers; tiny in small mode."""
    width = 128 if small else 4096
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // (32 if small else 128),
        num_key_value_heads=2 if small else 8,
        vocab_size=512 if small else 128256,
        max_position_embeddings=8192,
        # Wide enough that logits depend on the input.
        initializer_range=width**-0.5,
        **_SPECIAL,
    )


def byte_tokenizer(ends: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, then <bos>, <eos> and <pad>; whether <eos> ends a text.

    Random weights would end generations anywhere, which is good for checks and bad for times.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    end = {"eos_token": "<eos>"} if ends else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", pad_token="<pad>", model_max_length=8192, **end
    )


def large_base(setting: Setting, layers: int, name: str = "random-llama") -> FrozenBase:
    """Llama-3-8B's shape with so many layers, on the device, bfloat16; tiny in small mode, float32 on a CPU."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = LlamaForCausalLM(llama_config(setting.small, layers))
    # Without the device and dtype the base would be moved to the CPU, which takes 19 s.
    dtype = "bfloat16" if setting.on_gpu else "float32"
    return freeze_base(
        model.to(getattr(torch, dtype)), byte_tokenizer(False), name, device=str(setting.device), dtype=dtype
    )


def tiny_base(device: torch.device, dtype: torch.dtype, small: bool) -> FrozenBase:
    """A Llama of a few layers, whose greedy text does not repeat one token: the same weights on every device."""
    torch.manual_seed(0)
    width, layers = (64, 2) if small else (256, 4)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=1024,
        initializer_range=0.3 if small else 0.15,
        **_SPECIAL,
    )
    name = str(dtype).removeprefix("torch.")
    return freeze_base(LlamaForCausalLM(config), byte_tokenizer(True), "tiny-llama", device=str(device), dtype=name)


def random_bundles(
    base: FrozenBase,
    member: Member,
    count: int,
    *,
    strength: float = 0.1,
    only: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    vectors: bool = False,
    seed: int = 0,
) -> Iterator[AdapterBundle]:
    """Adapters of one shape whose updates are about `strength` times each layer's output.

    Args:
        base: Of the adapters.
        member: Rank, split and mixer.
        count: How many. They differ in every factor.
        strength: Of the update; a layer's output is about as large as its input.
        only: Last parts of the paths of the layers to adapt; empty is all.
        labels: Makes them classifiers.
        vectors: Gives each layer a gain and an offset.
        seed: Of the factors.
    """
    shapes = {path: linear_widths(linear) for path, linear in adaptable_linears(base.model).items()}
    if only:
        shapes = {path: widths for path, widths in shapes.items() if path.rpartition(".")[2] in only}
    segment_rank = member.rank // member.split
    modules = {}
    for path, (d_in, d_out) in shapes.items():
        fan_in = d_in / member.split * segment_rank * (member.rank if member.mixer else 1)
        scaling = strength * fan_in**-0.5
        modules[path] = ModuleSpec(
            d_in=d_in,
            d_out=d_out,
            rank=member.rank,
            split=member.split,
            use_mixer=member.mixer,
            scaling=scaling,
            has_gain=vectors,
            has_offset=vectors,
        )
    head = {"labels": list(labels), "pooling": base.default_pooling, "max_length": 64} if labels else {}
    task = "classify" if labels else "generate"
    config = AdapterConfig(task=task, method="sera", base=base.info, modules=modules, **head)  # type: ignore[arg-type]
    for i in range(count):
        # Of the CPU, so that every device gets the same.
        draw = torch.Generator().manual_seed(seed + i)
        tensors = {}
        for path, spec in modules.items():
            sizes = {"sera_a": (spec.d_in, segment_rank), "sera_b": (segment_rank, spec.d_out)}
            if member.mixer:
                sizes["sera_c"] = (member.rank, member.rank)
            for name, size in sizes.items():
                tensors[f"{path}.{name}"] = torch.randn(size, generator=draw).to(base.dtype)
            if vectors:
                tensors[f"{path}.gain"] = 1 + strength * torch.randn(spec.d_out, generator=draw)
                tensors[f"{path}.offset"] = strength * torch.randn(spec.d_out, generator=draw)
        if labels:
            tensors["head.weight"] = torch.randn(len(labels), base.hidden_size, generator=draw)
            tensors["head.bias"] = torch.randn(len(labels), generator=draw)
        yield AdapterBundle(config, tensors)


def store_of(folder: Path, bundles: dict[str, AdapterBundle]) -> AdapterStore:
    """A store with these adapters, by name."""
    store = AdapterStore(folder)
    for name, bundle in bundles.items():
        store.publish(bundle, name)
    return store
