"""What is likely about an image before anything is seen of it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "*rows channel height width"]


def total_variation(inputs: Images) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbours, horizontal plus vertical, on the scale of the inputs."""
    return (inputs[..., 1:] - inputs[..., :-1]).abs().mean() + (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().mean()


def box(inputs: Images) -> Images:
    """Project onto [0, 1], the range of a pixel."""
    return inputs.clamp(0, 1)
