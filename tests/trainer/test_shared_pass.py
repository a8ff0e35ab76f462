"""One pass for several batches gives each run the losses and gradients of a pass of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from trainer_samples import save_tiny_base
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from sera_serve.base import FrozenBase
from sera_serve.base.loading import freeze_base
from sera_serve.layers import SeraConfig, SeraLinear, attach_adapter, attached_layers
from sera_serve.layers.multi_linear import MultiLinear, SegmentContext
from sera_serve.trainer.together.shared_pass import Batch, SharedPass

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
# Each with whether it can run without padding between the batches.
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], object, bool]] = {
    "bert": (BertModel, BertConfig(**WIDE), True),
    "roberta": (RobertaModel, RobertaConfig(**WIDE | {"pad_token_id": 1, "type_vocab_size": 1}), True),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig(vocab_size=40, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        True,
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=4), True),
    # Its scores are capped, which only its own attention does.
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=8, sliding_window=64), False),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64), True),
    "opt": (OPTForCausalLM, OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64), True),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    return AutoTokenizer.from_pretrained(save_tiny_base(tmp_path_factory.mktemp("base")))


def double_base(name: str, tokenizer: object) -> FrozenBase:
    """A base of an architecture in float64."""
    kind, config, _ = ARCHITECTURES[name]
    torch.manual_seed(5)
    is_encoder = kind in (BertModel, RobertaModel, DistilBertModel)
    base = freeze_base(kind(config), tokenizer, name, "encoder" if is_encoder else "decoder")
    base.model.double()
    return base


class Run:
    """A classifier or a language model with an adapter, trained by hand in float64."""

    def __init__(self, base: FrozenBase, key: int, config: SeraConfig, *, kept: int | None = None) -> None:
        torch.manual_seed(key)
        self.base = base.share_weights()
        self.key = key
        self.kept = kept
        attach_adapter(self.base.model, config)
        self.layers = attached_layers(self.base.model)
        for layer in self.layers.values():
            layer.double()
        width = base.hidden_size if kept is None else 40
        self.head = nn.Linear(width, 3).double()
        factors = [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]
        self.parameters = [*factors, *self.head.parameters()]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-2)
        self.draw = torch.Generator().manual_seed(100 + key)

    def batch(self, rows: int, longest: int) -> Batch:
        lengths = torch.randint(2, longest + 1, (rows,), generator=self.draw)
        lengths[0] = longest
        mask = (torch.arange(longest) < lengths[:, None]).long()
        ids = torch.randint(4, 40, mask.shape, generator=self.draw) * mask
        return Batch(self.key, self.layers, ids, mask, None, self.kept)

    def own_pass(self, batch: Batch) -> Tensor:
        if self.kept is None:
            return self.base.hidden_states(batch.input_ids, batch.attention_mask)
        output = self.base.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=self.kept
        )
        return output.logits

    def loss(self, states: Tensor, batch: Batch) -> Tensor:
        """A cross-entropy over all real tokens that the pass returned."""
        mask = batch.attention_mask[:, -states.shape[1] :].bool()
        labels = (batch.input_ids[:, -states.shape[1] :] % 3)[mask]
        return nn.functional.cross_entropy(self.head(states[mask]), labels)


SHAPES = [
    SeraConfig(rank=4, split=4, lora_alpha=8, target_modules="all-linear"),
    SeraConfig(rank=3, split=1, lora_alpha=3, target_modules="all-linear", use_mixer=False),
    SeraConfig(rank=4, split=2, lora_alpha=8, target_modules="all-linear", train_factors=("c", "b")),
]


def train(runs: list[Run], passes: SharedPass | None, steps: int = 4) -> list[list[float]]:
    """Train by hand, with a pass of its own for each run or with one for all; return the losses."""
    losses: list[list[float]] = []
    for step in range(steps):
        # The second run ends early.
        live = [run for run in runs if not (run.key == 1 and step >= 2)]
        batches = [run.batch(2 + run.key + step, 4 + 3 * run.key + step % 2) for run in live]
        results = (
            [r.own_pass(b) for r, b in zip(live, batches, strict=True)] if passes is None else passes.forward(batches)
        )
        values = [r.loss(states, b) for r, states, b in zip(live, results, batches, strict=True)]
        for run, value in zip(live, values, strict=True):
            run.optimiser.zero_grad()
            value.backward()
        if passes is not None:
            passes.backward(results)
        for run in live:
            run.optimiser.step()
        losses.append([value.item() for value in values])
    return losses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_together_is_training_alone(name: str, tokenizer: object) -> None:
    base = double_base(name, tokenizer)
    # Language models beside classifiers, where the base has an output embedding.
    kept = [None, None if base.kind == "encoder" else 3, None]
    separate, together = ([Run(base, i, SHAPES[i], kept=kept[i]) for i in range(3)] for _ in range(2))
    passes = SharedPass(base)
    assert passes.is_flat == ARCHITECTURES[name][2]
    # Gemma 2's own attention computes its softmax in float32.
    tolerance = 1e-6 if name == "gemma2" else 1e-9
    expected = train(separate, None)
    assert expected[0] != expected[-1]
    for got, want in zip(train(together, passes), expected, strict=True):
        assert got == pytest.approx(want, rel=tolerance)
    for ours, theirs in zip(together, separate, strict=True):
        for a, b in zip(ours.parameters, theirs.parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_rows_of_one_run_do_not_touch_another(tokenizer: object) -> None:
    base = double_base("bert", tokenizer)

    def train_beside(values: Tensor, scale: float) -> list[Tensor]:
        run, other = Run(base, 0, SHAPES[0]), Run(base, 2, SHAPES[0])
        with torch.no_grad():
            for layer in other.layers.values():
                layer.sera_b.fill_(scale)
        passes = SharedPass(base)
        for _ in range(3):
            mine = run.batch(4, 6)
            theirs = Batch(2, other.layers, values, torch.ones_like(values))
            results = passes.forward([theirs, mine])
            run.optimiser.zero_grad()
            run.loss(results[1], mine).backward()
            (results[0].sum() * scale).backward()
            passes.backward(results)
            run.optimiser.step()
        return run.parameters

    ids = torch.arange(30).view(5, 6) + 4
    expected = train_beside(ids, 0.0)
    for values, scale in ((ids.flip(0) + 1, 2.0), (ids, float("nan"))):
        for got, want in zip(train_beside(values, scale), expected, strict=True):
            assert torch.equal(got, want)


def test_the_layer_adds_each_segments_own_update() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 12).double()
    context = SegmentContext()
    layer = MultiLinear(base, context)
    own = [SeraLinear(base, shape).double() for shape in SHAPES[:2]]
    for wrapped in own:
        nn.init.normal_(wrapped.sera_b)
    layer.adapters = {7: own[0], 9: own[1]}
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    flat = x.view(10, 8)
    context.segments = [(9, 3), (7, 4), (1, 3)]
    want = torch.cat([own[1](flat[:3]), own[0](flat[3:7]), base(flat[7:])]).view(2, 5, 12)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    context.segments = []
    assert torch.equal(layer(x), base(x))
    context.segments = [(7, 9)]
    with pytest.raises(ValueError, match="9 tokens, and the input has 10"):
        layer(x)


def test_dropout_draws_in_the_block_of_its_adapter() -> None:
    drawn = []

    @contextmanager
    def drawing(key: int) -> Iterator[None]:
        drawn.append(key)
        yield

    base = nn.Linear(8, 8)
    layer = MultiLinear(base, SegmentContext([(1, 2), (2, 3)], drawing))
    dropping = SeraConfig(rank=2, split=2, lora_alpha=2, target_modules="all-linear", dropout=0.5)
    layer.adapters = {1: SeraLinear(base, SHAPES[0]), 2: SeraLinear(base, dropping)}
    layer(torch.ones(5, 8))
    layer.adapters[2].dropout.eval()
    layer(torch.ones(5, 8))
    assert drawn == [2]
