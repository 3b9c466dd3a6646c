"""``python -m experiments`` is ``fedpeek``."""

from experiments.cli import main

main()
