"""The offline trainer: rows of text in, a published adapter out."""
