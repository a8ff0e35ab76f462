"""The native client: text, a stream, a classification, a weighted sum, and many requests at once.

make serve                                  # in another terminal
python examples/client/native_client.py
"""

from __future__ import annotations

import argparse
import asyncio

from sera_serve.client import AdapterNotFoundError, AsyncSeraClient, Classification, SeraClient

PROMPT = "The little cat found a map."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    url = parser.parse_args().url

    with SeraClient(url) as client:
        print("adapters:", *(adapter.adapter for adapter in client.adapters.iterate()))

        answer = client.generate(PROMPT, adapter="demo/pirate", max_new_tokens=40)
        print(f"\n{answer.adapter} v{answer.version}: {answer.text}")

        print("\nthe base model: ", end="")
        with client.stream(PROMPT, max_new_tokens=40, temperature=0.8, seed=1) as events:
            for event in events:
                print(event.text, end="", flush=True)

        tickets = client.classify(["My parcel is late.", "I was charged twice."], adapter="demo/tickets")
        print("\n\ntickets:", *(row.label for row in tickets.results if isinstance(row, Classification)))

        half = client.generate(PROMPT, adapter={"demo/pirate": 0.5}, max_new_tokens=40)
        print(f"\nhalf a pirate ({half.adapter}): {half.text}")

        try:
            client.generate(PROMPT, adapter="demo/nobody")
        except AdapterNotFoundError as error:
            print("\nrefused:", error)

    texts = asyncio.run(ask_all(url, ["Once", "One day", "In a far land"]))
    print("\nat once:", *texts, sep="\n- ")


async def ask_all(url: str, prompts: list[str]) -> list[str]:
    async with AsyncSeraClient(url) as client:
        answers = await asyncio.gather(*(client.generate(prompt, max_new_tokens=12) for prompt in prompts))
    return [prompt + answer.text for prompt, answer in zip(prompts, answers, strict=True)]


if __name__ == "__main__":
    main()
