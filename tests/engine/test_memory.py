"""How a device's memory is divided, with a GPU's figures made up."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from sera_kernels import workspace_bytes
from sera_serve.config import ServeSettings
from sera_serve.engine.memory import (
    GIBIBYTE,
    MEBIBYTE,
    MOST_GATHERED,
    DecoderSizes,
    DeviceMemory,
    free_memory,
    memory_of,
    step_failed,
)
from sera_serve.errors import InvalidConfiguration

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# Llama-3-8B in bfloat16.
LLAMA = DecoderSizes(128 << 10, 4 << 10, 14336, 128256, context=8192)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Sizes in GiB, which the test may change."""
    sizes = {"free": 64.0, "total": 80.0, "reserved": 16.0, "allocated": 16.0}
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (int(sizes["free"] * GIBIBYTE), int(sizes["total"] * GIBIBYTE))
    )
    for name in ("reserved", "allocated"):
        monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda device, name=name: int(sizes[name] * GIBIBYTE))
    return sizes


def test_a_cpu_has_fixed_sizes() -> None:
    memory = DeviceMemory(ServeSettings(), CPU)
    assert memory.pool_bytes() == 256 * MEBIBYTE
    assert memory.cache_tokens(LLAMA) == 32768


def test_settings_win(gpu: dict[str, float]) -> None:
    for device in (CPU, GPU):
        memory = DeviceMemory(ServeSettings(pool_mib=7, kv_cache_tokens=640), device)
        assert (memory.pool_bytes(), memory.cache_tokens(LLAMA)) == (7 * MEBIBYTE, 640)


def test_a_gpu_is_used_up_to_the_fraction(gpu: dict[str, float]) -> None:
    memory = DeviceMemory(ServeSettings(gpu_memory_fraction=0.9), GPU)
    pool = memory.pool_bytes()
    # Of 80 GiB the server may use 72, and the weights take 16.
    assert pool == int(0.2 * 56 * GIBIBYTE)
    gpu["free"] -= pool / GIBIBYTE
    tokens = memory.cache_tokens(LLAMA)
    left = 72 - 16 - pool / GIBIBYTE - tokens * LLAMA.token_bytes / GIBIBYTE
    assert 2 < left < 2.6, "room for the steps is left"
    gpu["free"] -= 30
    assert memory.cache_tokens(LLAMA) < tokens - 200_000, "what others use is not there"


@pytest.mark.parametrize("batch_tokens", [64, 2048, 8192])
def test_there_is_room_for_updates_of_the_highest_rank(
    batch_tokens: int, gpu: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DeviceMemory(ServeSettings(max_batch_tokens=batch_tokens), GPU)
    tokens = memory.cache_tokens(LLAMA)
    monkeypatch.setattr("sera_serve.engine.memory.workspace_bytes", lambda tokens: 0)
    # Of a step and of a classification pass beside it.
    room = 2 * workspace_bytes(batch_tokens) // LLAMA.token_bytes
    assert memory.cache_tokens(LLAMA) - tokens == room
    # v of four layers, and as much again or 128 MiB.
    v = 4 * batch_tokens * 4096 * 4
    assert workspace_bytes(batch_tokens) == v + max(v, 128 * MEBIBYTE)


def test_there_is_room_for_the_logits_of_requests_and_of_as_many_tokens_of_prompts(gpu: dict[str, float]) -> None:
    most = DeviceMemory(ServeSettings(max_sequences=1), GPU).cache_tokens(LLAMA)
    # Four tensors of a step, counts, the logits that graphs leave, and those of prompts.
    room = 7 * 255 * LLAMA.vocabulary * 4 // LLAMA.token_bytes
    assert most - DeviceMemory(ServeSettings(max_sequences=256), GPU).cache_tokens(LLAMA) == pytest.approx(room, abs=1)


def test_there_is_room_for_keys_that_a_step_copies_together(gpu: dict[str, float]) -> None:
    memory = DeviceMemory(ServeSettings(), GPU)
    most = memory.cache_tokens(replace(LLAMA, layer_bytes=0))
    assert most - memory.cache_tokens(LLAMA) == MOST_GATHERED * LLAMA.layer_bytes // LLAMA.token_bytes
    assert most - memory.cache_tokens(replace(LLAMA, context=131072)) == 131072 * LLAMA.layer_bytes // LLAMA.token_bytes
    # A sequence has no more keys than the cache.
    assert most - memory.cache_tokens(replace(LLAMA, context=1 << 30)) == -(-most // 32)


def test_memory_that_torch_holds_unused_is_free(gpu: dict[str, float]) -> None:
    before = DeviceMemory(ServeSettings(), GPU).pool_bytes()
    gpu["free"] -= 10
    gpu["reserved"] += 10
    assert DeviceMemory(ServeSettings(), GPU).pool_bytes() == before


@pytest.mark.parametrize(("free", "fraction"), [(0.5, 0.9), (8.0, 0.9), (40.0, 0.4)])
def test_too_little_memory_is_refused_by_name(gpu: dict[str, float], free: float, fraction: float) -> None:
    gpu["free"] = free
    memory = DeviceMemory(ServeSettings(gpu_memory_fraction=fraction), GPU)
    with pytest.raises(InvalidConfiguration, match="raise it, lower pool_mib, or serve a smaller base") as refusal:
        memory.pool_bytes()
    assert refusal.value.param == "gpu_memory_fraction" and f"{80 - free:.1f} of 80.0 GiB" in refusal.value.message


def test_a_cache_smaller_than_a_step_is_refused(gpu: dict[str, float]) -> None:
    gpu["free"] = 9.2
    with pytest.raises(InvalidConfiguration, match="for the KV cache"):
        DeviceMemory(ServeSettings(), GPU).cache_tokens(LLAMA)


def test_an_allocation_that_fails_names_its_setting() -> None:
    with (
        pytest.raises(InvalidConfiguration, match=r"the KV cache does not fit .* 9 GiB; lower kv_cache_tokens"),
        memory_of("the KV cache", "kv_cache_tokens"),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB\nand much more text")


@pytest.mark.parametrize("error", [RuntimeError("odd"), NotImplementedError("no kernel"), ValueError("memory")])
def test_what_is_no_lack_of_memory_is_not_called_so(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, memory_of("the KV cache", "kv_cache_tokens"):
        raise error
    assert raised.value is error


def test_a_step_without_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "smaller max_batch_tokens" in step_failed(torch.OutOfMemoryError("Tried to allocate")).message
    assert step_failed(RuntimeError("odd")).message == "the step failed: odd"


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_memory_of_a_failed_step_is_given_back(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[0]() is None))

    def step() -> None:
        large = torch.zeros(8)
        held.append(weakref.ref(large))
        raise kind("Tried to allocate")

    try:
        step()
    except Exception as error:  # noqa: BLE001 - of any kind
        free_memory(error)
        assert emptied == ([True] if kind is torch.OutOfMemoryError else [])
