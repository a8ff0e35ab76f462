"""Comparisons of methods: a plan of many training runs, what runs them, and the table and plot of their results."""
