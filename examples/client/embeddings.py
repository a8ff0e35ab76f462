"""Finds the texts that are nearest to a question, by the embeddings of the base or of an adapter.

python examples/client/embeddings.py --model demo/tickets
"""

from __future__ import annotations

import argparse

from sera_serve.client import SeraClient

TEXTS = [
    "My parcel is late and the tracking number does not work.",
    "I was charged twice for one order.",
    "The app closes when I open my profile.",
    "How do I change the address of a delivery?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", help="an adapter's reference; by default the base")
    parser.add_argument("--question", default="Where is my package?")
    options = parser.parse_args()

    with SeraClient(options.url) as client:
        model = options.model or client.models.list(limit=1).data[0].id
        answer = client.embed([options.question, *TEXTS], model=model)
    question, *vectors = answer.vectors
    # The vectors have length 1, so that the product is the cosine.
    scores = [sum(a * b for a, b in zip(question, vector, strict=True)) for vector in vectors]
    print(f"{model}, vectors of {len(question)} numbers, {answer.usage.prompt_tokens} tokens")
    for score, text in sorted(zip(scores, TEXTS, strict=True), reverse=True):
        print(f"{score:6.3f}  {text}")


if __name__ == "__main__":
    main()
