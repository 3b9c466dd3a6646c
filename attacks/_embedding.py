"""Patches of an image as tokens of a transformer: where they enter, and how to get from the one to the other and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from attacks._layers import Call, all_buffers, drops_before, undropped
from simulator.adversary import Knowledge
from simulator.types import Broadcast

PROBE = 0.1
"""Deviation of the random embedding with which the place of the position embedding is verified."""


@dataclass(frozen=True)
class Embedding:
    """A convolution whose stride is its kernel, and the learned position embedding that is added to its outputs.

    Attributes:
        call: of the convolution, on one image.
        place: name of the position embedding among the model's parameters.
        first: its rows before those of the patches: those of class tokens.
        scale, offset: of the elementwise map from the image, filled up with zeros to the right and below, to the convolution's input.
        shape: (channel, height, width) of an image.
        whole: whether the convolution sees every pixel of a record; else dropout makes holes in what it gives away.
    """

    call: Call
    place: str
    first: int
    scale: Float[Tensor, "1 channel height width"]
    offset: Float[Tensor, "1 channel height width"]
    shape: tuple[int, int, int]
    whole: bool

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of a patch."""
        assert isinstance(self.call.layer, nn.Conv2d)
        height, width = self.call.layer.weight.shape[2:]
        return int(height), int(width)

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return int(self.call.outputs[0, 0].numel())

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return int(self.call.inputs.shape[1] * self.kernel[0] * self.kernel[1])

    def direction(self, patches: Float[Tensor, "tokens values"]) -> Float[Tensor, "1 channel height width"]:
        """The change of the image that changes its patches, as the convolution sees them, by this."""
        size: Sequence[int] = self.call.inputs.shape[2:]
        _, height, width = self.shape
        folded = F.fold(patches.T[None], tuple(size), self.kernel, stride=self.kernel)
        return folded[..., :height, :width] / self.scale

    def image(self, patches: Float[Tensor, "tokens values"]) -> Float[Tensor, "1 channel height width"]:
        """The image of these patches."""
        return self.direction(patches) - self.offset / self.scale


def embedding(knowledge: Knowledge, broadcast: Broadcast) -> Embedding | str:
    """The patch embedding with which the model begins; else why there is none. Found by running the model, never by names."""
    shape = knowledge.schema.shape
    _, height, width = shape
    ramp = torch.linspace(0.1, 0.9, int(torch.tensor(shape).prod())).view(shape)
    calls = undropped(knowledge, broadcast, torch.stack([torch.zeros_like(ramp), torch.ones_like(ramp), ramp]))
    if not calls:
        return "the model must begin with an embedding of patches, got one without parameters"
    first = calls[0]
    layer = first.layer
    if not isinstance(layer, nn.Conv2d) or layer.stride != layer.kernel_size or layer.groups != 1 or layer.dilation != (1, 1):
        return f"the model must begin with a convolution whose stride is its kernel, as vision transformers do, got {layer}"
    if any(other.name == first.name for other in calls[1:]) or layer.padding not in ((0, 0), "valid"):
        return "the embedding of patches must be used once and without padding of its own, got another use of it"
    covered = [size * kernel for size, kernel in zip(first.outputs.shape[2:], layer.kernel_size, strict=True)]
    zero, one, seen = (item[None, :, :height, :width] for item in first.inputs)
    scale = one - zero
    rest = first.inputs.clone()
    rest[..., :height, :width] = 0
    affine = scale.shape[1:] == shape and torch.allclose(seen, scale * ramp + zero, rtol=1e-4, atol=1e-5)
    if not affine or bool((scale == 0).any() | rest.any()):
        return "what precedes the embedding of patches must be an elementwise affine map, such as normalization, and filling up with zeros"
    if covered[0] < height or covered[1] < width:
        return f"the patches must cover the image of {height}×{width}, got {covered[0]}×{covered[1]}"
    found = place_of(knowledge, broadcast, first)
    if found is None:
        return "a learned position embedding must be added to the patches, got none: only its gradient is that of the tokens"
    alone = Call(first.name, layer, first.inputs[2:], first.outputs[2:])
    return Embedding(alone, *found, scale.double(), zero.double(), shape, not drops_before(knowledge, broadcast, first))


@torch.no_grad()
def place_of(knowledge: Knowledge, broadcast: Broadcast, call: Call) -> tuple[str, int] | None:
    """Name and first row of the parameter that acts just as if it were added to the outputs of the patch embedding."""
    width, tokens = call.outputs.shape[1], call.outputs[0, 0].numel()
    rng = torch.Generator().manual_seed(0)
    change = PROBE * torch.randn(tokens, width, generator=rng)
    image = torch.rand(1, *knowledge.schema.shape, generator=rng)
    wanted = _logits(knowledge, broadcast, image, call.name, change)
    still = _logits(knowledge, broadcast, image, call.name, torch.zeros_like(change))
    for name, parameter in broadcast.parameters.items():
        if parameter.ndim < 2 or parameter.shape[-1] != width or parameter.numel() < tokens * width or name in (call.weight, call.bias):
            continue
        for first in sorted({0, max(0, parameter.numel() // width - tokens)}):
            moved = parameter.detach().clone()
            moved.view(-1, width)[first : first + tokens] += change
            logits = _logits(knowledge, broadcast, image, call.name, torch.zeros_like(change), {name: moved})
            if float((logits - wanted).norm()) <= 1e-3 * float((wanted - still).norm()):
                return name, first
    return None


def _logits(
    knowledge: Knowledge,
    broadcast: Broadcast,
    image: Tensor,
    name: str,
    change: Float[Tensor, "tokens width"],
    instead: dict[str, Tensor] | None = None,
) -> Tensor:
    """The logits when the outputs of the patch embedding are changed, or parameters are replaced."""

    def add(_layer: nn.Module, _inputs: Sequence[Tensor], output: Tensor) -> Tensor:
        return output + change.T.reshape(output.shape[1:])

    model = knowledge.model
    handle = model.get_submodule(name).register_forward_hook(add)
    try:
        tensors = {**all_buffers(model, broadcast), **broadcast.parameters, **(instead or {})}
        logits: Tensor = functional_call(model, tensors, (image,))
        return logits
    finally:
        handle.remove()
