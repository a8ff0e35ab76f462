"""Conversions of adapters: to PEFT checkpoints, and to dense matrices for a merge into the base model."""
