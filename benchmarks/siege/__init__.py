"""Attacks on a server process, and what its other clients notice of them."""
