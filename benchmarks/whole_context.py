"""What it costs that requests ask for the whole context and stop early, as clients without a limit do.

    python -m benchmarks.whole_context [--quick]

64 requests of 32 prompt tokens and 32 new tokens run on a cache of 4,096 tokens, which holds all 64. In one case each
asks for 32 new tokens; in the other each asks for the rest of the context, and its client ends it after 32. Where
requests enter by the worst case, the second runs 4 at a time; where they enter by the pages in use, it runs as the
first. The last line is one JSON object.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.batch_driver import BatchDriver
from benchmarks.last_line import tell
from benchmarks.llama_bases import VOCABULARY, llama_base

REQUESTS, PROMPT, NEW, CACHE = 64, 32, 32, 4096


def main(
    quick: Annotated[bool, typer.Option(help="One small base, two rounds: a few seconds.")] = False,
    width: Annotated[int, typer.Option(help="Width of the base.")] = 256,
    rounds: Annotated[int, typer.Option(help="Rounds; both cases run in each.")] = 7,
) -> None:
    """Measure, print a table, then one JSON line."""
    base = llama_base(64 if quick else width, 1 if quick else 4)
    context = base.max_length
    driver = BatchDriver(base, None, REQUESTS, kv_cache_tokens=CACHE, max_batch_tokens=512)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, VOCABULARY, (REQUESTS, PROMPT), generator=generator).tolist()
    cases = {"asks for 32": None, "asks for the rest of the context": context - PROMPT}
    outputs, speeds = {}, {case: [] for case in cases}  # type: ignore[var-annotated]
    most = dict.fromkeys(cases, 0)
    try:
        for round_ in track(range((2 if quick else rounds) + 1), "rounds", console=Console(stderr=True)):
            for case, asked in cases.items():
                run = driver.run(prompts, [None] * REQUESTS, NEW, asked=asked)
                outputs[case] = run.outputs
                # The first round warms up.
                if round_:
                    speeds[case].append(run.tokens_per_s)
                most[case] = max(most[case], driver.most_running)
                driver.most_running = 0
    finally:
        driver.close()
    first, second = cases
    correct = outputs[first] == outputs[second]
    ratio = statistics.median(a / b for a, b in zip(speeds[first], speeds[second], strict=True))
    table = Table("case", "tokens/s", "at a time")
    rows = []
    for case in cases:
        speed = statistics.median(speeds[case])
        table.add_row(case, f"{speed:.0f}", str(most[case]))
        rows.append({"case": case, "tokens_per_s": round(speed, 1), "at_a_time": most[case]})
    rows.append({"case": "time a token, second over first", "ratio": round(ratio, 3)})
    shown = (table, f"time a token, second over first: {ratio:.2f}") if correct else ("wrong output",)
    Console(stderr=True).print(*shown)
    tell("whole_context", rows, correct=correct)


if __name__ == "__main__":
    typer.run(main)
