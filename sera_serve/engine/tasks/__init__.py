"""One runner for each task: a scheduler, and a loop over the base model on a thread of its own."""

from sera_serve.engine.tasks.classify import ClassificationRunner
from sera_serve.engine.tasks.generate import GenerationRunner
from sera_serve.engine.tasks.runner import RunnerLoad, TaskRunner

__all__ = ["ClassificationRunner", "GenerationRunner", "RunnerLoad", "TaskRunner"]
