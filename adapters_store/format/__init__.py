"""The adapter format: configuration, tensors, containers and their validation. See FORMAT.md."""
