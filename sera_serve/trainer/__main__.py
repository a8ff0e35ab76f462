"""`python -m sera_serve.trainer`, which is also what `accelerate launch -m` runs."""

from sera_serve.trainer.cli import main

main()
