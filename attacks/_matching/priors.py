"""What is likely about an image before anything is seen of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "*rows channel height width"]


def total_variation(inputs: Images) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbours, horizontal plus vertical, on the scale of the inputs."""
    return (inputs[..., 1:] - inputs[..., :-1]).abs().mean() + (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().mean()


def roughness(inputs: Images) -> Float[Tensor, ""]:
    """Total variation; with three channels, plus that of the channel differences r − g, g − b and r − b.

    Edges of natural images coincide in all channels and cancel in the differences; noise does not.
    """
    if inputs.shape[-3] != 3:
        return total_variation(inputs)
    red, green, blue = inputs.unbind(-3)
    opponents = torch.stack([red - green, green - blue, red - blue], dim=-3)
    return total_variation(inputs) + total_variation(opponents)


def box(inputs: Images) -> Images:
    """Project onto [0, 1], the range of a pixel."""
    return inputs.clamp(0, 1)
