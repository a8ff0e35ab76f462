"""The offline trainer: reads rows of text, trains an adapter, and publishes it to a store."""
