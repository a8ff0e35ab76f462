"""Measurements: `python -m benchmarks.NAME`; the last line of stdout is one JSON object."""

# Before PEFT is imported: it silences warnings of libraries that PEFT imports.
import sera_serve  # noqa: F401
