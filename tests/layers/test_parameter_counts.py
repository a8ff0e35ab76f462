"""Parameter counts equal the paper's counts exactly. The models have no weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    RobertaConfig,
    ViTConfig,
)

from sera_serve import SeraConfig, attach_adapter, count_adapter_parameters
from sera_serve.trainer.compare.plan import read_plan
from sera_serve.trainer.settings import TrainSettings

PLANS = Path(__file__).parents[2] / "examples" / "paper"

QUERY_VALUE = ("query", "value")
CLIP_QUERY_VALUE = ("q_proj", "v_proj")


def clip(layers: tuple[int, int], text_width: int, vision_width: int, patch: int) -> CLIPConfig:
    text = CLIPTextConfig(
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=layers[0],
        num_attention_heads=text_width // 64,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=layers[1],
        num_attention_heads=vision_width // 64,
        patch_size=patch,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


CONFIGS = {
    "roberta-large": lambda: RobertaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=50265,
    ),
    "vit-large": lambda: ViTConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=16
    ),
    "clip-b32": lambda: clip((12, 12), 512, 768, 32),
    "clip-l14": lambda: clip((12, 24), 768, 1024, 14),
    "llama-3-8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            name: (AutoModelForCausalLM if name.startswith("llama") else AutoModel).from_config(config())
            for name, config in CONFIGS.items()
        }


def sera(rank: int, targets: Any, split: int | None = None, **options: Any) -> SeraConfig:
    return SeraConfig(
        rank=rank, split=rank if split is None else split, lora_alpha=rank, target_modules=targets, **options
    )


CASES = [
    *(
        ("roberta-large", sera(rank, QUERY_VALUE), count)
        for rank, count in [
            (8, 101_376),
            (16, 110_592),
            (32, 147_456),
            (64, 294_912),
            (128, 884_736),
            (256, 3_244_032),
        ]
    ),
    *(
        ("roberta-large", sera(rank, QUERY_VALUE, train_factors=factors), count)
        for rank, count in [(16, 61_440), (64, 245_760)]
        for factors in [("c", "b"), ("a", "c")]
    ),
    *(
        ("roberta-large", sera(rank, QUERY_VALUE, train_factors=("c",)), count)
        for rank, count in [(8, 3_072), (16, 12_288), (64, 196_608), (128, 786_432)]
    ),
    # Experiment 1: 3 classes, 8 classes, and the four shapes for 27 classes.
    *(
        ("vit-large", sera(rank, CLIP_QUERY_VALUE, split=split), count)
        for split, rank, count in [
            (16, 16, 110_592),
            (64, 64, 294_912),
            (8, 8, 101_376),
            (128, 128, 884_736),
            (32, 256, 3_932_160),
            (8, 256, 6_291_456),
        ]
    ),
    ("clip-b32", sera(8, CLIP_QUERY_VALUE), 64_512),
    ("clip-l14", sera(8, CLIP_QUERY_VALUE), 139_776),
    ("llama-3-8b", sera(64, "all-linear"), 3_538_944),
    ("llama-3-8b", sera(32, "all-linear", split=16), 5_472_256),
    ("llama-3-8b", sera(64, "all-linear", use_mixer=False), 2_621_440),
    ("llama-3-8b", sera(128, "all-linear", split=64, use_mixer=False), 5_242_880),
    ("llama-3-8b", sera(16, "all-linear", split=1), 42_000_384),
    ("llama-3-8b", sera(64, "all-linear", split=1, use_mixer=False), 167_772_160),
]


@pytest.mark.parametrize(("base", "config", "count"), CASES, ids=lambda value: str(value)[:90])
def test_count_equals_the_papers_count(models: dict[str, nn.Module], base: str, config: SeraConfig, count: int) -> None:
    assert count_adapter_parameters(models[base], config) == count


# What the plans of the paper train: (plan, base, method in its size), and the count in millions as the paper prints it.
PLANNED = [
    ("glue", "roberta-large", "sera r=8", 0.1),
    ("glue", "roberta-large", "sera r=16", 0.11),
    ("glue", "roberta-large", "lora r=8", 0.8),
    ("retrieval", "clip-b32", "sera r=8", 0.064),
    ("retrieval", "clip-b32", "lora r=8", 0.492),
    ("retrieval", "clip-b32", "melora r=8 split=8", 0.061),
    ("retrieval", "clip-b32", "melora r=16 split=8", 0.123),
    ("retrieval", "clip-l14", "sera r=8", 0.14),
    ("retrieval", "clip-l14", "lora r=8", 1.081),
    ("retrieval", "clip-l14", "melora r=8 split=8", 0.135),
    ("retrieval", "clip-l14", "melora r=16 split=8", 0.27),
    ("instruction", "llama-3-8b", "sera r=64 split=64", 3.5),
    ("instruction", "llama-3-8b", "sera r=32 split=16", 5.5),
    ("instruction", "llama-3-8b", "melora r=64 split=64", 2.6),
    ("instruction", "llama-3-8b", "melora r=128 split=64", 5.2),
    ("instruction", "llama-3-8b", "moslora r=16", 42.0),
    ("instruction", "llama-3-8b", "lora r=64", 167.8),
    *(
        ("ranks", "roberta-large", f"sera r={rank}", count)
        for rank, count in [(8, 0.1), (16, 0.11), (32, 0.15), (64, 0.29), (128, 0.88), (256, 3.24)]
    ),
    *(
        ("ablation_freeze", "roberta-large", f"sera-freeze-{factor} r={rank}", count)
        for rank, count in [(16, 0.061), (64, 0.246)]
        for factor in "ab"
    ),
    *(
        ("ablation_c_only", "roberta-large", f"sera-c-only r={rank}", count)
        for rank, count in [(8, 0.003), (16, 0.012), (64, 0.196), (128, 0.786)]
    ),
]


@pytest.mark.parametrize(("plan", "base", "method", "millions"), PLANNED)
def test_a_plan_trains_what_the_paper_counts(
    models: dict[str, nn.Module], plan: str, base: str, method: str, millions: float
) -> None:
    found = read_plan(PLANS / f"{plan}.yaml")
    name = {"clip-b32": "clip-base", "clip-l14": "clip-large"}.get(base, base)
    cell = next(cell for cell in found.cells() if (cell.base, cell.variant.label) == (name, method))
    options = found.spec(cell, found.seeds[0], None, "score").settings
    config = TrainSettings(**options, store=Path("-"), name="acme/counted").adapter_config()
    assert config is not None
    # The paper cuts some counts and rounds others.
    unit = 10.0 ** -len(str(millions).partition(".")[2])
    assert abs(count_adapter_parameters(models[base], config) / 1e6 - millions) < unit


def test_vera_sized_budget_is_matched_by_freezing(models: dict[str, nn.Module]) -> None:
    # Table 5 compares SeRA r=16 with one frozen factor to VeRA r=256: 24 layers x 2 x (1024 + 256) = 61,440.
    frozen = sera(16, QUERY_VALUE, train_factors=("c", "b"))
    assert count_adapter_parameters(models["roberta-large"], frozen) == 24 * 2 * (1024 + 256)


@pytest.mark.parametrize("factors", [("a", "c", "b"), ("b",), ("c",), ("a", "c")])
@pytest.mark.parametrize(("split", "use_mixer"), [(8, True), (1, True)])
def test_count_equals_the_trainable_parameters_of_an_attached_model(factors: Any, split: int, use_mixer: bool) -> None:
    config = sera(8, "all-linear", split=split, use_mixer=use_mixer, train_factors=factors)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=64,
        )
    )
    expected = count_adapter_parameters(model, config)
    attach_adapter(model, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
