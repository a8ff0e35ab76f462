"""OpenAI's own client: `model` is an adapter's reference, or the base's name. Needs `pip install openai`.

make serve                                  # in another terminal
python examples/client/openai_client.py
"""

from __future__ import annotations

import argparse

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--key", default="none", help="a key with the scope infer, where one is needed")
    parser.add_argument("--model", default="demo/chat", help="an adapter with a chat template")
    options = parser.parse_args()

    with openai.OpenAI(base_url=f"{options.url}/v1", api_key=options.key) as client:
        print("models:", *(model.id for model in client.models.list()))

        chat = client.chat.completions.create(
            model=options.model,
            messages=[{"role": "user", "content": "I lost my red ball."}],
            max_tokens=40,
            temperature=0,
        )
        print("\nchat:", chat.choices[0].message.content)

        print("\nstream: ", end="")
        with client.chat.completions.create(
            model=options.model,
            messages=[{"role": "user", "content": "Tell me about the sea."}],
            max_tokens=40,
            temperature=0,
            stream=True,
        ) as chunks:
            for chunk in chunks:
                print(chunk.choices[0].delta.content or "", end="", flush=True)

        base = client.models.list().data[0].id
        completion = client.completions.create(model=base, prompt="Once upon a time", max_tokens=20, temperature=0)
        print(f"\n\n{base}:", completion.choices[0].text)

        try:
            client.completions.create(model="demo/nobody", prompt="Once")
        except openai.NotFoundError as error:
            print("\nrefused:", error.message)


if __name__ == "__main__":
    main()
