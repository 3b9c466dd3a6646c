"""Finding and replacing layers of a finished network, by running it once: a user's own network has no names that we know."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from simulator.types import Schema

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def first_and_last(model: nn.Module, schema: Schema) -> tuple[str, str]:
    """The names of the linear or convolutional layers that run first and last; leaves the model as it was, in train mode.

    Raises:
        ValueError: there is none.
    """
    called: list[str] = []

    def record(name: str, *_: object) -> None:
        called.append(name)

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Layer)]
    handles = [layer.register_forward_hook(partial(record, name)) for name, layer in layers]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *schema.shape))
    finally:
        model.train()
        for handle in handles:
            handle.remove()
    if not called:
        raise ValueError("the model must run a linear or convolutional layer, got none.")
    return called[0], called[-1]


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the one called ``name``."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
