"""Continuous batching for generation and batched forwards for classification, over one pool of adapters."""

from sera_serve.engine.classification import ClassifyResult, LabelScores
from sera_serve.engine.generation import GenerateParams, GenerationResult, GenerationStream, Priority, TokenDelta
from sera_serve.engine.principal import BASE_PRINCIPAL, BASE_TENANT, Principal
from sera_serve.engine.serving import ServingEngine
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
    "ServingEngine",
    "TokenDelta",
]
