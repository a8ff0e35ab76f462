"""From a trained model to a version in the store."""

from __future__ import annotations

from typing import Any

from adapters_store import AdapterBundle, AdapterConfig, ModuleSpec
from sera_serve.base import FrozenBase, Pooling
from sera_serve.layers import module_specs
from sera_serve.trainer.model import AdapterModel
from sera_serve.trainer.settings import TrainSettings


def build_bundle(
    settings: TrainSettings,
    base: FrozenBase,
    model: AdapterModel,
    *,
    labels: list[str] | None,
    pooling: Pooling | None,
    max_length: int | None,
    record: dict[str, Any],
) -> AdapterBundle:
    """The adapter as the store keeps it.

    Args:
        settings: Of the run.
        base: The base it was trained on.
        model: With the tensors to store.
        labels: Of a classifier, in the order of the head's rows.
        pooling: Of a classifier.
        max_length: Of a classifier: where the server cuts its inputs, as training did.
        record: How it was trained; JSON values that are the same for each run of equal settings, so no times or paths.
    """
    modules = {path: ModuleSpec(**shape) for path, shape in module_specs(base.model).items()}
    config = AdapterConfig(
        task=settings.task,
        method=settings.method,
        base=base.info,
        modules=modules,
        labels=labels,
        pooling=pooling,
        max_length=max_length,
        training=record,
    )
    return AdapterBundle(config, model.stored_tensors())
