"""Trains a model by the calls of OpenAI's client, shows its loss, and asks it: `python examples/fine_tune.py`."""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

from openai import OpenAI

SUBJECTS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey"]


def example_rows() -> bytes:
    """Chats in which the assistant likes every colour."""
    answer = {"role": "assistant", "content": "I like it too!"}
    rows = [{"messages": [{"role": "user", "content": f"I like {word}."}, answer]} for word in SUBJECTS]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--key", default="none", help="a key with the scopes train and infer, where one is needed")
    parser.add_argument("--model", default="embedded", help="the base, or an adapter to go on from")
    parser.add_argument("--file", type=Path, help="JSONL of messages; by default eight chats")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    client = OpenAI(base_url=f"{options.url}/v1", api_key=options.key)

    rows = example_rows() if options.file is None else options.file.read_bytes()
    file = client.files.create(file=("rows.jsonl", io.BytesIO(rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=options.model,
        training_file=file.id,
        suffix="colours",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": options.epochs}}},
        # No part of OpenAI's interface: the shape of the adapter.
        extra_body={} if options.model != "embedded" else {"adapter": {"rank": 8, "split": 4}},
    )
    print("job", job.id)
    seen = ""
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        for event in reversed(events):
            if not seen or int(event.id.split("-")[1]) > int(seen.split("-")[1]):
                print(event.message)
                seen = event.id
        if job.finished_at is not None:
            break
        time.sleep(0.5)
    if job.fine_tuned_model is None:
        raise SystemExit(f"the job has {job.status}: {job.error and job.error.message}")

    messages = [{"role": "user", "content": "I like yellow."}]
    answer = client.chat.completions.create(model=job.fine_tuned_model, messages=messages, max_tokens=20, temperature=0)
    print(f"{job.fine_tuned_model}: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
