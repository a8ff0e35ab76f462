"""Conversions of adapters: from and to PEFT, weighted sums, the nearest SeRA, spectra, and dense matrices to merge."""
