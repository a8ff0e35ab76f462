"""Rows of the tasks: checked, split for evaluation, and made into batches."""
