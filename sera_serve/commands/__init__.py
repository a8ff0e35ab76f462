"""What the commands do: they put the packages together. `sera_serve.cli` reads the command line."""
