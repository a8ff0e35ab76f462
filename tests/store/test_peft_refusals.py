"""PEFT checkpoints that cannot be carried over are refused by name. The ids name the variants."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import safetensors.torch
import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from torch import Tensor

from adapters_store import BundleLimits, InvalidBundle, import_peft, peft_from_path
from adapters_store.convert import peft_config
from adapters_store.convert.peft_keys import _REFUSED, sort_keys
from adapters_store.convert.peft_layers import TensorReader
from sera_serve.base import FrozenBase, import_base, load_base
from support.peft_checkpoints import (
    CONFIG,
    WEIGHTS,
    edit_config,
    edit_tensors,
    imported,
    peft_model,
    quiet,
    save_checkpoint,
)

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(shared_data: Path) -> FrozenBase:
    return load_base(str(shared_data / "weights" / "stories260K"))


@pytest.fixture(scope="module")
def plain(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(base.model, tmp_path_factory.mktemp("peft") / "plain")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def refusal(folder: Path, base: FrozenBase) -> InvalidBundle:
    with pytest.raises(InvalidBundle) as caught:
        imported(folder, base)
    assert caught.value.param
    return caught.value


FIELDS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_parameters": ["experts.gate_up_proj"]},
    "use_qalora": {"use_qalora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "arrow_config": {"arrow_config": {"top_k": 3}},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "kasa_config": {"kasa_config": {"beta": 1e-4}},
    "velora_config": {"velora_config": {"rank": 1}},
    "monteclora_config": {"monteclora_config": {"samples": 2}},
    "peft_type VERA": {"peft_type": "VERA"},
    "peft_type IA3": {"peft_type": "IA3"},
    "peft_type LOHA": {"peft_type": "LOHA"},
    "peft_type BOFT": {"peft_type": "BOFT"},
    "peft_type PREFIX_TUNING": {"peft_type": "PREFIX_TUNING"},
    "an unknown field in use": {"flux_capacitor": {"gigawatts": 1.21}},
    "task_type TOKEN_CLS": {"task_type": "TOKEN_CLS"},
}


@pytest.mark.parametrize("row", FIELDS)
def test_refused_by_its_field(row: str, folder: Path, base: FrozenBase) -> None:
    edit_config(folder, **FIELDS[row])
    error = refusal(folder, base)
    field = next(iter(FIELDS[row]))
    assert error.code == "unsupported_adapter"
    assert error.param == f"adapter_config.{field}"
    assert field in error.message
    value = FIELDS[row][field]
    assert not isinstance(value, str) or value in error.message
    if value in ("VERA", "LOHA"):
        assert "save_as_lora" in error.message
    if value == "TOKEN_CLS":
        assert "takes CAUSAL_LM, SEQ_CLS, FEATURE_EXTRACTION" in error.message


@pytest.mark.parametrize("value", [None, False, [], {}, ""], ids=repr)
def test_unknown_fields_that_are_not_used(value: Any, folder: Path, base: FrozenBase) -> None:
    edit_config(folder, flux_capacitor=value)
    assert imported(folder, base).bundle.config.modules


def with_tensor(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: torch.ones(shape)}


TENSORS = {
    "embedding LoRA": "base_model.model.model.embed_tokens.lora_embedding_A",
    "trainable tokens": "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    "modules_to_save embed_tokens": "base_model.model.model.embed_tokens.weight",
    "modules_to_save lm_head": "base_model.model.lm_head.weight",
    "LoRA on lm_head": "base_model.model.lm_head.lora_A.weight",
    "modules_to_save of a norm": "base_model.model.model.norm.weight",
    "bias of the base": "base_model.model.model.layers.0.self_attn.q_proj.bias",
    "AdaLoRA": f"{Q}.lora_E",
    "a second adapter": f"{Q}.lora_A.second.weight",
    "a magnitude without use_dora": f"{Q}.lora_magnitude_vector",
    "a bias without lora_bias": f"{Q}.lora_B.bias",
    "experts": "base_model.model.model.layers.0.mlp.experts.lora_A.weight",
    "a bias of lora_A": f"{Q}.lora_A.bias",
    "an adapter's name of two parts": f"{Q}.lora_A.my.adapter.weight",
    "a classifier within a layer": "base_model.model.model.layers.0.classifier.weight",
}
# What is no part of a LoRA or of a head, whatever the configuration says.
UNKNOWN = ("modules_to_save of a norm", *list(TENSORS)[-3:])


@pytest.mark.parametrize("row", TENSORS)
def test_refused_by_its_tensor(row: str, folder: Path, base: FrozenBase) -> None:
    edit_tensors(folder, with_tensor(TENSORS[row], 64))
    error = refusal(folder, base)
    assert error.code in ("unsupported_adapter", "unknown_module")
    assert TENSORS[row] in error.message or error.param == TENSORS[row] or "experts" in error.message
    assert row not in UNKNOWN or "is neither a LoRA's factor nor a part of a classifier's head" in error.message
    _, is_unannounced, field = row.partition(" without ")
    assert not is_unannounced or f"adapter_config.{field} is not true" in error.message


def test_each_name_is_split_once() -> None:
    splits = 0

    class Counted(str):
        def split(self, *arguments: Any, **options: Any) -> list[str]:
            nonlocal splits
            splits += 1
            return super().split(*arguments, **options)

    assert len(sort_keys([Counted(f"{Q}.lora_A.weight"), Counted(f"{Q}.lora_B.weight")]).layers) == 1
    assert splits == 2
    for part, reason in _REFUSED.items():
        with pytest.raises(InvalidBundle, match=re.escape(reason)):
            sort_keys([f"{Q}.{part}x.weight"])


def test_peft_itself_writes_what_is_refused(base: FrozenBase, tmp_path: Path) -> None:
    embedding = save_checkpoint(base.model, tmp_path / "embedding", target_modules=["embed_tokens"])
    assert "embedding" in refusal(embedding, base).message
    tokens = save_checkpoint(base.model, tmp_path / "tokens", trainable_token_indices=[1, 2])
    assert "trainable_token_indices" in refusal(tokens, base).message
    saved = save_checkpoint(base.model, tmp_path / "saved", modules_to_save=["embed_tokens"])
    assert "embed_tokens" in refusal(saved, base).message
    for name, config in {
        "VERA": VeraConfig(r=4, target_modules=["q_proj"]),
        "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    }.items():
        with quiet():
            get_peft_model(load_base_copy(base), config).save_pretrained(str(tmp_path / name))
        assert name in refusal(tmp_path / name, base).message


def load_base_copy(base: FrozenBase) -> Any:
    return peft_model(base.model).unload()


def test_another_base_is_named_with_both_sides(folder: Path, base: FrozenBase) -> None:
    edit_tensors(folder, lambda t: {n.replace("self_attn.q_proj", "attention.wq"): x for n, x in t.items()})
    error = refusal(folder, base)
    assert error.code == "unknown_module"
    assert "only 5 of the checkpoint's 10 layers" in error.message
    assert "layers.0.attention.wq" in error.message
    assert "model.layers.0" in error.message
    edit_tensors(
        folder,
        lambda t: {n.replace("layers", "blocks").replace("attention.wq", "self_attn.q_proj"): x for n, x in t.items()},
    )
    message = refusal(folder, base).message
    assert "none of the checkpoint's 10 layers" in message
    assert "its own are such as model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj" in message
    assert list(sort_keys(["base_model.model.lora_A.weight"]).layers) == ["model"]


DAMAGE = {
    "half a pair": (lambda t: {n: x for n, x in t.items() if n != f"{Q}.lora_B.weight"}, "missing_tensor"),
    "another width": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 65)}, "wrong_shape"),
    "another rank of B": (lambda t: t | {f"{Q}.lora_B.weight": torch.ones(64, 5)}, "wrong_shape"),
    "a convolution": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(4, 64, 1, 1)}, "wrong_shape"),
    "not a number": (lambda t: t | {f"{Q}.lora_A.weight": torch.full((4, 64), torch.nan)}, "not_finite"),
    "no tensors of a LoRA": (lambda _: {"base_model.model.score.bias": torch.ones(2)}, "missing_tensor"),
}


@pytest.mark.parametrize("row", DAMAGE)
def test_damaged_tensors(row: str, folder: Path, base: FrozenBase) -> None:
    change, code = DAMAGE[row]
    edit_tensors(folder, change)
    assert refusal(folder, base).code == code


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"r": 0}, "r"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"alpha_pattern": {"x" * 600: 1}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"peft_type": 7}, "peft_type"),
        ({"task_type": ["X"]}, "task_type"),
        ({"id2label": {"1": "a"}}, "id2label"),
        ({"id2label": {"0": ""}}, "id2label"),
        ({"id2label": 7}, "id2label"),
        ({"use_bdlora": {"nblocks": 0}, "peft_version": None}, "use_bdlora.nblocks"),
        ({"use_bdlora": 2}, "use_bdlora"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
        ({"modules_to_save": "score"}, "modules_to_save"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_impossible_values(fields: dict[str, Any], param: str, folder: Path, base: FrozenBase) -> None:
    edit_config(folder, **fields)
    error = refusal(folder, base)
    assert (error.code, error.param) == ("invalid_config", f"adapter_config.{param}")


def test_a_pattern_that_takes_exponential_time(folder: Path, base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.convert.peft_config._PATTERN_SECONDS", 0.2)
    edit_config(folder, alpha_pattern={r"(\w|\.|_|[a-z])+(?<=Z)": 1})
    error = refusal(folder, base)
    assert error.param == "adapter_config.alpha_pattern"
    assert "name layers in full" in error.message


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?:(?:q{30}){30}){30}", "characters with its repeats written out"),
        ("(?:" * 12 + "q" + ")+" * 12, "characters with its repeats written out"),
        (r"layers\.\d{1 2}", "brace that begins no count"),
        ("(?:q_proj){e<=1}", "brace that begins no count"),
    ],
)
def test_repeats_that_would_be_written_out(
    field: str, pattern: str, words: str, folder: Path, base: FrozenBase
) -> None:
    edit_config(folder, **{field: {pattern: 1}})
    error = refusal(folder, base)
    assert (error.code, error.param) == ("invalid_config", f"adapter_config.{field}")
    assert words in error.message


def test_patterns_of_both_fields_share_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = peft_config.PatternBudget()
    patterns = [f"{index:04}" + "a" * 395 + "a+" * 5 for index in range(20)]
    monkeypatch.setattr(regex, "compile", lambda text, cache_pattern: re.compile("a"))
    peft_config.PatternMatcher(patterns, "alpha_pattern", shared)
    with pytest.raises(InvalidBundle, match="all patterns have more than 262144 characters") as caught:
        peft_config.PatternMatcher(["a" * 395 + "a+" * 5], "rank_pattern", shared)
    assert caught.value.param == "adapter_config.rank_pattern"


@pytest.mark.parametrize(
    "pattern",
    [r"layers\.\d{1,2}\.self_attn\.q_proj", r"layers\.[0-9]+\.\w+\.q_proj", r".{3,}\.q_pro.{1}", "q_{,1}proj"],
)
def test_a_few_repeats_are_allowed(pattern: str) -> None:
    matcher = peft_config.PatternMatcher([pattern], "alpha_pattern", peft_config.PatternBudget())
    assert matcher.find("model.layers.11.self_attn.q_proj") == pattern
    assert matcher.find("model.layers.11.self_attn.v_proj") is None


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_too_many_patterns(field: str, folder: Path, base: FrozenBase) -> None:
    edit_config(folder, **{field: {f"layer{index}": 1 for index in range(1025)}})
    error = refusal(folder, base)
    assert error.param == f"adapter_config.{field}"
    assert "1025 patterns; the limit is 1024" in error.message


def test_patterns_of_both_fields_share_the_time_and_compiling_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(peft_config, "monotonic", lambda: now[0])

    def compile_slowly(text: str, cache_pattern: bool) -> re.Pattern[str]:
        now[0] += 0.9
        return re.compile(text)

    monkeypatch.setattr(regex, "compile", compile_slowly)
    shared = peft_config.PatternBudget()
    peft_config.PatternMatcher(["a", "b"], "alpha_pattern", shared)
    with pytest.raises(InvalidBundle, match="compile and match") as caught:
        peft_config.PatternMatcher(["c"], "rank_pattern", shared)
    assert caught.value.param == "adapter_config.rank_pattern"


def test_each_match_has_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = [0.0], []
    monkeypatch.setattr(peft_config, "monotonic", lambda: now[0])

    class Slow:
        def match(self, path: str, timeout: float) -> None:
            given.append(timeout)
            now[0] += 0.75

    monkeypatch.setattr(regex, "compile", lambda *_, **__: Slow())
    matcher = peft_config.PatternMatcher(["a", "b", "c", "d"], "alpha_pattern", peft_config.PatternBudget())
    with pytest.raises(InvalidBundle, match="compile and match"):
        matcher.find("x")
    assert given == [2.0, 1.25, 0.5]


def test_what_a_configuration_leaves_out_is_peft_s_default() -> None:
    found, peft = peft_config.read_peft_config({"peft_type": "LORA"}), LoraConfig()
    assert (found.rank, found.alpha) == (peft.r, peft.lora_alpha)


def blocked(rows_of_b: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """One layer (64, 64) whose A has 64 blocks and rank 256: 1 KiB in the file, 64 KiB written out."""
    return lambda _: {f"{Q}.lora_A.weight": torch.ones(256, 1), f"{Q}.lora_B.weight": torch.ones(rows_of_b, 256)}


def test_the_zeros_of_blocks_are_bounded_before_they_are_written(
    folder: Path, base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(folder, use_bdlora={"nblocks": 64})
    edit_tensors(folder, blocked(64))
    with monkeypatch.context() as never:
        never.setattr(torch, "block_diag", lambda *_: pytest.fail("written out"))
        files = peft_from_path(str(folder), BundleLimits(max_bytes=(128 << 10) - 1))
        assert files is not None
        with pytest.raises(InvalidBundle, match="64 blocks written out") as caught:
            import_peft(files, import_base(base))
        assert caught.value.code == "bundle_too_large"
        # B's shape is looked at first.
        edit_tensors(folder, blocked(63))
        assert refusal(folder, base).code == "wrong_shape"
        # 250 rows of A are no 64 blocks, and one row of numbers is no matrix.
        for shape in (250, 1), (250,):
            factors = {f"{Q}.lora_A.weight": torch.ones(shape), f"{Q}.lora_B.weight": torch.ones(64, 250)}
            edit_tensors(folder, lambda _, factors=factors: factors)  # type: ignore[misc]
            assert refusal(folder, base).param == f"{Q}.lora_A.weight"
    edit_tensors(folder, blocked(64))
    files = peft_from_path(str(folder), BundleLimits(max_bytes=128 << 10))
    assert files is not None
    assert import_peft(files, import_base(base)).bundle.config.modules


def test_a_rank_far_above_the_widths_is_refused_before_a_tensor_is_read(
    folder: Path, base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Q.replace(".0.", ".1.")

    def of_rank(rank: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        factors = {f"{second}.lora_A.weight": torch.zeros(rank, 64), f"{second}.lora_B.weight": torch.zeros(64, rank)}
        # The first layer is right, and nothing of it is read either.
        return lambda tensors: tensors | factors

    edit_tensors(folder, of_rank(256))
    assert imported(folder, base).layers["model.layers.1.self_attn.q_proj"].rank == 256
    edit_tensors(folder, of_rank(257))
    monkeypatch.setattr(TensorReader, "read", lambda *_: pytest.fail("read"))
    error = refusal(folder, base)
    assert (error.code, error.status) == ("adapter_too_large", 422)
    assert "the rank 257 of model.layers.1.self_attn.q_proj is more than 256, the most for a" in error.message


def test_a_head_of_very_many_rows(folder: Path, base: FrozenBase) -> None:
    edit_config(folder, task_type="SEQ_CLS")
    head = {"base_model.model.score.weight": torch.zeros((1 << 16) + 1, 64, dtype=torch.float16)}
    edit_tensors(folder, lambda tensors: tensors | head)
    error = refusal(folder, base)
    assert (error.code, error.param) == ("unsupported_adapter", "adapter_config.id2label")


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize(
    "pattern", ["(?R)", "(?:(?2)|x)*", "(?0)", "(?P<n>(?P>n)|x)", "(?P<n>(?&n)|x)", "(?x:( ?R))", "a{,4294967296}"]
)
def test_patterns_that_peft_does_not_know(
    field: str, pattern: str, folder: Path, base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their stack would grow to 1 GiB.
    monkeypatch.setattr(regex, "compile", lambda *_, **__: pytest.fail("compiled"))
    edit_config(folder, **{field: {pattern: 2}})
    error = refusal(folder, base)
    assert (error.code, error.param) == ("invalid_config", f"adapter_config.{field}")
    assert "is no regular expression" in error.message


def test_patterns_that_take_too_much_memory(folder: Path, base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy:
        def match(self, *_: object, **__: object) -> None:
            raise MemoryError

    monkeypatch.setattr(regex, "compile", lambda *_, **__: Greedy())
    edit_config(folder, alpha_pattern={"q_proj": 2})
    error = refusal(folder, base)
    assert (error.code, error.param) == ("invalid_config", "adapter_config.alpha_pattern")
    assert "too much memory" in error.message


def test_dora_and_bias_need_each_layer_s_vector(folder: Path, base: FrozenBase) -> None:
    edit_config(folder, use_dora=True)
    assert refusal(folder, base).code == "missing_tensor"
    magnitudes = {
        name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64 if "q_proj" in name else 32)
        for name in safetensors.torch.load_file(folder / WEIGHTS)
        if "lora_A" in name
    }
    edit_tensors(folder, lambda tensors: tensors | magnitudes)
    assert {spec.has_gain for spec in imported(folder, base).bundle.config.modules.values()} == {True}
    for shape in (63, 1), (8, 8):
        edit_tensors(folder, with_tensor(f"{Q}.lora_magnitude_vector", *shape))
        error = refusal(folder, base)
        assert (error.code, error.param) == ("wrong_shape", f"{Q}.lora_magnitude_vector")
    edit_config(folder, use_dora=False, lora_bias=True)
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if "magnitude" not in n})
    assert refusal(folder, base).code == "missing_tensor"


def test_new_tokens_of_a_resized_vocabulary(folder: Path, base: FrozenBase) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": 511, "<b>": 512}))
    error = refusal(folder, base)
    assert (error.code, error.param) == ("unsupported_adapter", "added_tokens.json")
    assert "<b>" in error.message


def test_pickled_weights(folder: Path, base: FrozenBase) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    error = refusal(folder, base)
    assert (error.code, error.param) == ("pickled_checkpoint", "adapter_model.bin")
    assert "save_file" in error.message
    (folder / CONFIG).unlink()
    for path in folder, folder / "adapter_model.bin":
        with pytest.raises(InvalidBundle) as alone:
            peft_from_path(str(path), BundleLimits())
        assert alone.value.code == "pickled_checkpoint"


def test_no_weights_two_weights_and_two_adapters(folder: Path, base: FrozenBase) -> None:
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    error = refusal(folder, base)
    assert (error.code, error.param) == ("unexpected_file", "other.safetensors")
    (folder / "other.safetensors").unlink()
    shutil.copytree(folder, folder.parent / "second")
    assert "several adapters: adapter, second" in refusal(folder.parent, base).message
    (folder / WEIGHTS).unlink()
    assert refusal(folder, base).code == "missing_file"
