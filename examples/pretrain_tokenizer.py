"""The embedded base's tokenizer: byte-level BPE of 4,096 tokens, in the files that AutoTokenizer reads."""

import random
from pathlib import Path

from pretrain_corpus import BOS, EOS, PAD, SPECIAL_TOKENS, Corpus, token_id
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 4096
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Characters of each source that the merges are learnt from: simple text first, books for breadth.
LEARNING_CHARACTERS = {
    "cased": 3_000_000,
    "lower": 500_000,
    "children": 5_000_000,
    "plain": 4_000_000,
    "other": 1_000_000,
}


def learning_texts(corpus: Corpus) -> list[str]:
    """A sample of the training documents with the shares of LEARNING_CHARACTERS."""
    texts: list[str] = []
    for source, budget in LEARNING_CHARACTERS.items():
        documents = corpus.training[source]
        for document in random.Random(source).sample(documents, len(documents)):
            texts.append(document.text)
            budget -= len(document.text)
            if budget < 0:
                break
    return texts


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Learn the tokenizer. Every byte is a token, nothing is normalised: any UTF-8 text round-trips exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(learning_texts(corpus), trainer)
    bos = token_id(tokenizer, BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` to ``directory``."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BOS, EOS, PAD)],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    # One file instead of a separate chat_template.jinja: the template is two lines.
    fast.save_pretrained(str(directory), save_jinja_files=False)
