"""An upload as one vector of numbers and back: what every channel that adds vectors up needs, whatever hides them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from simulator.errors import ProtocolAbort
from simulator.network import floating
from simulator.types import Tensors

if TYPE_CHECKING:
    from simulator.world import World

Reals = npt.NDArray[np.float64]


def flat(*parts: Tensors) -> Reals:
    """The floating-point tensors of each part in the order of their names, one after the other, in float64.

    Raises:
        ProtocolAbort: a number is NaN or infinite.
    """
    found = [part[name].detach().double().flatten().numpy() for part in parts for name in sorted(floating(part))]
    values: Reals = np.concatenate(found) if found else np.zeros(0)
    if not np.isfinite(values).all():
        raise ProtocolAbort("upload must be finite, got NaN or infinity. Lower the learning rate.")
    return values


def length(*parts: Tensors) -> int:
    """Numbers in :func:`flat`."""
    return sum(tensor.numel() for part in parts for tensor in floating(part).values())


def cut(values: Reals, *templates: Tensors) -> list[dict[str, torch.Tensor]]:
    """The inverse of :func:`flat`: names, order, shapes and types of each template.

    Raises:
        ProtocolAbort: the vector has another length, or a number is NaN or infinite, or is in the template's type.
    """
    if values.shape != (length(*templates),) or not np.isfinite(values).all():
        raise ProtocolAbort(f"aggregate must be {length(*templates)} finite numbers, got {values.size}. Abort the round.")
    found, start = [], 0
    for template in templates:
        part: dict[str, torch.Tensor] = {}
        for name in sorted(floating(template)):
            like = template[name]
            part[name] = torch.from_numpy(values[start : start + like.numel()].copy()).reshape(like.shape).to(like.dtype)
            if not part[name].isfinite().all():
                raise ProtocolAbort(f"aggregate must be of numbers that {like.dtype} holds, got larger ones in {name}. Abort the round.")
            start += like.numel()
        found.append({name: part[name] for name in template if name in part})
    return found


def largest_upload(world: World) -> int:
    """A public bound on the number of examples that any client states: those of a round of who holds the most.

    That is an even deal's share of the private records, or all of them where they are dealt unevenly.
    """
    recipe, federation = world.training, world.federation
    if recipe.algorithm == "fedsgd" and recipe.batch_size:
        return recipe.batch_size
    records = len(world.data.load().records)
    private = records - int(records * world.split.test) - int(records * world.split.public)
    most = -(-private // federation.clients) if federation.partition == "iid" else private
    return recipe.examples_in_round(max(1, most))
