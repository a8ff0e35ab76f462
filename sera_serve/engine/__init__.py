"""Continuous batching for generation and batched forwards for classification, over one pool of adapters."""

from sera_serve.base import ImageInput
from sera_serve.engine.constraint import ConstraintSpec, TokenConstraint
from sera_serve.engine.engine import ServingEngine
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.named_adapters import AdapterActivity
from sera_serve.engine.references import check_adapter_serves
from sera_serve.engine.request import (
    BASE_PRINCIPAL,
    BASE_TENANT,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MIN_REPETITION_PENALTY,
    AdapterChoice,
    GenerateParams,
    Principal,
    Priority,
    Task,
    WeightedAdapter,
)
from sera_serve.engine.results import HeadResult, LabelScores, LabelSet, Score, Spans, TokenLogprobs
from sera_serve.engine.stream import GenerationResult, GenerationStream, TokenDelta, TokensUsed
from sera_serve.engine.tasks import RunnerLoad
from sera_serve.engine.tasks.classify import ClassifyResult, EmbedResult
from sera_serve.residency import LOAD_BUCKETS, LoadTimes, Presence, ResidencyStats, Tier
from sera_serve.residency.import_probe import ImportedAdapter

__all__ = [
    "BASE_PRINCIPAL",
    "BASE_TENANT",
    "LOAD_BUCKETS",
    "MAX_CHOICES",
    "MAX_LOGIT_BIAS",
    "MIN_REPETITION_PENALTY",
    "PAGE_SIZE",
    "AdapterActivity",
    "AdapterChoice",
    "ClassifyResult",
    "ConstraintSpec",
    "EmbedResult",
    "GenerateParams",
    "GenerationResult",
    "GenerationStream",
    "HeadResult",
    "ImageInput",
    "ImportedAdapter",
    "LabelScores",
    "LabelSet",
    "LoadTimes",
    "Presence",
    "Principal",
    "Priority",
    "ResidencyStats",
    "RunnerLoad",
    "Score",
    "ServingEngine",
    "Spans",
    "Task",
    "Tier",
    "TokenConstraint",
    "TokenDelta",
    "TokenLogprobs",
    "TokensUsed",
    "WeightedAdapter",
    "check_adapter_serves",
]
