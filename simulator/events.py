"""Our nouns as the facts and tensors of an event in a transcript, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from simulator.types import Broadcast, LocalTraining, Tensors, Update, Upload

Arrays = Callable[[], Mapping[str, "np.ndarray[Any, Any]"] | Tensors]
"""Named arrays on demand, all of NumPy or all of torch (which has bfloat16): parsed in the writer's thread."""

PARAMETERS, BUFFERS, UPDATE = "parameters", "buffers", "update"
"""First part of a tensor's name in a transcript file, and the key of its record in a Flower message."""


def broadcast_event(broadcast: Broadcast) -> tuple[dict[str, Any], Tensors]:
    """A broadcast as the facts and tensors of an event."""
    return {"training": asdict(broadcast.training)}, released_tensors(broadcast.parameters, broadcast.buffers)


def released_tensors(parameters: Tensors, buffers: Tensors) -> Tensors:
    """A model's tensors under the names that a transcript file uses."""
    return {**_over(parameters, PARAMETERS), **_over(buffers, BUFFERS)}


def upload_event(upload: Upload) -> tuple[dict[str, Any], Tensors]:
    """An upload as the facts and tensors of an event."""
    facts = {"senders": sorted(upload.senders), "update": upload.update.kind, "num_examples": upload.num_examples}
    return facts, {**_over(upload.update.tensors, UPDATE), **_over(upload.buffers, BUFFERS)}


def broadcast_of(event: Mapping[str, Any], tensors: Tensors) -> Broadcast:
    """The inverse of :func:`broadcast_event`."""
    return Broadcast(int(event["round"]), *model_of(tensors), LocalTraining(**event["training"]))


def model_of(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Parameters and buffers: the inverse of :func:`released_tensors`."""
    return _under(tensors, PARAMETERS), _under(tensors, BUFFERS)


def upload_of(event: Mapping[str, Any], tensors: Tensors) -> Upload:
    """The inverse of :func:`upload_event`."""
    update = Update(event["update"], _under(tensors, UPDATE))
    senders = frozenset(int(sender) for sender in event["senders"])
    return Upload(senders, update, _under(tensors, BUFFERS), int(event["num_examples"]))


def _over(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")}
