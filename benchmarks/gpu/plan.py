"""The sections of each command, in order of worth, and what they rest on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One process.

    Attributes:
        name: Of its rows.
        module: Of this package.
        function: Takes a `Setting`, and `argument` unless that is None; returns or yields rows.
        limit_s: Seconds after which the process is killed.
        is_check: Its rows have `correct`. Checks run side by side, before anything is timed.
        needs: Checks without which its figures mean nothing.
        argument: Which part of the module's work it does.
    """

    name: str
    module: str
    function: str
    limit_s: float
    is_check: bool = False
    needs: tuple[str, ...] = ()
    argument: str | None = None


def _check(name: str, module: str, function: str, limit_s: float, argument: str | None = None) -> Section:
    return Section(name, module, function, limit_s, is_check=True, argument=argument)


_KERNEL_CHECKS = tuple(
    _check(f"kernel {part}", "kernel_check", "check_kernel", 80, part)
    for part in ("llama", "bfloat16", "float32", "float16")
)
_ENGINE_CHECKS = tuple(
    _check(f"engine {part}", "engine_check", "check_engine", 120, part)
    for part in ("float32 graphs", "bfloat16 graphs", "float32 eager", "bfloat16 eager")
)
_ATTENTION_CHECKS = tuple(
    _check(f"attention {part}", "attention_check", "check_attention", 80, part) for part in ("decode", "prefill")
)
_DECODE_CHECK = _check("decode check", "decode_check", "check_decode", 80)
_SAMPLING_CHECK = _check("sampling check", "sampling_check", "check_sampling", 80)


def _names(*sections: Section) -> tuple[str, ...]:
    return tuple(section.name for section in sections)


_KERNEL = _names(*_KERNEL_CHECKS)
_ENGINE = _names(*_KERNEL_CHECKS, *_ATTENTION_CHECKS, _SAMPLING_CHECK, *_ENGINE_CHECKS)

FIRST = (
    *_ENGINE_CHECKS,
    *_KERNEL_CHECKS,
    *_ATTENTION_CHECKS,
    _DECODE_CHECK,
    _SAMPLING_CHECK,
    Section("machine", "machine", "measure_machine", 30),
    Section("decode step", "decode_step", "time_decode", 60, needs=(*_KERNEL, _DECODE_CHECK.name)),
    Section("sampling time", "sampling_time", "time_sampling", 20, needs=_names(_SAMPLING_CHECK)),
    Section("attention time", "attention_time", "time_attention", 30, needs=_names(*_ATTENTION_CHECKS)),
    Section("engine 8b", "engine_time", "time_engine", 110, needs=_ENGINE),
    Section("kernel time", "kernel_time", "time_kernel", 60, needs=_KERNEL),
    Section("tuning", "tuning", "tune_kernel", 35, needs=_KERNEL),
)

_SECOND_CHECKS = (
    _check("eviction stress", "eviction_check", "check_eviction", 90),
    _KERNEL_CHECKS[0],
    _check("memory check", "sanitizer", "check_memory", 100),
)
_EVICTION, _LLAMA, _ = _names(*_SECOND_CHECKS)

SECOND = (
    *_SECOND_CHECKS,
    Section("machine", "machine", "measure_machine", 30),
    Section("prefill time", "prefill_time", "time_prefill", 40, needs=(_LLAMA,)),
    Section("server", "http_time", "time_server", 140, needs=(_EVICTION, _LLAMA)),
    Section("peers", "kernel_time", "time_peers", 60, needs=(_LLAMA,)),
    Section("capacity", "capacity", "measure_capacity", 30),
    Section("residents", "capacity", "measure_residents", 60, needs=(_LLAMA,)),
)

COMMANDS = {"first": (FIRST, 360.0), "second": (SECOND, 300.0)}
"""Sections and budget in seconds, by command."""
