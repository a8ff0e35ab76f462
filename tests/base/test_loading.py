"""Checkpoints that lack weights: a pooler may be absent, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sera_serve.base import load_base
from sera_serve.errors import BaseNotFound
from support.factories import encoded, random_encoder


def saved_encoder(folder: Path) -> Path:
    base = random_encoder()
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_saved_without_its_pooler_is_one_base_at_every_load(tmp_path: Path) -> None:
    folder = saved_encoder(tmp_path / "base")
    first, second = load_base(str(folder)), load_base(str(folder))
    assert first.info == second.info
    assert not any(tensor.any() for path, tensor in first.model.named_parameters() if "pooler" in path)
    ids, mask = encoded(first, ["some text"], 16)
    torch.testing.assert_close(first.hidden_states(ids, mask), random_encoder().hidden_states(ids, mask))


def test_a_checkpoint_that_lacks_other_weights_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved_encoder(tmp_path / "base")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    lost = "encoder.layer.1.output.dense.weight"
    del tensors[next(name for name in tensors if name.endswith(lost))]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseNotFound, match=lost) as refusal:
        load_base(str(folder))
    assert refusal.value.param == "base"
