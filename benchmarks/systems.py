"""The systems that `mixed_batch` compares."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.batch_driver import BatchDriver, Run
from benchmarks.fleet import Fleet
from benchmarks.llama_bases import VOCABULARY, llama_base
from benchmarks.system_process import Case, System
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase, merge_adapter

ADAPTERS = 64


@dataclass(frozen=True)
class Setting:
    """What all systems of one comparison share; prompts and weights follow from it."""

    width: int
    rank: int
    layers: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self) -> Tensor:
        """int64 (64, prompt_tokens)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(1, VOCABULARY, (ADAPTERS, self.prompt_tokens), generator=generator)

    def fleet(self, base: FrozenBase) -> Fleet:
        """SeRA with split = rank on all linear layers; an update is a tenth of each layer's weight."""
        return Fleet(base, (SeraConfig(self.rank, self.rank, 2.0 * self.rank, "all-linear"),), strength=0.1)


def static_generate(model: Any, prompts: Tensor, new_tokens: int, **options: Any) -> Run:
    """transformers' `generate` on one batch of prompts of one length."""
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )
    seconds = time.perf_counter() - start
    return Run([row[prompts.shape[1] :].tolist() for row in output], seconds)


def base_system(setting: Setting) -> System:
    """The engine over the unmodified base."""
    engine = BatchDriver(llama_base(setting.width, setting.layers), None, ADAPTERS)
    prompts = setting.prompts().tolist()
    cases = {
        "base": lambda: engine.run(prompts[:16], [None] * 16, setting.new_tokens),
        "base_64": lambda: engine.run(prompts, [None] * ADAPTERS, setting.new_tokens),
    }
    return System(cases, engine.close)


def served_system(setting: Setting) -> System:
    """The engine with 64 adapters on the device."""
    base = llama_base(setting.width, setting.layers)
    fleet = setting.fleet(base)
    engine = BatchDriver(base, [fleet.bundle(index) for index in range(ADAPTERS)], ADAPTERS)
    prompts, every, new = setting.prompts().tolist(), list(range(ADAPTERS)), setting.new_tokens
    cases = {
        "enabled_base_only": lambda: engine.run(prompts[:16], [None] * 16, new),
        "sera_1": lambda: engine.run(prompts[:16], every[:1] * 16, new),
        "sera_16": lambda: engine.run(prompts[:16], every[:16], new),
        "sera_1_of_64": lambda: engine.run(prompts, every[:1] * ADAPTERS, new),
        "sera_64": lambda: engine.run(prompts, every, new),
    }
    return System(cases, engine.close)


def generate_system(setting: Setting) -> System:
    """transformers' `generate` on the base model, and what it gives with one adapter merged."""
    base = llama_base(setting.width, setting.layers)
    prompts, fleet = setting.prompts(), setting.fleet(base)

    def merged(index: int) -> Run:
        one = replace(base, model=copy.deepcopy(base.model))
        merge_adapter(one, fleet.bundle(index))
        return static_generate(one.model, prompts[:16], setting.new_tokens)

    cases: dict[str, Case] = {f"merged_{index}": lambda index=index: merged(index) for index in (0, 7, 15)}
    cases["hf_generate_16"] = lambda: static_generate(base.model, prompts[:16], setting.new_tokens)
    return System(cases)


def peft_system(setting: Setting) -> System:
    """16 LoRA adapters of the same rank: PEFT's mixed batch, and one adapter at a time."""
    prompts = setting.prompts()[:16]
    config = LoraConfig(
        r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear", init_lora_weights=False
    )
    names = [f"a{i}" for i in range(len(prompts))]
    model = get_peft_model(llama_base(setting.width, setting.layers).model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()

    def swap() -> Run:
        outputs = []
        start = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            model.set_adapter(name)
            outputs += static_generate(model, prompt[None], setting.new_tokens).outputs
        return Run(outputs, time.perf_counter() - start)

    def mixed() -> Run:
        return static_generate(model, prompts, setting.new_tokens, adapter_names=names)

    return System({"peft_mixed_16": mixed, "peft_swap_16": swap})
