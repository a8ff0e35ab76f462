"""Correctness and speed on a GPU: `python -m benchmarks.gpu first` and `second`.

`plan` lists the sections. `supervisor` runs each of them in a process of its own. A section's module yields rows, which
go to a file at once (`record`). `report` makes the table.
"""
