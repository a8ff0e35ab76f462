"""Text of a given form: a model of pydantic, a regular expression, a grammar.

python examples/client/structured_output.py --adapter demo/pirate
"""

from __future__ import annotations

import argparse
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sera_serve.client import SeraClient


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog", "bird"]
    is_big: bool
    legs: Literal[2, 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--adapter", help="an adapter's reference; by default the base")
    options = parser.parse_args()
    adapter = options.adapter

    with SeraClient(options.url) as client:
        answer = client.generate(
            "The animal is ", adapter=adapter, response_format=Animal, max_new_tokens=120, temperature=1.0, seed=3
        )
        # An answer that was cut by max_new_tokens is only the beginning of a form.
        print(Animal.model_validate_json(answer.text) if answer.finish_reason == "stop" else answer.text)
        date = client.generate("Today is ", adapter=adapter, regex="20[0-9]{2}-[01][0-9]", max_new_tokens=20)
        print(date.text)
        grammar = 'start: MOVE ("," MOVE)*\nMOVE: "left" | "right" | "up" | "down"'
        moves = client.generate("Go ", adapter=adapter, grammar=grammar, max_new_tokens=20, temperature=1.0, seed=3)
        print(moves.text)


if __name__ == "__main__":
    main()
