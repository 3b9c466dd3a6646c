"""Whether a network is smooth: second-order attacks need the derivatives of its gradients."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from attacks._layers import all_buffers
from attacks._matching.simulate import casted
from simulator.adversary import Knowledge
from simulator.models.elementary import ElementaryNorms
from simulator.types import Broadcast

FLAT = 1e-5
"""Share of a slope below which a change of it is rounding."""
REACHES = (0.02, 0.2, 1.0)
"""Lengths of the probe, in units of the pixel range: each is tried where the one before met no change of slope."""
NODES = 6
JUMPS = 0.01
"""Share of a change of slope that the second derivative may miss; smooth networks miss below 1e-4, ReLU networks all of it."""
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_smooth(knowledge: Knowledge, broadcast: Broadcast) -> bool:
    """Whether the slope of the logits along a line changes as its derivative says: a kink adds what no derivative sees.

    This asks the function, not the modules: it holds for ReLU, max-pooling and clamps however they are written. Each model is asked
    once, unless its logits do not depend on the input: parameters of zero say nothing about the next.
    """
    if knowledge.model in _KNOWN:
        return _KNOWN[knowledge.model]
    slope = 0.0
    for reach in REACHES:
        change, missed, slope = probe_line(knowledge, broadcast, reach)
        if max(change, missed) > FLAT * slope:
            _KNOWN[knowledge.model] = missed <= JUMPS * change or missed <= FLAT * slope
            return _KNOWN[knowledge.model]
    if slope > 0:
        _KNOWN[knowledge.model] = True
    return True


def probe_line(knowledge: Knowledge, broadcast: Broadcast, reach: float) -> tuple[float, float, float]:
    """How much the slope of the logits changes along a random line, what of it their second derivative misses, and the slope."""
    model = knowledge.model
    parameters = casted(broadcast.parameters, torch.float32)
    buffers = casted(all_buffers(model, broadcast), torch.float32)
    rng = torch.Generator().manual_seed(0)
    start, line = (torch.rand(2, *knowledge.schema.shape, generator=rng, dtype=torch.float32) for _ in range(2))

    def logits(t: Tensor) -> Tensor:
        copies = {name: tensor.clone() for name, tensor in buffers.items()}
        with ElementaryNorms():
            return functional_call(model, {**parameters, **copies}, (start + t * line,)).flatten()  # type: ignore[no-any-return]

    one = torch.ones((), dtype=torch.float32)

    def slope(t: Tensor) -> Tensor:
        derivative: Tensor = jvp(logits, (t,), (one,))[1]
        return derivative

    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    explained = sum(
        (weight * reach / 2 * jvp(slope, (torch.tensor(reach * (node + 1) / 2, dtype=torch.float32),), (one,))[1]
         for node, weight in zip(nodes, weights, strict=True)),
        torch.zeros(()),
    )  # fmt: skip
    change = slope(reach * one) - slope(0 * one)
    return float(change.norm()), float((change - explained).norm()), float(slope(0 * one).norm())
