"""`python -m sera_serve.trainer`, which is also what `accelerate launch -m` runs."""

from sera_serve.scripts import train_adapter

train_adapter()
