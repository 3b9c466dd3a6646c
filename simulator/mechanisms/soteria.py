"""Soteria: of a fully connected layer's inputs, those through which most of a record could be rebuilt are taken out of its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from simulator.models.elementary import ElementaryNorms
from simulator.types import Tensors

CHUNK = 2**22
"""Values of a Jacobian that are computed at once: 16 MB."""


class _InputOf(TorchFunctionMode):
    """Remembers what the linear layer with this weight is given; a mode and no hook, because threads share models."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and args[1] is self.weight:
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


def representation(
    model: nn.Module, parameters: Tensors, buffers: Tensors, inputs: Float[Tensor, "batch channel height width"], layer: str
) -> Float[Tensor, "batch features"]:
    """What the linear layer named ``layer`` is given for these records.

    Raises:
        ValueError: there is no such layer, or it is not called once with a vector for each record.
    """
    if not isinstance(dict(model.named_modules()).get(layer), nn.Linear):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(f"layer must be an nn.Linear of the model, got {layer!r}. It has {names}.")
    copies = {name: tensor.clone() for name, tensor in buffers.items()}
    with _InputOf(parameters[f"{layer}.weight"]) as mode, ElementaryNorms():
        functional_call(model, {**parameters, **copies}, (inputs,))
    if len(mode.seen) != 1 or mode.seen[0].ndim != 2:
        shapes = [tuple(seen.shape) for seen in mode.seen]
        raise ValueError(f"layer {layer!r} must be given one vector for each record, got inputs of shapes {shapes}. Choose another.")
    found: Tensor = mode.seen[0]
    return found


def sensitivities(
    model: nn.Module, parameters: Tensors, buffers: Tensors, inputs: Float[Tensor, "batch channel height width"], layer: str
) -> Float[Tensor, " features"]:
    """Σ over the records of |rᵢ|/‖∂rᵢ/∂X‖₂: to first order, how far a reconstruction moves when feature rᵢ is taken from it.

    A feature that is 0 counts 0, whatever its derivative. One backward pass for each feature.
    """

    def features(inputs: Tensor) -> Tensor:
        return representation(model, parameters, buffers, inputs, layer)

    found, pull = vjp(features, inputs)[:2]
    records, count = found.shape
    each = torch.eye(count, dtype=found.dtype)[:, None].expand(-1, records, -1)
    slopes = vmap(lambda pick: pull(pick)[0].flatten(1).norm(dim=1), chunk_size=max(1, CHUNK // inputs.numel()))(each)
    size = found.detach().abs().T
    moved: Tensor = torch.where(size > 0, size / slopes.clamp(min=torch.finfo(slopes.dtype).tiny), 0.0).sum(1)
    return moved


def kept_features(scores: Float[Tensor, " features"], pruned: float) -> Bool[Tensor, " features"]:
    """All features but the ⌊pruned·features⌋ with the largest scores."""
    gone = math.floor(pruned * len(scores) + 1e-9)
    return torch.ones(len(scores), dtype=torch.bool).scatter(0, scores.topk(gone).indices, False)


def without_features(update: Tensors, layer: str, keep: Bool[Tensor, " features"]) -> dict[str, Tensor]:
    """The update with the columns of the layer's weight zero where ``keep`` is false; all other tensors as they are."""
    weight = f"{layer}.weight"
    return {name: tensor * keep.to(tensor) if name == weight else tensor for name, tensor in update.items()}
