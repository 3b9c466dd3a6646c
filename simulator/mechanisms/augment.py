"""The library of 50 image transformations in which ATS searches: AutoAugment's operations at ten levels, on tensors in [0, 1].

As Pillow's on pictures of 8 bits, without the rounding but where an operation is one (posterize, equalize): tests/defenses holds them
to Pillow. Interpolation of shears is torch's bicubic (a = −0.75), where Pillow's has a = −0.5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Image = Float[Tensor, "channel height width"]

LUMA = torch.tensor([0.299, 0.587, 0.114])
"""ITU-R 601-2, as Pillow turns colors to gray."""

SMOOTH = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
"""Pillow's filter of that name."""


def warp(image: Image, matrix: Tensor, *, fill: float, mode: str) -> Image:
    """Take the pixel at ``matrix``·(x, y, 1) for the one at (x, y), in pixels from the top left corner; ``fill`` outside."""
    _, height, width = image.shape
    size = torch.tensor([width, height], dtype=torch.float32)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = torch.stack([columns, rows, torch.ones_like(rows)], -1) @ matrix.T
    moved = F.grid_sample((image - fill)[None], (2 * places / size - 1)[None], mode=mode, align_corners=False)[0]
    return moved + fill


def shear_x(image: Image, by: float) -> Image:
    """Shift each row by ``by`` times its distance from the top."""
    return warp(image, torch.tensor([[1, by, 0], [0, 1, 0]]), fill=0.0, mode="bicubic").clamp(0, 1)


def shear_y(image: Image, by: float) -> Image:
    """Shift each column by ``by`` times its distance from the left."""
    return warp(image, torch.tensor([[1, 0, 0], [by, 1, 0]]), fill=0.0, mode="bicubic").clamp(0, 1)


def translate_x(image: Image, by: float) -> Image:
    """Shift by a share of the width."""
    return warp(image, torch.tensor([[1, 0, by * image.shape[2]], [0, 1, 0]]), fill=0.0, mode="nearest")


def translate_y(image: Image, by: float) -> Image:
    """Shift by a share of the height."""
    return warp(image, torch.tensor([[1, 0, 0], [0, 1, by * image.shape[1]]]), fill=0.0, mode="nearest")


def rotate(image: Image, degrees: float) -> Image:
    """Turn about the middle, counterclockwise; gray corners."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.shape[2] / 2, image.shape[1] / 2
    matrix = torch.tensor([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
    return warp(image, matrix, fill=128 / 255, mode="nearest")


def blend(flat: Image, image: Image, share: float) -> Image:
    """flat + share·(image − flat), within [0, 1]."""
    return (flat + share * (image - flat)).clamp(0, 1)


def gray(image: Image) -> Image:
    """Luminance, one channel."""
    return image if len(image) == 1 else torch.einsum("c,chw->hw", LUMA, image)[None]


def color(image: Image, by: float) -> Image:
    """1 + by times the saturation; pictures without color stay as they are."""
    return blend(gray(image), image, 1 + by)


def contrast(image: Image, by: float) -> Image:
    """1 + by times the distance from the mean luminance."""
    return blend(gray(image).mean(), image, 1 + by)


def brightness(image: Image, by: float) -> Image:
    """1 + by times the brightness."""
    return blend(torch.zeros_like(image), image, 1 + by)


def sharpness(image: Image, by: float) -> Image:
    """1 + by times the distance from the smoothed picture, whose border is not smoothed."""
    smooth = image.clone()
    smooth[:, 1:-1, 1:-1] = F.conv2d(image[:, None], SMOOTH[None, None])[:, 0]
    return blend(smooth, image, 1 + by)


def posterize(image: Image, bits: int) -> Image:
    """Keep the highest ``bits`` of the 8 of a pixel."""
    step = 2 ** (8 - bits)
    kept: Image = (image * 255).round().div(step, rounding_mode="floor") * step / 255
    return kept


def solarize(image: Image, threshold: float) -> Image:
    """Invert the pixels that are at least ``threshold``, of 256."""
    return torch.where(image * 255 < threshold, image, 1 - image)


def autocontrast(image: Image) -> Image:
    """Stretch each channel to [0, 1]; a flat one stays."""
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return torch.where(high > low, (image - low) / torch.where(high > low, high - low, 1.0), image)


def equalize(image: Image) -> Image:
    """Make each channel's histogram flat, as far as 256 bins can be."""
    return torch.stack([_equalized(channel) for channel in image])


def _equalized(channel: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    levels = (channel * 255).round().long()
    counts = torch.bincount(levels.flatten(), minlength=256)
    step = int(counts.sum() - counts[counts.nonzero()[-1]]) // 255
    if not step:
        return channel
    below = counts.cumsum(0) - counts
    return ((below + step // 2) // step).clamp(max=255)[levels].to(channel) / 255


def invert(image: Image) -> Image:
    """The negative."""
    return 1 - image


Operation = Callable[[Image, float], Image]
SIGNED: Mapping[str, tuple[Operation, float]] = {
    "shearX": (shear_x, 0.3), "shearY": (shear_y, 0.3), "translateX": (translate_x, 150 / 331), "translateY": (translate_y, 150 / 331),
    "color": (color, 0.5), "contrast": (contrast, 0.5), "sharpness": (sharpness, 0.5), "brightness": (brightness, 0.5),
}  # fmt: skip
"""Operations whose magnitude is ± its level's share of the most, the sign drawn each time."""

PLAIN: Mapping[str, Callable[[Image, int], Image]] = {
    "rotate": lambda image, level: rotate(image, 30 * level / 9),
    "posterize": lambda image, level: posterize(image, round(8 - 4 * level / 9)),
    "solarize": lambda image, level: solarize(image, 256 - 256 * level / 9),
    "autocontrast": lambda image, _: autocontrast(image),
    "equalize": lambda image, _: equalize(image),
    "invert": lambda image, _: invert(image),
}
"""Operations that do the same each time at a level."""

_NUMBERED = """
    invert7 contrast6 rotate2 translateX9 sharpness1 sharpness3 shearY2 translateY2 autocontrast5 equalize2
    shearY5 posterize5 color3 brightness5 sharpness9 brightness9 equalize5 equalize1 contrast7 sharpness5
    color5 translateX5 equalize7 autocontrast8 translateY3 sharpness6 brightness6 color8 solarize0 invert0
    equalize0 autocontrast0 equalize8 equalize4 color9 equalize5 autocontrast4 solarize4 brightness3 color0
    solarize1 autocontrast0 translateY3 translateY3 autocontrast1 solarize1 equalize5 invert0 translateY3 autocontrast1
"""
LIBRARY: tuple[tuple[str, int], ...] = tuple((word[:-1], int(word[-1])) for word in _NUMBERED.split())
"""Name and level of each transformation, by its number in the paper's policies."""


def apply(image: Image, number: int, rng: torch.Generator) -> Image:
    """Transformation ``number`` of the library; its sign, if it has one, is drawn."""
    name, level = LIBRARY[number]
    if name in PLAIN:
        return PLAIN[name](image, level)
    operation, most = SIGNED[name]
    sign = 2 * int(torch.randint(2, (1,), generator=rng)) - 1
    return operation(image, sign * most * level / 9)


def policies(text: str) -> tuple[tuple[int, ...], ...]:
    """The transformations of each policy: numbers with - between them, + between policies."""
    return tuple(tuple(int(number) for number in policy.split("-")) for policy in text.split("+"))


def outcomes(image: Image, policy: tuple[int, ...]) -> list[Image]:
    """All that a policy can make of a picture, one for each draw of signs: equally likely."""
    made = [image]
    for number in policy:
        name, level = LIBRARY[number]
        if name in PLAIN:
            made = [PLAIN[name](each, level) for each in made]
            continue
        operation, most = SIGNED[name]
        made = [operation(each, sign * most * level / 9) for each, sign in itertools.product(made, (-1, 1))]
    return made
