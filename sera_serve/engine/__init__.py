"""Continuous batching for generation and batched forwards for classification, over one pool of adapters."""

from sera_serve.engine.classification import ClassifyResult, LabelScores
from sera_serve.engine.generation import GenerateParams, GenerationResult, GenerationStream, TokenDelta
from sera_serve.engine.serving import ServingEngine

__all__ = [
    "ClassifyResult",
    "GenerateParams",
    "GenerationResult",
    "GenerationStream",
    "LabelScores",
    "ServingEngine",
    "TokenDelta",
]
