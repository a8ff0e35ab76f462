"""Continuous batching for generation and batched forwards for classification, over one pool of adapters."""

from sera_serve.engine.engine import ServingEngine
from sera_serve.engine.request import (
    BASE_PRINCIPAL,
    BASE_TENANT,
    GenerateParams,
    LabelScores,
    Principal,
    Priority,
    Task,
    TokenLogprobs,
)
from sera_serve.engine.stream import GenerationResult, GenerationStream, TokenDelta
from sera_serve.engine.tasks import RunnerLoad
from sera_serve.engine.tasks.classify import ClassifyResult
from sera_serve.residency import LOAD_BUCKETS, LoadTimes, ResidencyStats

__all__ = [
    "BASE_PRINCIPAL",
    "BASE_TENANT",
    "LOAD_BUCKETS",
    "ClassifyResult",
    "GenerateParams",
    "GenerationResult",
    "GenerationStream",
    "LabelScores",
    "LoadTimes",
    "Principal",
    "Priority",
    "ResidencyStats",
    "RunnerLoad",
    "ServingEngine",
    "Task",
    "TokenDelta",
    "TokenLogprobs",
]
