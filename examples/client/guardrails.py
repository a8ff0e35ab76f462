"""Sends one text through all classifiers of a tenant in one call, as a guardrail does before a model answers.

python examples/client/guardrails.py --tenant demo "I was charged twice."
"""

from __future__ import annotations

import argparse

from sera_serve.client import Classification, SeraClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", default="I was charged twice.")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--tenant", default="demo")
    options = parser.parse_args()

    with SeraClient(options.url) as client:
        found = client.adapters.iterate(tenant=options.tenant)
        classifiers = [adapter.adapter for adapter in found if adapter.task == "classify"]
        if not classifiers:
            raise SystemExit(f"tenant {options.tenant} has no classifiers")
        for verdict in client.classify_each(options.text, adapters=classifiers[:128]):
            (row,) = verdict.results
            if isinstance(row, Classification):
                print(f"{verdict.adapter}: {row.label} ({row.probabilities[row.label]:.2f})")


if __name__ == "__main__":
    main()
