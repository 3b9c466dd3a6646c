"""Dropout whose masks are handed in: random for the client that trains, variables for whoever simulates it, absent for everyone else.

PyTorch's own draws from the process's generator, which a round cannot be repeated from and which attack code could read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

Masks = Callable[[Tensor, float], Tensor]
"""(what a layer drops from, the probability to drop) → a mask of its shape, 0 where it is dropped and 1 where it is kept."""

_MASKS: ContextVar[Masks | None] = ContextVar("masks", default=None)  # each thread its own: clients may be threads


@contextmanager
def masks_from(source: Masks) -> Iterator[None]:
    """Let every dropout layer that runs inside take its masks, in the order of the calls, from ``source``."""
    token = _MASKS.set(source)
    try:
        yield
    finally:
        _MASKS.reset(token)


def drawn_masks(rng: torch.Generator) -> Masks:
    """Masks that keep each value with probability 1 − p, independently."""

    def draw(inputs: Tensor, p: float) -> Tensor:
        return (torch.rand(inputs.shape, generator=rng) >= p).to(inputs.dtype)

    return draw


def dropping() -> bool:
    """Whether masks are handed in."""
    return _MASKS.get() is not None


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al., 2014): mask·x/(1 − p), and x, its expectation, where no masks are handed in."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1), got {p}. 0 is none.")
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        """Drop from inputs of any shape."""
        source = _MASKS.get()
        return inputs if source is None or not self.p else inputs * source(inputs, self.p) / (1 - self.p)

    def extra_repr(self) -> str:
        """Show the probability when the model is printed."""
        return f"p={self.p}"


def with_own_masks(model: nn.Module) -> nn.Module:
    """The model with PyTorch's dropout layers replaced by ours, in place: those of a user's model, too."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))
    return model
