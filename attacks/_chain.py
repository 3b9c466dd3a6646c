"""A model, up to a linear layer, as a chain of layers and activations that can be undone: found by running it, never by names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from attacks._layers import Call, all_buffers, probe
from simulator.adversary import Knowledge
from simulator.types import Broadcast, Tensors

Elementwise = Callable[[Tensor], Tensor]
PROBES = 4
"""Pictures of noise, besides three plain ones, on which activations are told from each other."""
SPREAD = 3.0
"""Standard deviation assumed of a layer's inputs, in units of that which noise as the image gives it."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function that can be undone: its inverse, its slope and the slope's change, all as functions of its value.

    Attributes:
        low, high: open ends of its range.
        flat: whether all that is not positive becomes 0, from where nothing leads back.
    """

    name: str
    of: Elementwise
    inverse: Elementwise
    slope: Elementwise
    bend: Elementwise
    low: float = -torch.inf
    high: float = torch.inf
    flat: bool = False


def _leaky(share: float) -> Activation:
    return Activation(
        "leaky relu",
        lambda z: torch.where(z > 0, z, share * z),
        lambda a: torch.where(a > 0, a, a / share),
        lambda a: torch.where(a > 0, 1.0, share).to(a.dtype),
        torch.zeros_like,
    )


NONE = Activation("none", lambda z: z, lambda a: a, torch.ones_like, torch.zeros_like)

ACTIVATIONS = (
    Activation("relu", F.relu, lambda a: a, lambda a: (a > 0).to(a.dtype), torch.zeros_like, flat=True),
    NONE,
    Activation("sigmoid", torch.sigmoid, torch.logit, lambda a: a * (1 - a), lambda a: 1 - 2 * a, 0.0, 1.0),
    Activation("tanh", torch.tanh, torch.atanh, lambda a: 1 - a.square(), lambda a: -2 * a, -1.0, 1.0),
    Activation("softplus", F.softplus, lambda a: a + torch.log(-torch.expm1(-a)), lambda a: -torch.expm1(-a), lambda a: torch.exp(-a), 0.0),
    Activation(
        "elu", F.elu, lambda a: torch.where(a > 0, a, torch.log1p(a.clamp(max=0))), lambda a: 1 + a.clamp(max=0),
        lambda a: (a < 0).to(a.dtype), -1.0,
    ),
)  # fmt: skip
"""Those that are known; ReLU before none, as inputs that are all positive tell them not apart, and both are undone alike there."""


def activation_between(z: Tensor, a: Tensor) -> Activation | None:
    """The activation with f(z) = a, by its values; None where none that can be undone fits."""
    negative = (z < 0) & (a < 0)
    candidates: tuple[Activation, ...] = ACTIVATIONS
    if bool(negative.any()):
        share = float((a[negative] / z[negative]).median())
        candidates = (*ACTIVATIONS, _leaky(share)) if share > 0 else ACTIVATIONS
    return next((f for f in candidates if torch.allclose(f.of(z), a, rtol=1e-4, atol=1e-5)), None)


@dataclass(frozen=True)
class Layer:
    """One linear or convolutional layer of the chain.

    Attributes:
        call: of the layer, on noise.
        after: the activation behind it.
        columns: the input that each term of an output takes, or −1 for padding: (terms of an output, places of a channel).
        mean, spread: of its inputs, what is assumed before anything is solved.
        frozen: whether its weight is not trained, so that there is no gradient of it.
    """

    call: Call
    after: Activation
    columns: np.ndarray
    mean: float
    spread: float
    frozen: bool = False

    @property
    def unknowns(self) -> int:
        """Values that enter the layer."""
        return self.call.inputs[0].numel()

    @property
    def outputs(self) -> int:
        """Values that leave it."""
        return self.call.outputs[0].numel()

    @property
    def linear(self) -> bool:
        """Whether it sees its whole input at once and is trained, so that its gradient alone tells it."""
        return isinstance(self.call.layer, nn.Linear) and not self.frozen

    def equations(self, outputs: int) -> int:
        """Independent equations on its input at most, if this many outputs are known: these, and those of the gradient.

        A channel's gradient is one matrix applied to the channel, of outputs × kernel rows and a column for each place.
        """
        if self.frozen:
            return outputs
        channels: int = self.call.inputs.shape[1]
        rows: int = self.call.outputs.shape[1] * self.columns.shape[0] // channels
        return outputs + channels * min(rows, self.unknowns // channels)

    def forward(self, weight: Float[Tensor, "channels terms"]) -> sp.csr_matrix:
        """The matrix of x ↦ W·x."""
        terms, places = self.columns.shape
        channels = len(weight)
        row = np.broadcast_to(np.arange(channels * places).reshape(channels, 1, places), (channels, terms, places))
        column = np.broadcast_to(self.columns, row.shape)
        value = np.broadcast_to(weight.numpy()[:, :, None], row.shape)
        return self._matrix(value, row, column, channels * places)

    def backward(self, delta: Float[Tensor, "channels places"]) -> sp.csr_matrix:
        """The matrix of x ↦ ∂W."""
        terms, places = self.columns.shape
        channels = len(delta)
        row = np.broadcast_to(np.arange(channels * terms).reshape(channels, terms, 1), (channels, terms, places))
        column = np.broadcast_to(self.columns, row.shape)
        value = np.broadcast_to(delta.numpy()[:, None, :], row.shape)
        return self._matrix(value, row, column, channels * terms)

    def _matrix(self, value: np.ndarray, row: np.ndarray, column: np.ndarray, rows: int) -> sp.csr_matrix:
        real = (column >= 0) & (value != 0)
        return sp.csr_matrix((value[real], (row[real], column[real])), shape=(rows, self.unknowns))


def _columns(call: Call) -> np.ndarray | str:
    layer, size = call.layer, call.inputs[0].numel()
    if isinstance(layer, nn.Linear) and call.inputs.ndim == 2:
        return np.arange(size)[:, None]
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"every layer with parameters must be linear or a plain convolution, got {call.name}: {layer}"
    index = torch.arange(1, size + 1, dtype=torch.float64).view(1, *call.inputs.shape[1:])
    unfolded = F.unfold(index, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return unfolded[0].long().numpy() - 1


@dataclass(frozen=True)
class Chain:
    """Layers from the input to a linear layer with bias, and the affine map from pixels to the first one's input."""

    layers: tuple[Layer, ...]
    scale: Float[Tensor, "channel height width"]
    offset: Float[Tensor, "channel height width"]

    def image(self, x: Float[Tensor, " pixels"]) -> Float[Tensor, "1 channel height width"]:
        """The picture that enters the first layer as x."""
        return ((x.view(self.scale.shape) - self.offset) / self.scale)[None]


def weights(knowledge: Knowledge, broadcast: Broadcast) -> Tensors:
    """Weights and biases of all layers by name, frozen ones included, which are buffers."""
    return {**all_buffers(knowledge.model, broadcast), **broadcast.parameters}


def chain(knowledge: Knowledge, broadcast: Broadcast, *, intact: Collection[str] | None = None) -> Chain | str:
    """The model as a chain of layers that can be peeled; else which layer it fails at. Found by running the model, never by names.

    The chain ends at the last linear layer with bias from which on downwards there is one, and through which alone the layers before it
    act on the loss: the bias' gradient is what comes back to it, whatever stands behind.

    Args:
        intact: names of the gradients that are what the client computed; None for all.
    """
    shape = knowledge.schema.shape
    rng = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0.1, 0.9, int(torch.tensor(shape).prod())).view(shape)
    images = torch.stack([torch.zeros_like(ramp), torch.ones_like(ramp), ramp, *torch.rand(PROBES, *shape, generator=rng)])
    calls = probe(knowledge, broadcast, images, frozen=True)
    if not calls or len({call.name for call in calls}) != len(calls):
        return "the model must be a chain of layers, each used once, got none or one that is used again"
    names, owners = set(broadcast.parameters), {name for call in calls for name in (call.weight, call.bias)}
    if names - owners:
        return f"every parameter must be a layer's weight or bias, got {sorted(names - owners)[0]}"
    refused = ""
    for end in range(len(calls), 0, -1):
        last, behind = calls[end - 1], end < len(calls)
        head = isinstance(last.layer, nn.Linear) and last.bias in names and last.inputs.ndim == 2
        if not behind and not (head and last.layer.out_features == knowledge.schema.num_classes):
            refused = f"the model must end in a linear layer with bias, got {last.name}: {last.layer}"
        elif head:
            below = [name for call in calls[:end] for name in (call.weight, call.bias) if name in names]
            spoiled = [] if intact is None else [name for name in below if name not in intact]
            if spoiled:
                found: Chain | str = f"the gradient of {spoiled[0]} must be what the client computed, got one that a defense changed"
            elif behind and not _only_way(knowledge, broadcast, images, last):
                found = f"layers before {last.name} must act on the loss through it alone, got a branch"
            else:
                found = _up_to(calls[:end], ramp, names)
            if isinstance(found, Chain):
                return found
            refused = refused or found
    return refused


@torch.no_grad()
def _only_way(knowledge: Knowledge, broadcast: Broadcast, images: Tensor, call: Call) -> bool:
    """Whether all images have the same logits once this layer's output is."""
    handle = call.layer.register_forward_hook(lambda _layer, _inputs, outputs: outputs[:1].expand(outputs.shape))
    try:
        logits: Tensor = functional_call(knowledge.model, dict(weights(knowledge, broadcast)), (images,))
    finally:
        handle.remove()
    return torch.allclose(logits, logits[:1].expand(logits.shape), rtol=1e-5, atol=1e-6)


def _up_to(calls: Sequence[Call], ramp: Float[Tensor, "channel height width"], trained: Collection[str]) -> Chain | str:
    """The chain of these calls, of which the first three are of black, white and ``ramp``, the others of noise."""
    shape = ramp.shape
    layers: list[Layer] = []
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        columns = _columns(call)
        if isinstance(columns, str):
            return columns
        after = NONE
        if following is not None:
            where = f"between {call.name} and {following.name}"
            out, into = call.outputs[0].numel(), following.inputs[0].numel()
            if out != into:
                return f"what stands {where} must be an elementwise activation, got pooling or a branch: {out} values become {into}"
            fitting = activation_between(call.outputs.flatten(1), following.inputs.flatten(1))
            if fitting is None:
                return f"what stands {where} must be an activation that can be undone, got another, a norm or a branch"
            after = fitting
        noise = call.inputs[3:].double()
        layers.append(Layer(call, after, columns, float(noise.mean()), SPREAD * float(noise.std()), call.weight not in trained))
    zero, one, seen = calls[0].inputs[:3]
    scale = one - zero
    if scale.shape != shape and scale.numel() == ramp.numel():
        zero, scale, seen = zero.view(shape), scale.view(shape), seen.view(shape)
    if scale.shape != shape or not torch.allclose(seen, scale * ramp + zero, rtol=1e-4, atol=1e-5) or bool((scale == 0).any()):
        return f"what precedes {calls[0].name} must be an elementwise affine map, such as normalization"
    for layer in layers:
        if not layer.linear and (most := layer.equations(layer.outputs)) < layer.unknowns:
            return f"{layer.call.name} must have as many equations as inputs, {layer.unknowns}, got {most}: they cannot tell its input"
    return Chain(tuple(layers), scale.double(), zero.double())
