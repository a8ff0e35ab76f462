"""Held-out bits per byte of the exported model and of its count-based baselines, on exactly the same tokens."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from ngram_baseline import KneserNey, unigram_log2_probabilities
from pretrain_corpus import Corpus, Document, Tokens, encode_documents
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

CONTEXT = 512
CARRIED = 256  # tokens of context that a document's next window repeats, not scored again
BATCH_WINDOWS = 8
STORY_SOURCES = ("cased", "recased", "lower")
BOOK_SOURCES = ("children", "plain", "other")
SPECIAL_IDS_BELOW = 7  # the special tokens have the first ids; only text is scored


@dataclass(frozen=True)
class Score:
    """Bits that a model needs for a held-out text of ``bytes`` UTF-8 bytes and ``tokens`` tokens."""

    bits: float
    bytes: int
    tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Bits divided by UTF-8 bytes: comparable between tokenizers."""
        return self.bits / self.bytes

    def __add__(self, other: "Score") -> "Score":
        return Score(self.bits + other.bits, self.bytes + other.bytes, self.tokens + other.tokens)


def byte_count(documents: list[Document]) -> int:
    """UTF-8 bytes of the documents' text."""
    return sum(len(document.text.encode()) for document in documents)


def windows_of(ids: list[int]) -> list[tuple[list[int], int]]:
    """Windows of at most CONTEXT tokens that cover ``ids``, each with the number of leading tokens not to score."""
    windows, scored = [], 1
    while scored < len(ids):
        start = max(0, scored - CARRIED) if scored > 1 else 0
        window = ids[start : start + CONTEXT]
        windows.append((window, scored - start))
        scored = start + len(window)
    return windows


@torch.no_grad()
def batch_bits(model: LlamaForCausalLM, batch: list[tuple[list[int], int]]) -> tuple[float, int]:
    """Bits and number of scored tokens of some windows. Padding on the right is harmless: the model is causal."""
    length = max(len(window) for window, _ in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), length), -100)
    for row, (window, skipped) in enumerate(batch):
        tokens = torch.tensor(window)
        ids[row, : len(window)] = tokens
        scored = torch.where(tokens >= SPECIAL_IDS_BELOW, tokens, -100)
        targets[row, skipped : len(window)] = scored[skipped:]
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    labels = targets[:, 1:].flatten().to(model.device)
    nats = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum")
    return float(nats) / float(np.log(2)), int((labels >= 0).sum())


def score_model(model: LlamaForCausalLM, tokenizer: Tokenizer, documents: list[Document]) -> Score:
    """Score ``model`` on whole documents, each begun with ``<|bos|>``."""
    windows = [window for ids in encode_documents(tokenizer, documents) for window in windows_of(ids)]
    bits, tokens = 0.0, 0
    for first in range(0, len(windows), BATCH_WINDOWS):
        more_bits, more_tokens = batch_bits(model, windows[first : first + BATCH_WINDOWS])
        bits, tokens = bits + more_bits, tokens + more_tokens
    return Score(bits, byte_count(documents), tokens)


def score_baseline(log2_p: npt.NDArray[np.float64], stream: npt.NDArray[np.uint16], documents: list[Document]) -> Score:
    """Score from the log2 probabilities of the last ``len(log2_p)`` tokens of the documents' stream."""
    text = stream[-len(log2_p) :] >= SPECIAL_IDS_BELOW
    return Score(float(-log2_p[text].sum()), byte_count(documents), int(text.sum()))


def held_out_stream(tokenizer: Tokenizer, documents: list[Document], context: int = 4) -> Tokens:
    """The documents laid end to end, after ``context`` special tokens that give the first token a context."""
    bos_only = [0] * context
    return np.array(bos_only + [i for ids in encode_documents(tokenizer, documents) for i in ids], dtype=np.uint16)


def baseline_scores(tokenizer: Tokenizer, corpus: Corpus, streams: dict[str, Tokens]) -> dict[str, dict[str, Score]]:
    """Scores by baseline, then by held-out set.

    The 5-gram is counted twice: over all training text, and over the training text of the held-out set's own kind
    (which is the better one for stories: the model sees them more often than their share of the text).
    """
    groups = {"stories": STORY_SOURCES, "books": BOOK_SOURCES}
    everything = np.concatenate([streams[source] for group in groups.values() for source in group])
    held_out = {name: held_out_stream(tokenizer, documents) for name, documents in corpus.held_out.items()}
    scores: dict[str, dict[str, Score]] = {"unigram": {}, "kneser_ney_5": {}, "kneser_ney_5_own_kind": {}}
    counted = KneserNey(everything)
    for name, stream in held_out.items():
        documents = corpus.held_out[name]
        own = np.concatenate([streams[source] for source in groups[name]])
        by_baseline = {
            "unigram": unigram_log2_probabilities(everything, stream),
            "kneser_ney_5": counted.log2_probabilities(stream),
            "kneser_ney_5_own_kind": KneserNey(own).log2_probabilities(stream),
        }
        for baseline, log2_p in by_baseline.items():
            scores[baseline][name] = score_baseline(log2_p, stream, documents)
    return scores


def as_table(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, float]]:
    """Bits per byte by model for stories, books, and both together (all bits over all bytes)."""
    table: dict[str, dict[str, float]] = {}
    for model, by_set in scores.items():
        together = by_set["stories"] + by_set["books"]
        row = {name: score.bits_per_byte for name, score in (by_set | {"together": together}).items()}
        table[model] = {name: round(value, 4) for name, value in row.items()}
    return table


def as_rows(scores: dict[str, dict[str, Score]]) -> dict[str, dict[str, dict[str, float]]]:
    """The scores as plain JSON."""
    return {model: {name: asdict(score) for name, score in by_set.items()} for model, by_set in scores.items()}


def held_out_model(directory: Path) -> LlamaForCausalLM:
    """The exported model in ``directory``, computing in float32 from its bfloat16 weights."""
    model = LlamaForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
