"""Initial weights as a function of one generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_turn = Lock()  # the default generator is one for the whole process, clients may be threads


@contextmanager
def drawn_from(rng: torch.Generator) -> Iterator[None]:
    """Let layers that are made inside draw their initial weights from ``rng``.

    PyTorch's layers, torchvision's and a user's draw from the process's default generator. It takes over the state of ``rng``
    for a while, gives the advanced state back to ``rng``, and then continues where it was, as if nothing had been drawn.
    """
    default = torch.default_generator
    with _turn:
        before = default.get_state()
        default.set_state(rng.get_state())
        try:
            yield
        finally:
            rng.set_state(default.get_state())
            default.set_state(before)
