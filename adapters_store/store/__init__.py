"""The store of adapters: names, versions, aliases. The public names are at the package root."""
