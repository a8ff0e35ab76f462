"""Configurations that are wrong, with the code and the field of the refusal."""

from __future__ import annotations

import json
from typing import Any

from bundle_factory import GAINS, HEAD, IMAGE, MODULE, TAGS, TEMPLATE, Q, classifier_fields, config_fields

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


def third(**changes: Any) -> dict[str, Any]:
    return config_fields(**{"format_version": 3, **changes})


def third_classifier(**changes: Any) -> dict[str, Any]:
    return classifier_fields(**{"format_version": 3, "multi_label": True, **changes})


def images(**changes: Any) -> dict[str, Any]:
    return third(**{"task": "image-classify", "labels": ["a", "b"], "pooling": "cls", "image": IMAGE, **changes})


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

# Refusals of what version 3 added.
THIRD: dict[str, tuple[str | dict[str, Any], str, str]] = {
    "regress in version 1": (classifier_fields(task="regress", labels=None), "invalid_config", f"{P}.task"),
    "retrieve in version 2": (second(task="retrieve"), "invalid_config", f"{P}.task"),
    "multi-label in version 1": (classifier_fields(multi_label=False), "invalid_config", f"{P}.multi_label"),
    "image in version 2": (second(image=None), "invalid_config", f"{P}.image"),
    "version 3 without use": (third(task="generate"), "invalid_config", f"{P}.format_version"),
    "version 3 of version 2": (third(task="generate", chat_template=TEMPLATE), "invalid_config", f"{P}.format_version"),
    "multi-label a number": (third_classifier(multi_label=1), "invalid_config", f"{P}.multi_label"),
    "multi-label of a generator": (third(task="generate", multi_label=True), "invalid_config", f"{P}.multi_label"),
    "multi-label of no labels": (third_classifier(labels=[]), "invalid_config", f"{P}.labels"),
    "regress with labels": (third(task="regress", pooling="cls", labels=["a", "b"]), "invalid_config", f"{P}.labels"),
    "regress without pooling": (third(task="regress"), "invalid_config", f"{P}.pooling"),
    "regress of chats": (
        third(task="regress", pooling="cls", chat_template=TEMPLATE),
        "invalid_config",
        f"{P}.chat_template",
    ),
    "tags without O": (third(task="token-classify", labels=["B-a", "I-a"]), "invalid_config", f"{P}.labels"),
    "tags without I": (third(task="token-classify", labels=["O", "B-a"]), "invalid_config", f"{P}.labels"),
    "tags of no kind": (third(task="token-classify", labels=["O", "B-", "I-"]), "invalid_config", f"{P}.labels"),
    "tags twice": (third(task="token-classify", labels=["O", "B-a", "I-a", "B-a"]), "invalid_config", f"{P}.labels"),
    "tags pooled": (third(task="token-classify", labels=TAGS, pooling="cls"), "invalid_config", f"{P}.pooling"),
    "image of a classifier": (third_classifier(image=IMAGE), "invalid_config", f"{P}.image"),
    "image-classify without image": (images(image=None), "invalid_config", f"{P}.image"),
    "image-classify with max_length": (images(max_length=9), "invalid_config", f"{P}.max_length"),
    "image-classify of the last token": (images(pooling="last_token"), "invalid_config", f"{P}.pooling"),
    "image of no width": (images(image={**IMAGE, "width": 0}), "invalid_config", f"{P}.image.width"),
    "image astronomic": (images(image={**IMAGE, "height": 1 << 40}), "invalid_config", f"{P}.image.height"),
    "image of two channels": (images(image={**IMAGE, "mean": [0.5, 0.5]}), "invalid_config", f"{P}.image.mean"),
    "image divided by 0": (images(image={**IMAGE, "std": [1.0, 0, 1.0]}), "invalid_config", f"{P}.image.std.1"),
    "image stretched": (images(image={**IMAGE, "resize": "crop"}), "invalid_config", f"{P}.image.resize"),
    "image of a further field": (images(image={**IMAGE, "pad": 1}), "invalid_config", f"{P}.image.pad"),
    "retrieve with labels": (third(task="retrieve", image=IMAGE, labels=["a", "b"]), "invalid_config", f"{P}.labels"),
    "retrieve with a head": (third(task="retrieve", image=IMAGE, head=HEAD), "invalid_config", f"{P}.head"),
    "head-only of retrieve": (
        third(task="retrieve", image=IMAGE, method="head-only", modules={}),
        "invalid_config",
        f"{P}.method",
    ),
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
    **THIRD,
    "version 0": (config_fields(format_version=0), "unsupported_format", f"{P}.format_version"),
    "version 4": (second(format_version=4), "unsupported_format", f"{P}.format_version"),
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
