"""The baseline: the same trace through PEFT and transformers' `generate`, one request at a time in order of arrival."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.generation.streamers import BaseStreamer

from benchmarks.http_load import Answer
from benchmarks.workload import TimedRequest
from sera_serve.base import FrozenBase

CONFIG = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token came; the first that `generate` gives a streamer is the prompt."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self._answer.times.append(time.perf_counter())
            self._answer.counts.append(value.numel())
        self._prompt = False

    def end(self) -> None:
        self._answer.complete = True


class PeftSwap:
    """LoRA adapters in safetensors files, loaded when a request asks for them, as many kept as the server may keep."""

    def __init__(self, base: FrozenBase, folder: Path, adapters: set[int], resident: int) -> None:
        """Save a LoRA adapter of rank 16 on all linear layers for each index."""
        self._resident = resident
        self._folder = folder
        self._loaded: OrderedDict[int, None] = OrderedDict()
        model = get_peft_model(base.share_weights().model, CONFIG)
        for index in sorted(adapters):
            torch.manual_seed(index)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            model.save_pretrained(str(folder / str(index)))
        self._base = base.share_weights().model
        self._model: Any = None

    def run(self, trace: Sequence[TimedRequest]) -> list[Answer]:
        """Serve a trace in real time: a request waits for those before it."""
        answers = []
        start = time.perf_counter()
        for request in trace:
            answer = Answer(request, str(request.adapter), start + request.due, status=200)
            time.sleep(max(0.0, answer.due - time.perf_counter()))
            answer.sent = time.perf_counter()
            self._activate(request.adapter)
            prompt = torch.tensor([request.prompt])
            with torch.no_grad():
                output = self._model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=request.new_tokens,
                    do_sample=False,
                    streamer=_Clock(answer),
                )
            answer.tokens = output[0, prompt.shape[1] :].tolist()
            answer.answered_by, answer.ended = answer.adapter, time.perf_counter()
            answers.append(answer)
        return answers

    def _activate(self, index: int) -> None:
        name, path = str(index), self._folder / str(index)
        if index not in self._loaded:
            if len(self._loaded) >= self._resident:
                dropped, _ = self._loaded.popitem(last=False)
                self._model.delete_adapter(str(dropped))
            if self._model is None:
                self._model = PeftModel.from_pretrained(self._base, path, adapter_name=name).eval()
            else:
                self._model.load_adapter(path, adapter_name=name)
        self._loaded[index] = None
        self._loaded.move_to_end(index)
        self._model.set_adapter(name)
