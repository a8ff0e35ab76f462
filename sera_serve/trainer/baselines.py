"""Methods of other libraries, to compare ours with: PEFT's, AdapterHub's bottleneck adapters, and full fine-tuning.

A baseline takes the place of the adapter in a task's model. Loop, rows, order, schedule, head and evaluation stay
those of our own methods. A baseline is not served, so nothing is published.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sera_serve.errors import InvalidConfiguration
from sera_serve.layers import SeraConfig
from sera_serve.layers.targets import select_targets
from sera_serve.trainer.allocation import SettlesRanks
from sera_serve.trainer.model import AdapterModel
from sera_serve.trainer.settings import TrainSettings
from sera_serve.trainer.tasks import TrainingTask
from sera_serve.trainer.tasks.image_classify import DUAL_TOWER, ImageClassifyTask

Baseline = Literal["peft-lora", "vera", "adalora", "dora", "bd-lora", "houlsby", "pfeiffer", "full"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
# These run on an older transformers than ours, in an environment of their own.
NEED_ADAPTERS: tuple[Baseline, ...] = ("houlsby", "pfeiffer")
# Those whose B is the one of LoRA, of which LoRA+ raises the learning rate.
WITH_LORA_B: tuple[Baseline, ...] = ("peft-lora", "dora", "bd-lora")
# Of the options that shape our own adapters, those that a baseline takes.
ADAPTER_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*WITH_LORA_B, "adalora"), ("target_modules", "lora_alpha")),
    "vera": ("target_modules",),
    **dict.fromkeys((*NEED_ADAPTERS, "full"), ()),
}
_ADAPTER = "baseline"


class MissingLibrary(InvalidConfiguration):
    """A baseline's library is not installed, is too old, or does not run on this transformers."""


@dataclass(frozen=True)
class BaselineShape:
    """What a baseline needs beside the settings of the run.

    Attributes:
        method: The baseline.
        rank: Rank of the methods of PEFT; the target of AdaLoRA, which starts at one and a half times of it.
        blocks: Diagonal blocks of BD-LoRA.
        reduction_factor: Width of the base divided by the width of a bottleneck.
    """

    method: Baseline
    rank: int = 8
    blocks: int = 4
    reduction_factor: int = 16


def install_baseline(task: TrainingTask, settings: TrainSettings, shape: BaselineShape) -> list[TrainerCallback]:
    """Give `task` a model in which the baseline trains. The base has no adapter attached.

    Args:
        task: The task, with the frozen base and a new head.
        settings: Targets, `lora_alpha`, dropout, epochs and seed.
        shape: The baseline and its size.

    Returns:
        Callbacks that the baseline needs in the loop.

    Raises:
        InvalidConfiguration: The library cannot adapt this base.
        MissingLibrary: The library is absent, or too old.
    """
    if shape.method == "full":
        task.model = _fully_trained(task)
        return []
    before = set(task.model.modules())
    tuner: Any = None
    if shape.method in NEED_ADAPTERS:
        _add_bottlenecks(task, settings, shape)
    else:
        # PeftModel would call the task's model itself, past the term that AdaLoRA's tuner adds to the loss.
        tuner = _with_peft(task, settings, shape).base_model
    # Libraries give their dropout different names.
    added = [module for module in task.model.modules() if isinstance(module, nn.Dropout) and module not in before]
    task.model = BaselineModel(task.model, tuner, added)
    if shape.method != "adalora":
        return []
    config = tuner.peft_config[_ADAPTER]
    # PEFT counts steps from 0, and the loop from 1. A short run ends before it.
    return [_AllocatesRanks(tuner, min(config.total_step, config.total_step - config.tfinal + 1))]


class BaselineModel(AdapterModel):
    """A task's model whose trained parameters belong to another library.

    The tensors that it stores, for the checkpoint of the best epoch, are the trained parameters by their own names.
    """

    def __init__(
        self, inner: AdapterModel, wrapped: nn.Module | None = None, dropouts: Sequence[nn.Dropout] = ()
    ) -> None:
        """Prepare.

        Args:
            inner: The task's model, in whose base the library has put its modules.
            wrapped: What computes the loss in its place, if the library adds something to the loss.
            dropouts: The dropout that the library has put into the base.
        """
        # The head comes first, so that its parameters keep the names by which the loop knows them.
        super().__init__(None, inner.head)
        self.inner = inner
        self.wrapped = wrapped
        # A list, because the modules are registered where the library has put them.
        self._dropouts = list(dropouts)
        if inner.head is not None:
            inner.head.requires_grad_(True)

    def train(self, mode: bool = True) -> BaselineModel:
        """Switch the dropout of head and adapter. The base itself stays in evaluation mode, as with our methods."""
        super().train(mode)
        for module in self._dropouts:
            module.train(mode)
        return self

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Compute the task's loss, with the term that the baseline adds to it, if any."""
        outputs: Mapping[str, Tensor] = self.inner(**batch) if self.wrapped is None else self.wrapped(**batch)
        return dict(outputs)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return every trained parameter. They share memory."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


class _Outputs(dict[str, Tensor]):
    """A task's result with the attribute to which AdaLoRA adds its term."""

    @property
    def loss(self) -> Tensor:
        return self["loss"]

    @loss.setter
    def loss(self, value: Tensor) -> None:
        self["loss"] = value


class _WithOutput(nn.Module):
    """The task's model with the kind of result that PEFT looks for the loss in."""

    def __init__(self, inner: AdapterModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Tensor) -> _Outputs:
        return _Outputs(self.inner(**batch))


def _with_peft(task: TrainingTask, settings: TrainSettings, shape: BaselineShape) -> Any:
    peft = _library("peft", "pip install peft")
    named = SeraConfig(rank=1, split=1, lora_alpha=1.0, target_modules=settings.target_modules)  # type: ignore[arg-type]
    targets = [path for path in select_targets(task.base.model, named) if _is_passed(task, path)]
    config = _peft_config(peft, task, settings, shape, targets)
    try:
        return peft.get_peft_model(_WithOutput(task.model), config, adapter_name=_ADAPTER)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidConfiguration(
            f"PEFT cannot add {shape.method} of rank {shape.rank} to base {task.base.name}: {error}", param="method"
        ) from error


def _peft_config(
    peft: Any, task: TrainingTask, settings: TrainSettings, shape: BaselineShape, targets: list[str]
) -> Any:
    if shape.method == "vera":
        return peft.VeraConfig(
            r=shape.rank,
            target_modules=targets,
            vera_dropout=settings.dropout,
            projection_prng_key=settings.seed,
        )
    common = {
        "lora_alpha": settings.lora_alpha or 2 * shape.rank,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
    }
    if shape.method == "adalora":
        steps = settings.epochs * -(-len(task.train_rows) // settings.batch_size)
        return peft.AdaLoraConfig(
            **common,
            init_r=max(shape.rank + 1, shape.rank * 3 // 2),
            target_r=shape.rank,
            total_step=steps,
            # The budget falls between a tenth and seven tenths of the steps, at up to fifty of them.
            tinit=steps // 10,
            tfinal=steps * 3 // 10,
            deltaT=max(1, steps // 50),
        )
    options: dict[str, Any] = {}
    if shape.method == "bd-lora":
        if not hasattr(peft, "BdLoraConfig"):
            raise MissingLibrary(
                f"bd-lora needs PEFT 0.19 or newer, not {peft.__version__}; pip install --upgrade peft", param="method"
            )
        options["use_bdlora"] = peft.BdLoraConfig(target_modules_bd_b=targets, nblocks=shape.blocks)
    return peft.LoraConfig(**common, r=shape.rank, use_dora=shape.method == "dora", **options)


class _AllocatesRanks(SettlesRanks):
    """Lets AdaLoRA move its budget: after the optimiser's step, while the gradients are there."""

    def __init__(self, tuner: Any, settled_step: int) -> None:
        self._tuner = tuner
        self.settled_step = settled_step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tuner.update_and_allocate(state.global_step)


def _add_bottlenecks(task: TrainingTask, settings: TrainSettings, shape: BaselineShape) -> None:
    adapters = _library("adapters", "give --adapters-python, the Python of an environment that has it")
    kind = adapters.DoubleSeqBnConfig if shape.method == "houlsby" else adapters.SeqBnConfig
    base = task.base.model
    try:
        adapters.init(base)
        base.add_adapter(_ADAPTER, config=kind(reduction_factor=shape.reduction_factor, dropout=settings.dropout))
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise InvalidConfiguration(
            f"adapters cannot add {shape.method} to base {task.base.name}: {error}", param="method"
        ) from error
    base.train_adapter(_ADAPTER)


def _is_passed(task: TrainingTask, name: str) -> bool:
    """Whether a weight or a layer is in the tower that the task's inputs pass, if the base has two."""
    return name.startswith(DUAL_TOWER) or not (isinstance(task, ImageClassifyTask) and task.base.kind == "dual")


def _fully_trained(task: TrainingTask) -> BaselineModel:
    model = task.model
    assert model.base_model is not None
    if model.base_model.dtype != torch.float32:
        raise InvalidConfiguration(
            f"full fine-tuning would train weights in {str(model.base_model.dtype).removeprefix('torch.')}, in which "
            "small steps round to none; give the method dtype: float32",
            param="dtype",
        )
    for name, parameter in model.base_model.named_parameters():
        # The pooler of an encoder has no part in the result, nor the temperature of a loss that is not the trainer's.
        idle = {"pooler", "logit_scale"}.intersection(name.split("."))
        parameter.requires_grad_(not idle and _is_passed(task, name))
    if model.head is not None and (outputs := model.base_model.get_output_embeddings()) is not None:
        # A classifier does not use the output embedding, unless it is the input embedding too.
        outputs.requires_grad_(outputs.weight is model.base_model.get_input_embeddings().weight)
    return BaselineModel(model)


def _library(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise MissingLibrary(f"this baseline needs the library {name} ({error}); {remedy}", param="method") from error


def same_head(model: AdapterModel, seed: int) -> None:
    """Draw the head's values anew from `seed`, so that all methods of a comparison start from the same head."""
    if model.head is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            values = torch.empty(model.head.weight.shape).normal_(std=0.02, generator=generator)
            model.head.weight.copy_(values)
