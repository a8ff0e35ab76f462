"""What adapters cost: many in one batch against the bare base, PEFT's ways, and transformers' own `generate`.

    python -m benchmarks.mixed_batch [--quick]

Every case runs the same 16 prompts (64 for `sera_64`, against a bare batch of 64) on Llama-shaped random bases with all
seven linear layers adapted, on the CPU in float32. Cases are interleaved in rounds; the figure is the median. Outputs
are checked first, and no speed is reported where one is wrong. The last line is one JSON object.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.batch_driver import BatchDriver, Run
from benchmarks.llama_bases import VOCABULARY, llama_base, sera_adapter
from sera_kernels import BARE_BASE
from sera_serve.base import FrozenBase
from sera_serve.merging import merge_adapter

CASES = ["base", "enabled_bare", "sera_1", "sera_16", "sera_64", "peft_mixed_16", "peft_swap_16", "hf_generate_16"]
Case = Callable[[], Run]


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


def peft_cases(base: FrozenBase, rank: int, prompts: Tensor, new_tokens: int) -> dict[str, Case]:
    """16 LoRA adapters of one rank: PEFT's mixed batch, and one adapter at a time."""
    shared = base.share_weights().model
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    names = [f"a{i}" for i in range(len(prompts))]
    model = get_peft_model(shared, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()

    def swap() -> Run:
        runs = []
        for name, prompt in zip(names, prompts, strict=True):
            start = time.perf_counter()
            model.set_adapter(name)
            run = static_generate(model, prompt[None], new_tokens)
            runs.append(Run(run.outputs, time.perf_counter() - start))
        return Run([run.outputs[0] for run in runs], sum(run.seconds for run in runs))

    def mixed() -> Run:
        return static_generate(model, prompts, new_tokens, adapter_names=names)

    return {"peft_mixed_16": mixed, "peft_swap_16": swap}


def measure(
    width: int, rank: int, layers: int, prompt_tokens: int, new_tokens: int, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """Rows of one base and rank; empty where an output is wrong."""
    base = llama_base(width, layers)
    adapters = [sera_adapter(base, rank, seed) for seed in range(64)]
    bare = BatchDriver(base, None, 64)
    served = BatchDriver(base, adapters, 64)
    prompts = torch.randint(1, VOCABULARY, (64, prompt_tokens), generator=torch.Generator().manual_seed(1))
    lists, slots = prompts.tolist(), served.slots
    cases: dict[str, Case] = {
        "base": lambda: bare.run(lists[:16], [BARE_BASE] * 16, new_tokens),
        "enabled_bare": lambda: served.run(lists[:16], [BARE_BASE] * 16, new_tokens),
        "sera_1": lambda: served.run(lists[:16], slots[:1] * 16, new_tokens),
        "sera_16": lambda: served.run(lists[:16], slots[:16], new_tokens),
        "hf_generate_16": lambda: static_generate(base.model, prompts[:16], new_tokens),
        "base_64": lambda: bare.run(lists, [BARE_BASE] * 64, new_tokens),
        "sera_1_of_64": lambda: served.run(lists, slots[:1] * 64, new_tokens),
        "sera_64": lambda: served.run(lists, slots, new_tokens),
    } | peft_cases(base, rank, prompts[:16], new_tokens)
    try:
        wrong = check(base, cases, adapters, prompts, new_tokens)
        if wrong:
            console.print(f"width {width}, rank {rank}: wrong output in {', '.join(wrong)}; no speed is reported")
            return []
        speeds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                speeds[name].append(case().tokens_per_s)
    finally:
        bare.close()
        served.close()
    return [row(width, rank, case, speeds) for case in CASES]


def row(width: int, rank: int, case: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """One row; ratios are medians of the ratios of each round, so that a slow moment hits both sides."""

    def ratio(to: str) -> float:
        return statistics.median(mine / other for mine, other in zip(speeds[case], speeds[to], strict=True))

    result: dict[str, Any] = {"width": width, "rank": rank, "case": case}
    result["tokens_per_s"] = round(statistics.median(speeds[case]), 1)
    result["ratio_to_base"] = round(ratio("base_64" if case == "sera_64" else "base"), 3)
    if case == "sera_64":
        result["ratio_to_one_adapter"] = round(ratio("sera_1_of_64"), 3)
    return result


def check(base: FrozenBase, cases: dict[str, Case], adapters: list[Any], prompts: Tensor, new_tokens: int) -> list[str]:
    """Cases whose tokens are not those of `generate` on the base, or on the base with the adapter merged."""
    reference = static_generate(base.model, prompts[:16], new_tokens).outputs
    wrong = [name for name in ("base", "enabled_bare") if cases[name]().outputs != reference]
    mixed, one, many = cases["sera_16"]().outputs, cases["sera_1"]().outputs, cases["sera_64"]().outputs
    for index in (0, 7, 15):
        merged = replace(base, model=copy.deepcopy(base.model))
        merge_adapter(merged, adapters[index])
        want = static_generate(merged.model, prompts[:16], new_tokens).outputs
        if mixed[index] != want[index] or many[index] != want[index]:
            wrong.append(f"adapter {index} among others")
        if index == 0 and one != want:
            wrong.append("sera_1")
    return wrong


def main(
    quick: Annotated[bool, typer.Option(help="One small base, one round: seconds.")] = False,
) -> None:
    """Measure, print a table, then one JSON line."""
    console = Console(stderr=True)
    shapes = [(256, 16)] if quick else [(width, rank) for width in (256, 512, 1024, 2048) for rank in (16, 64)]
    rows: list[dict[str, Any]] = []
    correct = True
    for width, rank in shapes:
        console.print(f"width {width}, rank {rank}")
        rounds = 1 if quick else 5 if width < 2048 else 3
        measured = measure(width, rank, 2 if quick else 4, 32, 8 if quick else 32, rounds, console)
        correct &= bool(measured)
        rows += measured
    table = Table("width", "rank", "case", "tokens/s", "ratio to base")
    for r in rows:
        table.add_row(*(str(r[key]) for key in ("width", "rank", "case", "tokens_per_s", "ratio_to_base")))
    console.print(table)
    typer.echo(json.dumps({"benchmark": "mixed_batch", "correct": correct, "rows": rows if correct else []}))
    if not correct:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
