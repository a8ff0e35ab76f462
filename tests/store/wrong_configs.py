"""Configurations that are wrong, with the code and the field of the refusal."""

from __future__ import annotations

import json
from typing import Any

from bundle_factory import GAINS, HEAD, MODULE, TEMPLATE, Q, classifier_fields, config_fields

P = "adapter_config"
M = f"{P}.modules.{Q}"


def module(**changes: Any) -> dict[str, Any]:
    return config_fields(modules={Q: {**MODULE, **changes}})


def second(**changes: Any) -> dict[str, Any]:
    return config_fields(**{"format_version": 2, **changes})


def second_module(**changes: Any) -> dict[str, Any]:
    return second(modules={Q: {**GAINS, **changes}})


def second_head(**changes: Any) -> dict[str, Any]:
    return classifier_fields(format_version=2, head={**HEAD, **changes})


# Refusals of what version 2 added.
SECOND: dict[str, tuple[str | dict[str, Any], str, str]] = {
    "template in version 1": (config_fields(chat_template=TEMPLATE), "invalid_config", f"{P}.chat_template"),
    "template null in version 1": (config_fields(chat_template=None), "invalid_config", f"{P}.chat_template"),
    "head in version 1": (classifier_fields(head=HEAD), "invalid_config", f"{P}.head"),
    "gain in version 1": (module(has_gain=True), "invalid_config", f"{M}.has_gain"),
    "offset in version 1": (module(has_offset=True), "invalid_config", f"{M}.has_offset"),
    "no gain in version 1": (module(has_gain=False), "invalid_config", f"{M}.has_gain"),
    "version 2 without use": (second(), "invalid_config", f"{P}.format_version"),
    "version 2 of defaults": (
        second(chat_template=None, head=None, modules={Q: {**MODULE, "has_gain": False, "has_offset": False}}),
        "invalid_config",
        f"{P}.format_version",
    ),
    "gain a number": (second_module(has_gain=1), "invalid_config", f"{M}.has_gain"),
    "offset a vector": (second_module(has_offset=[0.0]), "invalid_config", f"{M}.has_offset"),
    "template empty": (second(chat_template=""), "invalid_config", f"{P}.chat_template"),
    "template a list": (second(chat_template=[TEMPLATE]), "invalid_config", f"{P}.chat_template"),
    # Longer in bytes than in characters.
    "template too long": (second(chat_template="é" * (33 << 10)), "invalid_config", f"{P}.chat_template"),
    "template of a classifier": (
        classifier_fields(format_version=2, chat_template=TEMPLATE),
        "invalid_config",
        f"{P}.chat_template",
    ),
    "head of a generator": (second(head=HEAD), "invalid_config", f"{P}.head"),
    "head a list": (classifier_fields(format_version=2, head=[5]), "invalid_config", f"{P}.head"),
    "head without width": (
        classifier_fields(format_version=2, head={"activation": "tanh"}),
        "invalid_config",
        f"{P}.head.width",
    ),
    "head of no width": (second_head(width=0), "invalid_config", f"{P}.head.width"),
    "head of astronomic width": (second_head(width=1 << 40), "invalid_config", f"{P}.head.width"),
    "head of a float width": (second_head(width=5.0), "invalid_config", f"{P}.head.width"),
    "head of another activation": (second_head(activation="selu"), "invalid_config", f"{P}.head.activation"),
    "head of a further field": (second_head(dropout=0.1), "invalid_config", f"{P}.head.dropout"),
}

CONFIGS: dict[str, tuple[str | dict[str, Any], str, str]] = {
    "not JSON": ("{", "invalid_config", P),
    "no object": ("[1]", "invalid_config", P),
    "too deep": ('{"a":' * 100_000, "invalid_config", P),
    "key twice": ('{"task": "generate", "task": "generate"}', "invalid_config", P),
    "NaN": (json.dumps(config_fields(training={"loss": float("nan")})), "invalid_config", P),
    "infinite scaling": (json.dumps(module(scaling=float("inf"))), "invalid_config", P),
    "scaling overflows": (json.dumps(module()).replace("0.5", "1e999"), "invalid_config", f"{M}.scaling"),
    "scaling astronomic": (json.dumps(module()).replace("0.5", "9" * 400), "invalid_config", f"{M}.scaling"),
    "digits without end": (json.dumps(module()).replace("0.5", "9" * 9000), "invalid_config", P),
    "lone surrogate": (json.dumps(config_fields(training={"a": "\ud800"})), "invalid_config", P),
    **SECOND,
    "version 0": (config_fields(format_version=0), "unsupported_format", f"{P}.format_version"),
    "version 3": (second(format_version=3), "unsupported_format", f"{P}.format_version"),
    "version true": (config_fields(format_version=True), "invalid_config", f"{P}.format_version"),
    "version 1.0": (config_fields(format_version=1.0), "invalid_config", f"{P}.format_version"),
    "no version": (
        {k: v for k, v in config_fields().items() if k != "format_version"},
        "invalid_config",
        f"{P}.format_version",
    ),
    "no base": ({k: v for k, v in config_fields().items() if k != "base"}, "invalid_config", f"{P}.base"),
    "unknown field": (config_fields(lora_alpha=1), "invalid_config", f"{P}.lora_alpha"),
    "unknown task": (config_fields(task="embed"), "invalid_config", f"{P}.task"),
    "unknown method": (config_fields(method="vera"), "invalid_config", f"{P}.method"),
    "unknown base field": (config_fields(base={"x": 1}), "invalid_config", f"{P}.base.name"),
    "unknown module field": (module(alpha=1), "invalid_config", f"{M}.alpha"),
    "rank a float": (module(rank=4.0), "invalid_config", f"{M}.rank"),
    "rank a string": (module(rank="4"), "invalid_config", f"{M}.rank"),
    "rank true": (module(rank=True), "invalid_config", f"{M}.rank"),
    "rank 0": (module(rank=0), "invalid_config", f"{M}.rank"),
    "rank negative": (module(rank=-4), "invalid_config", f"{M}.rank"),
    "d_in astronomic": (module(d_in=1 << 40), "invalid_config", f"{M}.d_in"),
    "mixer a number": (module(use_mixer=1), "invalid_config", f"{M}.use_mixer"),
    "split and rank": (module(split=4, rank=6), "invalid_config", f"{M}.split"),
    "split and d_in": (module(split=4, d_in=6), "invalid_config", f"{M}.split"),
    "split and d_out": (module(split=4, d_out=6), "invalid_config", f"{M}.split"),
    "path with a slash": (
        config_fields(modules={"../x": MODULE}),
        "invalid_config",
        f"{P}.modules.../x.[key]",
    ),
    "path with a line end": (
        config_fields(modules={"x\n": MODULE}),
        "invalid_config",
        f"{P}.modules.x\n.[key]",
    ),
    "no modules": (config_fields(modules={}), "invalid_config", f"{P}.modules"),
    "head-only with modules": (classifier_fields(method="head-only"), "invalid_config", f"{P}.modules"),
    "head-only generator": (
        config_fields(method="head-only", modules={}),
        "invalid_config",
        f"{P}.method",
    ),
    "generator with labels": (config_fields(labels=["a", "b"]), "invalid_config", f"{P}.labels"),
    "generator with pooling": (config_fields(pooling="cls"), "invalid_config", f"{P}.pooling"),
    "generator with max_length": (config_fields(max_length=9), "invalid_config", f"{P}.max_length"),
    "no labels": (classifier_fields(labels=None), "invalid_config", f"{P}.labels"),
    "one label": (classifier_fields(labels=["a"]), "invalid_config", f"{P}.labels"),
    "same labels": (classifier_fields(labels=["a", "a"]), "invalid_config", f"{P}.labels"),
    "empty label": (classifier_fields(labels=["a", ""]), "invalid_config", f"{P}.labels.1"),
    "no pooling": (classifier_fields(pooling=None), "invalid_config", f"{P}.pooling"),
    "max_length 0": (classifier_fields(max_length=0), "invalid_config", f"{P}.max_length"),
    "training no object": (config_fields(training=[]), "invalid_config", f"{P}.training"),
    "training too deep": (
        config_fields(training={"a": [[[[[[[[1]]]]]]]]}),
        "invalid_config",
        f"{P}.training",
    ),
}
