"""What adapters cost: many in one batch against the base model, PEFT's ways, and transformers' own `generate`.

    python -m benchmarks.mixed_batch [--quick]

Every case runs the same 16 prompts (64 for `sera_64`, against 64 on the base model) on Llama-shaped random bases with
all seven linear layers adapted, on the CPU in float32. Systems run in processes of their own, one case at a time,
interleaved in rounds; the figure is the median. Outputs are checked first, and no speed is reported where one is wrong.
The last line is one JSON object.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.last_line import tell
from benchmarks.system_process import SystemProcess
from benchmarks.systems import Setting, base_system, generate_system, peft_system, served_system

CASES = ["base", "enabled_base_only", "sera_1", "sera_16", "sera_64", "peft_mixed_16", "peft_swap_16", "hf_generate_16"]
ENGINE_CASES = ["base", "enabled_base_only", "sera_1", "sera_16", "base_64", "sera_1_of_64", "sera_64"]
SYSTEM_OF = {
    "base": base_system,
    "base_64": base_system,
    "enabled_base_only": served_system,
    "sera_1": served_system,
    "sera_16": served_system,
    "sera_1_of_64": served_system,
    "sera_64": served_system,
    "hf_generate_16": generate_system,
    "peft_mixed_16": peft_system,
    "peft_swap_16": peft_system,
}


def measure(setting: Setting, cases: list[str], rounds: int, console: Console) -> dict[str, list[float]]:
    """Tokens per second of each case in each round; empty where an output is wrong."""
    systems = {system: SystemProcess(system, setting) for system in {SYSTEM_OF[case] for case in cases}}
    try:
        # Also the warm-up: every engine case has run once when it is over.
        wrong = check(systems, cases)
        if wrong:
            console.print(f"{setting}: wrong output in {', '.join(wrong)}; no speed is reported")
            return {}
        speeds: dict[str, list[float]] = {case: [] for case in cases}
        for _ in track(range(rounds), f"width {setting.width}, rank {setting.rank}", console=console):
            for case in cases:
                speeds[case].append(systems[SYSTEM_OF[case]].run(case).tokens_per_s)
        return speeds
    finally:
        for system in systems.values():
            system.close()


def check(systems: dict[Any, SystemProcess], cases: list[str]) -> list[str]:
    """Cases whose tokens are not those of `generate` on the base, or on the base with the adapter merged."""
    got = {case: systems[SYSTEM_OF[case]].run(case).outputs for case in cases}
    generate = systems[generate_system]
    wrong = [case for case in ("base", "enabled_base_only") if case in got and got[case] != got["hf_generate_16"]]
    if "sera_16" not in cases:
        return wrong
    for index in (0, 7, 15):
        want = generate.run(f"merged_{index}").outputs
        wrong += [f"{case}, adapter {index}" for case in ("sera_16", "sera_64") if got[case][index] != want[index]]
        if index == 0 and not (got["sera_1"] == got["sera_1_of_64"][:16] == want):
            wrong.append("sera_1")
    return wrong


def row(setting: Setting, case: str, speeds: dict[str, list[float]]) -> dict[str, Any]:
    """One row; ratios are medians of the ratios of each round, so that a slow moment hits both sides."""

    def ratio(to: str) -> float:
        pairs = zip(speeds[case], speeds[to], strict=True)
        return round(statistics.median(mine / other for mine, other in pairs), 3)

    result: dict[str, Any] = {"width": setting.width, "rank": setting.rank, "case": case}
    result["tokens_per_s"] = round(statistics.median(speeds[case]), 1)
    result["ratio_to_base"] = ratio("base_64" if case == "sera_64" else "base")
    if case == "sera_64":
        result["ratio_to_one_adapter"] = ratio("sera_1_of_64")
    return result


def main(
    quick: Annotated[bool, typer.Option(help="One small base, one round: about half a minute.")] = False,
    width: Annotated[list[int] | None, typer.Option(help="Widths of the bases.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; fewer at 2048 wide.")] = 7,
    peft: Annotated[bool, typer.Option(help="Also measure PEFT.")] = True,
) -> None:
    """Measure, print a table, then one JSON line."""
    console = Console(stderr=True)
    widths = [256] if quick else width or [256, 512, 1024, 2048]
    cases = [*ENGINE_CASES, "hf_generate_16", *(["peft_mixed_16", "peft_swap_16"] if peft else [])]
    rows: list[dict[str, Any]] = []
    long_prompts: list[dict[str, Any]] = []
    correct = True
    for w in widths:
        layers, new, times = (2, 8, 1) if quick else (4, 32, rounds) if w < 2048 else (4, 16, max(1, rounds // 2))
        for rank in [16] if quick else [16, 64]:
            setting = Setting(w, rank, layers, 32, new)
            speeds = measure(setting, cases, times, console)
            correct &= bool(speeds)
            rows += [row(setting, case, speeds) for case in CASES if case in speeds]
        setting = Setting(w, 16, layers, 256, new)
        speeds = measure(setting, ["base", "hf_generate_16"], times, console)
        correct &= bool(speeds)
        long_prompts += [row(setting, case, speeds) for case in speeds]
    for title, listed in (("prompts of 32 tokens", rows), ("prompts of 256 tokens", long_prompts)) if correct else ():
        table = Table("width", "rank", "case", "tokens/s", "ratio to base", title=title)
        for r in listed:
            table.add_row(*(str(r[key]) for key in ("width", "rank", "case", "tokens_per_s", "ratio_to_base")))
        console.print(table)
    tell("mixed_batch", rows, correct=correct, prompts_of_256=long_prompts)


if __name__ == "__main__":
    typer.run(main)
