"""A user's own network, by dotted path: ``name = "package.module:Net"`` with the constructor's parameters as settings.

The class is taken as it is: it gets images in [0, 1] and normalizes them itself (see :mod:`simulator.models.normalize`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from simulator.errors import SpecError
from simulator.lookup import adapter
from simulator.models.constructor import construct, settings_class
from simulator.models.initial import drawn_from
from simulator.types import Schema


@adapter("models")
@cache
def from_module(cls: Any, path: str) -> type[Any]:
    """Return the model family of the nn.Module class ``cls``.

    Raises:
        SpecError: ``cls`` is something else.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise SpecError(f"model at {path!r} must be a class derived from torch.nn.Module, got {cls!r}. Point to the class.")

    def build(self: Any, schema: Schema, rng: torch.Generator) -> nn.Module:
        """Build the network with weights drawn from ``rng``, and check that it fits the data."""
        with drawn_from(rng):
            model: nn.Module = construct(cls, self)
        require_fit(model, schema, path)
        return model

    return settings_class(cls, path, {"build": build})


def require_fit(model: nn.Module, schema: Schema, path: str) -> None:
    """Check that a network maps a batch of the schema's images to one logit for each class.

    Raises:
        SpecError: it has no parameters, refuses such a batch, or returns something else.
    """
    if not any(True for _ in model.parameters()):
        raise SpecError(f"model {path} must have parameters to train, got none. Create its layers in __init__.")
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        try:
            logits = model.eval()(torch.zeros(2, *schema.shape))
        except (RuntimeError, ValueError, TypeError) as error:
            shape = (2, *schema.shape)
            raise SpecError(f"model {path} must accept inputs of shape {shape}, got: {error}. Change its settings.") from error
        finally:
            for module, mode in modes.items():
                module.training = mode
    wanted, got = (2, schema.num_classes), tuple(getattr(logits, "shape", ())) or type(logits).__name__
    if got != wanted:
        raise SpecError(f"model {path} must return logits of shape (batch, classes) = {wanted}, got {got}. Change its settings.")
