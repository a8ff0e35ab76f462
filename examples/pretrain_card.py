"""The model card of the embedded base, written from the run's log, its measured scores and fresh samples."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from pretrain_corpus import HELD_OUT_BOOKS, HELD_OUT_STORIES
from pretrain_run import CONTEXT, DECAY_MIX, STABLE_MIX, RunSettings
from transformers import AutoTokenizer, LlamaForCausalLM

matplotlib.use("Agg")
from matplotlib import pyplot

TEMPERATURE, TOP_P, SEED, NEW_TOKENS = 0.7, 0.95, 0, 120
PROMPTS = (
    "Once upon a time",
    "One day, Tom and his sister went to the sea.",
    "The old man opened the door and",
    "Alice looked at the letter for a long time.",
)
REQUEST = "Tell me a story about a dragon."
SOURCES = {
    "cased": "TinyStories, as published (about 4,000 stories)",
    "recased": "other TinyStories of a lower-cased copy, capitals restored by rule",
    "lower": "TinyStories, lower-cased",
    "requests": "the cased and re-cased stories as answers to a made-up request, in the chat template",
    "children": "children's books (Baum, Nesbit, Carroll, Grimm, Andersen, Spyri, Montgomery, ...)",
    "plain": "plain prose (Christie, Doyle, Wells, Verne, London, Twain, Wodehouse, ...)",
    "other": "other prose (Dickens, Wharton, Chesterton, Kipling, ...)",
}


@dataclass(frozen=True)
class Sample:
    """One generation: ``prompt`` as typed, and the model's continuation ``text``."""

    prompt: str
    text: str


@torch.no_grad()
def generate_samples(directory: Path) -> list[Sample]:
    """Generate one sample per prompt, each from the same seed, without selection or editing."""
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    model = LlamaForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": REQUEST}], tokenize=False, add_generation_prompt=True
    )
    samples = []
    for shown, text, special in [(p, p, True) for p in PROMPTS] + [(f"(chat) {REQUEST}", chat, False)]:
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special, return_token_type_ids=False)
        torch.manual_seed(SEED)
        output = model.generate(
            **inputs, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, max_new_tokens=NEW_TOKENS
        )
        written = output[0, inputs["input_ids"].shape[1] :]
        samples.append(Sample(shown, tokenizer.decode(written, skip_special_tokens=True)))
    return samples


def read_log(work: Path) -> list[dict[str, Any]]:
    """The run's log rows: step, tokens, seconds, loss (nats, smoothed), tokens_per_s."""
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def plot_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Smoothed training loss against tokens seen, as a small PNG."""
    figure, axes = pyplot.subplots(figsize=(5, 3), dpi=90)
    axes.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], linewidth=1)
    axes.set(xlabel="million tokens seen", ylabel="training loss, nats per token", ylim=(None, 6))
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def score_table(tables: dict[str, dict[str, float]]) -> str:
    """Bits per byte as a Markdown table."""
    names = {
        "unigram": "token unigram",
        "kneser_ney_5": "Kneser-Ney 5-gram, all training text",
        "kneser_ney_5_own_kind": "Kneser-Ney 5-gram, training text of the same kind only",
        "model": "**this model**",
    }
    lines = ["| | stories | books | together |", "|---|---|---|---|"]
    for key, name in names.items():
        row = tables[key]
        lines.append(f"| {name} | {row['stories']:.3f} | {row['books']:.3f} | {row['together']:.3f} |")
    return "\n".join(lines)


def mix_table(streams: dict[str, int], tokens: int, settings: RunSettings) -> str:
    """The sources with their sizes and sampling weights as a Markdown table."""
    lines = ["| source | tokens | weight | weight in the decay | times seen |", "|---|---|---|---|---|"]
    for source, text in SOURCES.items():
        weight = STABLE_MIX[source] * (1 - settings.decay_share) + DECAY_MIX[source] * settings.decay_share
        passes = weight * tokens / streams[source]
        lines.append(
            f"| {text} | {streams[source] / 1e6:.2f}M | {STABLE_MIX[source]:.0%} | {DECAY_MIX[source]:.0%} "
            f"| about {passes:.1f} |"
        )
    return "\n".join(lines)


def render_card(work: Path, directory: Path, streams: dict[str, int], machine: str) -> str:
    """The card's Markdown; reads ``baselines.json`` and ``evaluation.json`` of the run, and writes samples anew."""
    # The checkpoint, not the log: the log has a row for every tenth step only.
    last = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)["position"]
    measured = [json.loads((work / name).read_text()) for name in ("baselines.json", "evaluation.json")]
    tables = measured[0]["table"] | measured[1]["table"]
    sizes = measured[1]["scores"]["model"]
    quotes = "\n\n".join(
        f"Prompt: `{sample.prompt}`\n\n```text\n{sample.text}\n```" for sample in generate_samples(directory)
    )
    return CARD.format(
        table=score_table(tables),
        mix=mix_table(streams, last["tokens"], RunSettings(minutes=1)),
        tokens=f"{last['tokens'] / 1e6:.1f}",
        steps=f"{last['step']:,}",
        minutes=f"{last['seconds'] / 60:.0f}",
        speed=f"{last['tokens'] / last['seconds']:,.0f}",
        machine=machine,
        stories=HELD_OUT_STORIES,
        books=", ".join(f"`{name}`" for name in HELD_OUT_BOOKS),
        story_bytes=f"{sizes['stories']['bytes']:,}",
        book_bytes=f"{sizes['books']['bytes']:,}",
        samples=quotes,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=SEED,
        new_tokens=NEW_TOKENS,
        context=CONTEXT,
    )


CARD = """# Embedded base model

A small decoder that ships inside the package, so that the server runs with no download. It exists to try, test and
benchmark adapters on a model that writes readable simple English. It is not a useful assistant.

## Architecture

`LlamaForCausalLM`: 5 layers, hidden 256, 8 heads of 32, 4 key-value heads, intermediate 640, RMSNorm, SwiGLU, RoPE
(theta 10,000), no biases, input and output embeddings tied. 4,492,032 parameters (3.44M in the layers, 1.05M in the
embedding), stored in bfloat16 (9 MB). Context {context} tokens. Every width is a multiple of 64, so block-diagonal
adapters may use split 64.

Tokenizer: byte-level BPE, 4,096 tokens, digits one by one, no normalisation: any UTF-8 text round-trips exactly.
Ids 0 to 6 are `<|bos|> <|eos|> <|pad|> <|system|> <|user|> <|assistant|> <|end|>`; `<|bos|>` is put first.

## Training

{tokens} million tokens in {steps} steps of 8,192 tokens, {minutes} minutes of training time
({speed} tokens a second on average). Machine: {machine}.

bfloat16 autocast over float32 weights. Muon (rate 0.02) for the layers'
matrices, AdamW (rate 0.004) for the embedding and the norms; rate warmed up for 1.5% of the time, flat, then linear
to zero over the last 27% of the time. In the decay the mix leans more on stories.

![training loss](training_curve.png)

{mix}

Sources and licences: books of the public domain, from the GitHub repository `mlschmitt/classic-books-markdown`;
TinyStories (Eldan and Li, 2023), CDLA-Sharing-1.0. Books were stripped of titles, headings and markdown and cut into
passages of about 1,800 characters.

## Held-out text

Never trained on: {stories} TinyStories ({story_bytes} bytes; their lower-cased copies and near copies were removed from
the training text, by shared runs of eight words) and three whole books ({book_bytes} bytes):
{books}.
Other books of the same three authors were trained on.

Bits per UTF-8 byte, lower is better; the same tokens scored for all (special tokens not scored):

{table}

The 5-grams are interpolated modified Kneser-Ney over the same tokenizer, counted on all of the training text (without
the request form, which repeats the stories); the model's windows are drawn from that text at random, and of the books
it saw the share that the table above gives.
"Of the same kind" counts stories only for the stories column and books only for the books column. The model is
scored as shipped (bfloat16 weights), in windows of at most {context} tokens, each document on its own.

## Samples

Temperature {temperature}, top-p {top_p}, seed {seed} set before each, at most {new_tokens} new tokens, one try each,
unedited. They are what the model writes after the prompt.

{samples}

## Limits

- It writes short, simple scenes; the thread is lost within a few sentences, names and pronouns get mixed up.
- It knows no facts, does no arithmetic and follows no instructions: asked for a story it tells one, and often
  leaves the subject it was given.
- Books of the nineteenth and early twentieth century carry the attitudes of their time; outputs are unfiltered.
- English only. Text beyond {context} tokens was never seen in training.
- The `<|system|>` token was never seen in training: it is there for adapters to give it a meaning.
- Stories were seen several times, also in the request form (table above): it may repeat training stories in part.

## Retrain

```sh
TEXT="--data ../shared/data/text --work ../pretrain" MODEL=sera_serve/embedded_base
python examples/pretrain_embedded_base.py train $TEXT --minutes 63
python examples/pretrain_embedded_base.py export --work ../pretrain --output $MODEL
python examples/pretrain_embedded_base.py baselines $TEXT
python examples/pretrain_embedded_base.py evaluate $TEXT --model $MODEL
python examples/pretrain_embedded_base.py card $TEXT --model $MODEL
```

`train` resumes from its last checkpoint when run again after an interruption, and uses a CUDA GPU if there is one.
The length of the run is set in minutes, so another machine sees another number of tokens.
"""
