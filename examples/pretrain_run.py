"""The pre-training loop: a small Llama, Muon and AdamW, a warmup-stable-decay schedule on the clock, checkpoints."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pretrain_corpus import Tokens, sample_batch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 512
STABLE_MIX = {
    "cased": 0.19, "recased": 0.11, "lower": 0.05, "requests": 0.06, "children": 0.23, "plain": 0.26, "other": 0.10,
}  # fmt: skip
# The weights learnt at low rate stay: end on the simplest English, and on complete stories.
DECAY_MIX = {
    "cased": 0.26, "recased": 0.13, "lower": 0.04, "requests": 0.10, "children": 0.24, "plain": 0.18, "other": 0.05,
}  # fmt: skip


@dataclass(frozen=True)
class RunSettings:
    """How a run is trained. Rates are per optimiser step; ``minutes`` counts training time over all resumes."""

    minutes: float
    decay_share: float = 0.27
    warmup_share: float = 0.015
    micro_batch: int = 4  # windows whose activations stay near the cache
    accumulation: int = 4
    muon_rate: float = 0.02
    adam_rate: float = 4e-3
    weight_decay: float = 0.05
    checkpoint_seconds: float = 180.0
    seed: int = 0
    compile: bool = True


def base_config(bos: int, eos: int, pad: int) -> LlamaConfig:
    """The embedded base's shape: 4.5M parameters, every width a multiple of 64 (an adapter's split)."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def build_optimisers(model: LlamaForCausalLM, settings: RunSettings) -> list[torch.optim.Optimizer]:
    """Muon for the 2-D matrices of the decoder layers; AdamW for the embedding (tied to the head) and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.muon_rate, momentum=0.95, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate_factor(progress: float, settings: RunSettings) -> float:
    """The learning rate's factor at ``progress`` (0 to 1 of the time): linear warmup, flat, linear decay to 0."""
    warmup = min(1.0, progress / settings.warmup_share)
    decay = min(1.0, (1.0 - progress) / settings.decay_share)
    return max(0.0, min(warmup, decay))


def loss_function(model: LlamaForCausalLM, device: str) -> Callable[[Tensor], Tensor]:
    """Mean next-token cross-entropy, in nats, of a batch of token windows (windows, length)."""

    def loss(windows: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    return loss


@dataclass
class Progression:
    """Where a run stands: steps done, tokens seen, seconds trained."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Run:
    """One pre-training run in ``directory``: ``checkpoint.pt`` (resumed if there) and ``log.jsonl``."""

    def __init__(self, model: LlamaForCausalLM, streams: dict[str, Tokens], directory: Path, settings: RunSettings):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device)
        self.streams, self.directory, self.settings = streams, directory, settings
        self.optimisers = build_optimisers(model, settings)
        self.base_rates = [group["lr"] for optimiser in self.optimisers for group in optimiser.param_groups]
        self.position = Progression()
        loss = loss_function(model, self.device)
        self.loss: Callable[[Tensor], Tensor] = torch.compile(loss) if settings.compile else loss
        self._resume()

    @property
    def progress(self) -> float:
        """Share of the time budget used."""
        return self.position.seconds / (60.0 * self.settings.minutes)

    def _resume(self) -> None:
        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        torch.set_rng_state(state["rng"].cpu())
        self.position = Progression(**state["position"])
        log = self.directory / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        # A kill can leave a torn last line, and lines of steps that the checkpoint does not have.
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.position.step]
        log.write_text("".join(kept))

    def save(self) -> None:
        """Write the checkpoint whole or not at all, so that a kill at any moment leaves a usable one."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "rng": torch.get_rng_state(),
            "position": vars(self.position),
        }
        partial = self.directory / "checkpoint.pt.partial"
        torch.save(state, partial)
        partial.replace(self.directory / "checkpoint.pt")

    def _set_rates(self) -> None:
        factor = rate_factor(self.progress, self.settings)
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        for group, rate in zip(groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def train_step(self) -> float:
        """One optimiser step; returns the mean loss in nats per token."""
        settings = self.settings
        self._set_rates()
        mix = DECAY_MIX if self.progress > 1.0 - settings.decay_share else STABLE_MIX
        windows = settings.micro_batch * settings.accumulation
        batch = sample_batch(self.streams, mix, self.position.step, windows, CONTEXT + 1, settings.seed)
        total = 0.0
        for rows in torch.from_numpy(batch).to(self.device).split(settings.micro_batch):
            loss = self.loss(rows) / settings.accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.position.step += 1
        self.position.tokens += windows * CONTEXT
        return total

    def _log(self, loss: float, tokens_per_s: float) -> None:
        row = vars(self.position) | {"loss": round(loss, 4), "tokens_per_s": round(tokens_per_s)}
        with (self.directory / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def train(self) -> None:
        """Train until the time budget is used, with a checkpoint every ``checkpoint_seconds``; raises on a NaN loss."""
        saved_at, smooth, speed = time.monotonic(), 0.0, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.model.train()
        with Progress(*columns) as display:
            task = display.add_task("pre-training", total=1.0)
            while self.progress < 1.0:
                started = time.monotonic()
                loss = self.train_step()
                if not math.isfinite(loss):
                    raise FloatingPointError(f"loss is {loss} at step {self.position.step}; lower --muon-rate")
                taken = time.monotonic() - started
                self.position.seconds += taken
                now = self.settings.micro_batch * self.settings.accumulation * CONTEXT / taken
                smooth = 0.95 * smooth + 0.05 * loss if smooth else loss
                speed = 0.95 * speed + 0.05 * now if speed else now
                display.update(
                    task,
                    completed=self.progress,
                    description=f"step {self.position.step}  loss {smooth:.3f}  {speed:,.0f} tok/s",
                )
                if self.position.step % 10 == 0:
                    self._log(smooth, speed)
                if time.monotonic() - saved_at > self.settings.checkpoint_seconds:
                    self.save()
                    saved_at = time.monotonic()
        self.save()
