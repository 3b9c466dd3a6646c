"""The front of a network: a linear layer with bias on the flattened input, a ReLU, another linear layer.

What an active server plants and what a client looks for sit there. The layers are found by running the network once, not by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from simulator.types import Tensors


@dataclass(frozen=True)
class Front:
    """The first two layers, by the names of their parameters, and the map scale·x + offset from pixels to the first one's input."""

    weight: str
    bias: str
    next_weight: str
    next_bias: str | None
    scale: Float[Tensor, " pixels"]
    offset: Float[Tensor, " pixels"]

    def on_pixels(self, parameters: Tensors) -> tuple[Float[Tensor, "neurons pixels"], Float[Tensor, " neurons"]]:
        """The first layer as a map from pixels in [0, 1]: its weight and bias there, in float64."""
        weight, bias = parameters[self.weight].double(), parameters[self.bias].double()
        return weight * self.scale.double(), bias + weight @ self.offset.double()

    def from_pixels(
        self, weight: Float[Tensor, "neurons pixels"], bias: Float[Tensor, " neurons"]
    ) -> tuple[Float[Tensor, "neurons pixels"], Float[Tensor, " neurons"]]:
        """The inverse of :meth:`on_pixels`, in float32: what the layer must hold to be this map of the pixels."""
        inner = weight.double() / self.scale.double()
        return inner.float(), (bias.double() - inner @ self.offset.double()).float()


@torch.no_grad()
def front(model: nn.Module, shape: tuple[int, ...]) -> Front | str:
    """The front of ``model``, which takes records of ``shape``; or, as must be / got, why it has none."""
    ramp = torch.linspace(0.1, 0.9, prod(shape)).view(shape)
    calls = _calls(model, torch.stack([torch.zeros_like(ramp), torch.ones_like(ramp), ramp]))
    names = [type(layer).__name__ for _, layer, _, _ in calls[:2]]
    if len(calls) < 2 or not all(isinstance(layer, nn.Linear) for _, layer, _, _ in calls[:2]):
        return f"the first two layers with parameters must be nn.Linear, got {' and '.join(names) or 'none'}"
    (first, layer, inputs, outputs), (second, follower, hidden, _) = calls[:2]
    if layer.bias is None or inputs.shape != (3, ramp.numel()):
        return f"the first layer must have a bias and take all {ramp.numel()} values of a record, got shape {tuple(inputs.shape[1:])}"
    if not torch.equal(hidden, outputs.relu()):
        return "the first two linear layers must have a ReLU between them, got something else"
    zero, one, seen = inputs
    scale = one - zero
    if not torch.allclose(seen, scale * ramp.flatten() + zero, rtol=1e-4, atol=1e-5) or bool((scale == 0).any()):
        return "what precedes the first linear layer must be an elementwise affine map, such as normalization, got something else"
    next_bias = None if follower.bias is None else f"{second}.bias"
    return Front(f"{first}.weight", f"{first}.bias", f"{second}.weight", next_bias, scale, zero)


@torch.no_grad()
def first_is_linear(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the first layer with parameters is linear on all values of a record, each mapped by an affine map of its own at most."""
    ramp = torch.linspace(0.1, 0.9, prod(shape)).view(shape)
    calls = _calls(model, torch.stack([torch.zeros_like(ramp), torch.ones_like(ramp), ramp]))
    if not calls or not isinstance(calls[0][1], nn.Linear) or calls[0][2].shape != (3, ramp.numel()):
        return False
    zero, one, seen = calls[0][2]
    return torch.allclose(seen, (one - zero) * ramp.flatten() + zero, rtol=1e-4, atol=1e-5)


def _calls(model: nn.Module, inputs: Tensor) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Each call of a layer that owns parameters: its name, itself, what went in and what came out."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def recorder(name: str) -> object:
        def record(layer: nn.Module, inputs: Sequence[Tensor], outputs: Tensor) -> None:
            calls.append((name, layer, inputs[0].detach(), outputs.detach()))

        return record

    owners = [(name, layer) for name, layer in model.named_modules() if next(layer.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_hook(recorder(name)) for name, layer in owners]  # type: ignore[arg-type]
    try:
        functional_call(model, {name: tensor.clone() for name, tensor in model.named_buffers()}, (inputs,))
    finally:
        for handle in handles:
            handle.remove()
    return calls
