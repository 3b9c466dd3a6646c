"""Batches of public records, drawn to go with given labels and altered a little."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from simulator.types import Batch

Images = Float[Tensor, "pairs batch channel height width"]


@dataclass(frozen=True)
class Pool:
    """Public records to draw batches from, and the direction along which records of one class are put in order."""

    public: Batch
    order: Float[Tensor, " pixels"]


def pool(public: Batch) -> Pool:
    """Public records with their first principal component."""
    flat_images = public.inputs.flatten(1)
    direction = torch.pca_lowrank(flat_images, q=1)[2][:, 0] if len(public) > 2 else torch.ones(flat_images.shape[1])
    return Pool(public, direction)


def drawn(source: Pool, labels: Int[Tensor, " batch"], count: int, rng: torch.Generator, *, own: float, altered: float) -> Images:
    """Batches of public records to go with these labels, those of equal labels in a fixed order, since no update tells one.

    Args:
        own: share of records that are of the class of their label; the others are of any.
        altered: share of records that are :func:`augmented`.
    """
    everything = torch.arange(len(source.public))
    columns = []
    for label in labels.tolist():
        mine = (source.public.labels == label).nonzero().flatten()
        mine = mine if len(mine) else everything
        any_of_class = torch.rand(count, generator=rng) < own
        columns.append(torch.where(any_of_class, picked(mine, count, rng), picked(everything, count, rng)))
    images = source.public.inputs[torch.stack(columns, 1)]
    if altered:
        changed = augmented(images.flatten(0, 1), rng).view_as(images)
        touched = torch.rand(count, len(labels), generator=rng) < altered
        images = torch.where(touched[..., None, None, None], changed, images)
    return ordered(images, labels, source.order)


def picked(indices: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Some of these, with replacement."""
    return indices[torch.randint(len(indices), (count,), generator=rng)]


def ordered(images: Images, labels: Int[Tensor, " batch"], direction: Tensor) -> Images:
    """The batches with records of equal label in ascending order along a direction."""
    out = images.clone()
    for label in set(labels.tolist()):
        places = (labels == label).nonzero().flatten()
        if len(places) > 1:
            mine = images[:, places]
            rank = (mine.flatten(2) @ direction).argsort(1)
            out[:, places] = shuffled(mine, rank)
    return out


def augmented(images: Float[Tensor, "batch channel height width"], rng: torch.Generator) -> Float[Tensor, "batch channel height width"]:
    """Each record mixed with another, moved by up to an eighth of its side, perhaps mirrored, and of another brightness and contrast."""
    count, (height, width) = len(images), images.shape[2:]

    def each(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=rng) * (high - low) + low

    share = torch.where(each(0, 1) < 0.5, each(0, 0.5), torch.zeros(count, 1, 1, 1))
    out = (1 - share) * images + share * images[torch.randperm(count, generator=rng)]
    out = torch.where(each(0, 1) < 0.5, out, out.flip(3))
    for axis, side in ((2, height), (3, width)):
        most = max(1, side // 8)
        move = torch.randint(-most, most + 1, (count, 1), generator=rng)
        places = (torch.arange(side) + move).clamp(0, side - 1)
        shape = [count, 1, 1, 1]
        shape[axis] = side
        out = out.gather(axis, places.view(shape).expand_as(out))
    return (0.5 + each(0.7, 1.3) * (out - 0.5) + each(-0.15, 0.15)).clamp(0, 1)


def shuffled(stack: Tensor, order: Int[Tensor, "pairs picked"]) -> Tensor:
    """Of each row of a stack the entries at its own places."""
    return torch.stack([row[places] for row, places in zip(stack, order, strict=True)])
