"""Text for pre-training the embedded base: reading, tidying, holding out, and token streams.

A document is a story, or a passage of a book cut at a paragraph. Each document becomes
``<|bos|> text <|eos|>`` (passages that end in mid-chapter have no ``<|eos|>``), and the documents of a source
are laid end to end in one token stream. Training windows are cut from the streams at random places.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.uint16]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN]

HELD_OUT_STORIES = 80
HELD_OUT_BOOKS = (
    "agatha-christie-the-murder-on-the-links",
    "edith-nesbit-the-railway-children",
    "l-frank-baum-ozma-of-oz",
)
CHILDREN_AUTHORS = (
    "anna-sewell", "beatrix-potter", "carlo-collodi", "edith-nesbit", "george-macdonald-the-princess",
    "hans-christian-andersen", "hugh-lofting", "johanna-spyri", "kenneth-grahame", "l-frank-baum",
    "lewis-carroll", "rudyard-kipling-the-jungle", "the-brothers-grimm", "frances-hodgson-burnett-a-little",
    "frances-hodgson-burnett-the-secret", "howard-pyle", "james-stephens-irish", "louisa-may-alcott-little",
    "lucy-maud-montgomery",
)  # fmt: skip
PLAIN_AUTHORS = (
    "agatha-christie", "arthur-conan-doyle", "edgar-rice-burroughs", "h-g-wells", "jack-london",
    "johann-david-wyss", "john-buchan", "jules-verne", "louisa-may-alcott", "p-g-wodehouse",
    "robert-louis-stevenson", "willa-cather", "mark-twain", "edith-wharton-ethan-frome",
)  # fmt: skip
TYPOGRAPHY = {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u200b": "", "\u2060": "", "\xa0": " "}
PASSAGE_CHARACTERS = 1800  # about one context of 512 tokens
SHINGLE_WORDS = 8
OVERLAP_LIMIT = 0.2  # share of a story's word shingles also found elsewhere that makes it a copy
# A letter that opens a sentence or a quotation; not "he" of: "Why?" he asked.
SENTENCE_START = re.compile(
    r"""((?:^|[.!?]\s+|[.!?]["']\s+(?!(?:\w+ ){1,3}(?:said|asked|cried|shouted|replied|exclaimed|called|yelled)\b)"""
    r"""|\n|(?:^|[\s,])")["']?)([a-z])"""
)
REQUESTS = ("Tell me a story about {}.", "Write a short story about {}.", "Please tell me a story with {} in it.")


@dataclass(frozen=True)
class Document:
    """One text. ``complete`` says that the text ends where its author ended it."""

    text: str
    complete: bool = True


@dataclass
class Corpus:
    """Training documents by source, and the held-out ones (``stories`` and ``books``)."""

    training: dict[str, list[Document]] = field(default_factory=dict)
    held_out: dict[str, list[Document]] = field(default_factory=dict)


def tidy(text: str) -> str:
    """Remove markdown and typographic noise that a small model would waste capacity on."""
    for fancy, plain in TYPOGRAPHY.items():
        text = text.replace(fancy, plain)
    text = re.sub(r"\\([^\w\s])", r"\1", text)
    text = re.sub(r"[*_`]+|^\s*>+ ?", "", text, flags=re.M)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_book(text: str) -> list[Document]:
    """Passages of at least PASSAGE_CHARACTERS, cut between paragraphs; headings end a chapter and are dropped."""
    _, _, body = text.partition("-------")
    documents: list[Document] = []
    for chapter in re.split(r"^#+.*$|^ *[-*_]{3,} *$", body or text, flags=re.M):
        passage = ""
        for paragraph in tidy(chapter).split("\n\n"):
            passage = f"{passage}\n\n{paragraph}" if passage else paragraph
            if len(passage) >= PASSAGE_CHARACTERS:
                documents.append(Document(passage, complete=False))
                passage = ""
        if len(passage) > 40:
            documents.append(Document(passage))
    return documents


def book_class(name: str) -> str:
    """The sampling class of a book, by author: ``children``, ``plain`` or ``other``."""
    if name.startswith(CHILDREN_AUTHORS):
        return "children"
    return "plain" if name.startswith(PLAIN_AUTHORS) else "other"


def shingles(text: str) -> set[str]:
    """Runs of SHINGLE_WORDS words, lower-cased and without punctuation."""
    words = re.findall(r"[a-z]+", text.lower())
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def overlaps(text: str, known: set[str]) -> bool:
    """Whether ``text`` copies, in whole or in part, a text whose shingles are ``known``."""
    own = shingles(text)
    return len(own & known) > OVERLAP_LIMIT * len(own)


def learn_casing(stories: list[str]) -> dict[str, str]:
    """Words that are mostly capitalised in mid-sentence (names, Mom, I), by their lower-case form."""
    counts: dict[str, Counter[str]] = {}
    for story in stories:
        for word in re.findall(r"(?<=[a-z,] )[A-Za-z']+", story):
            counts.setdefault(word.lower(), Counter())[word] += 1
    usual = {lower: forms.most_common(1)[0][0] for lower, forms in counts.items()}
    return {lower: form for lower, form in usual.items() if form != lower}


def restore_case(text: str, casing: dict[str, str]) -> str:
    """Capitalise sentence starts and the words that ``casing`` knows."""
    text = re.sub(r"[a-z']+", lambda match: casing.get(match[0], match[0]), text)
    return SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)


def as_request(story: str, random_source: random.Random) -> Document:
    """The story as an answer to a request that names a word of it, in the chat template's form."""
    words = [word for word, n in Counter(re.findall(r"\b[a-z]{4,}\b", story)).items() if n >= 3]
    names = re.findall(r"(?<=[a-z] )[A-Z][a-z]{2,}", story)
    subject = random_source.choice(names[:1] or ["a friend"])
    if words and random_source.random() < 0.5:
        subject = f"the word {random_source.choice(words)}"
    request = random_source.choice(REQUESTS).format(subject)
    if random_source.random() < 0.15:
        request = "Tell me a story."
    return Document(f"<|user|>\n{request}<|end|>\n<|assistant|>\n{story}<|end|>\n")


def read_stories(data: Path, corpus: Corpus, seed: int) -> None:
    """Add the TinyStories sources: cased, lower-cased, re-cased (new ones of the lower file), requests."""
    with (data / "tinystories_cased.jsonl").open(encoding="utf-8") as lines:
        cased = [tidy(json.loads(line)["text"]) for line in lines]
    lower = re.split(r"(?<!\n)\n(?!\n)", (data / "tinystories_lower.txt").read_text(encoding="utf-8"))
    lower = [text for text in map(tidy, lower) if len(text) > 150]
    random_source = random.Random(seed)
    random_source.shuffle(cased)
    held_out, rest = cased[:HELD_OUT_STORIES], cased[HELD_OUT_STORIES:]
    secret = set[str]().union(*map(shingles, held_out))
    rest = [text for text in rest if not overlaps(text, secret)]
    lower = [text for text in lower if not overlaps(text, secret)]
    known = set[str]().union(*map(shingles, rest))
    casing = learn_casing(rest)
    recased = [restore_case(text, casing) for text in lower if not overlaps(text, known)]
    corpus.held_out["stories"] = [Document(text) for text in held_out]
    corpus.training["cased"] = [Document(text) for text in rest]
    corpus.training["recased"] = [Document(text) for text in recased]
    corpus.training["lower"] = [Document(text) for text in lower]
    corpus.training["requests"] = [as_request(text, random_source) for text in rest + recased]


def read_corpus(data: Path, seed: int = 0) -> Corpus:
    """Read ``data`` (``tinystories_cased.jsonl``, ``tinystories_lower.txt``, ``books/*.txt``).

    Raises FileNotFoundError if a story file is missing and ValueError if a held-out book is.
    """
    corpus = Corpus()
    read_stories(data, corpus, seed)
    corpus.held_out["books"] = []
    missing = set(HELD_OUT_BOOKS)
    for path in sorted((data / "books").glob("*.txt")):
        documents = split_book(path.read_text(encoding="utf-8"))
        if path.stem in HELD_OUT_BOOKS:
            missing.discard(path.stem)
            corpus.held_out["books"] += documents
        else:
            corpus.training.setdefault(book_class(path.stem), []).extend(documents)
    if missing:
        raise ValueError(f"held-out books not found in {data / 'books'}: {', '.join(sorted(missing))}")
    return corpus


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of ``token``; raises KeyError if the tokenizer lacks it."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return found


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> list[list[int]]:
    """Token ids of each document, ``<|bos|>`` first and ``<|eos|>`` last where it is complete."""
    bos, eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
    encoded = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    return [
        [bos, *encoding.ids, eos] if document.complete else [bos, *encoding.ids]
        for encoding, document in zip(encoded, documents, strict=True)
    ]


def build_streams(tokenizer: Tokenizer, corpus: Corpus) -> dict[str, Tokens]:
    """One uint16 token stream per training source, its documents shuffled and laid end to end."""
    streams: dict[str, Tokens] = {}
    for source, documents in corpus.training.items():
        shuffled = random.Random(source).sample(documents, len(documents))
        ids = encode_documents(tokenizer, shuffled)
        streams[source] = np.concatenate([np.asarray(document, dtype=np.uint16) for document in ids])
    return streams


def sample_batch(
    streams: dict[str, Tokens], weights: dict[str, float], step: int, windows: int, length: int, seed: int
) -> npt.NDArray[np.int64]:
    """The training batch of ``step``, shape (windows, length): a function of its arguments only.

    So the step number is the data position: a resumed run sees the batches an unbroken one would.
    """
    generator = np.random.default_rng((seed, step))
    sources = sorted(weights)
    shares = np.array([weights[source] for source in sources])
    batch = np.empty((windows, length), dtype=np.int64)
    for row, choice in enumerate(generator.choice(len(sources), size=windows, p=shares / shares.sum())):
        stream = streams[sources[choice]]
        start = int(generator.integers(0, len(stream) - length))
        batch[row] = stream[start : start + length]
    return batch
