"""Reasons for refusing a world that several mechanisms share."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from simulator.errors import SpecError
from simulator.network import network
from simulator.world import World


def batch_statistics(model: nn.Module) -> list[str]:
    """The layers that normalize with statistics of the batch, or that keep running ones, as ``name (class)``.

    The first couple the records of a batch, so no per-example gradient exists; the second travel in the buffers of each upload,
    which no noise on the update covers.
    """
    return [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats)
    ]


def batch_norm(world: World, mechanism: str) -> str | None:
    """Why ``mechanism`` cannot act on this world's model, or None if the model has no batch statistics."""
    found = batch_statistics(network(world.architecture, world.data.load().schema, world.training, world.seed))
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"model must have no BatchNorm for {mechanism}, got {found[0]}{more}. Use GroupNorm: norm = 'group' where the model offers it."


def batch_norm_in_train_mode(world: World, mechanism: str) -> str | None:
    """As :func:`batch_norm`, but frozen statistics pass: they come back as they were sent."""
    return None if world.training.batch_norm == "eval" else batch_norm(world, mechanism)


def unbuildable(world: World) -> str | None:
    """Why the world's model cannot be built as its defenses change it, or None if it can."""
    try:
        network(world.architecture, world.data.load().schema, world.training, world.seed)
    except SpecError as error:
        return str(error)
    return None
