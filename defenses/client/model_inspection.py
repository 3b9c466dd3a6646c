"""Model inspection: a client looks at the model that it was sent, and does not train on one that shows the marks of tampering.

Two detectors look at the first layer, as a map of pixels. ``parallel`` finds imprints: rows that measure the same thing against
different thresholds. Of honest rows none is parallel to another up to rounding. ``lopsided`` finds trap weights: rows that sum to less
than 0 although no more than half of their weights are negative, because the positive ones are smaller. Of honest rows, in which sign
and size have nothing to do with each other, this holds for 1/4 − asin(ρ)/2π, ρ = E|w|/√E[w²]: 8 % of uniform and 10 % of normal
weights; of trap weights for all, and for half even where the signs are drawn one by one.

Source: the marks are those of the constructions in Fowl et al., 2022, arXiv:2110.13057, section 3, and Boenisch et al., 2023,
arXiv:2112.02918. The thresholds and the second statistic are our own.
Deviations: how rarely neurons fire on the client's own records, the mark that comes to mind first, is not used: in honest models
trained with SGD (learning rate 0.1, momentum 0.9, 500 steps on digits) the median neuron fires for 3 to 7 % of the records, and under
trap weights for a batch of 8 for 5 to 8 %. So this looks at no private record, and its refusal says nothing of any.
False alarms on honest models of two widths, initial and trained, and how rarely neurons fire: tests/defenses/test_model_inspection.py.
Hook: ``on_broadcast``.

What it protects: a client's records from a server that plants ``imprint`` or ``trap_weights`` and does not hide them: the client that
finds their mark uploads nothing in that round.

What it does not protect: against a server that knows it. Rows that differ a little in directions in which no picture varies, an imprint
in a tenth of the rows, or smaller magnitudes spread over more positive weights pass. It looks at models whose first layer is linear
on the flattened input alone, and it makes no differential-privacy claim. A client that refuses is lost to the round, and known to
have looked.
Broken by: an honest-but-curious server, on whose model there is nothing to find (every passive attack); imprint and trap_weights that are
placed with the two detectors in mind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simulator.defense import ClientContext, Defense
from simulator.front import front
from simulator.network import network
from simulator.registry import register
from simulator.types import Broadcast
from simulator.world import World

SAME = 0.9999
"""|cosine| above which two rows are parallel; 0.999 is the most that was seen between rows of an honest model (a diverged one)."""


def parallel_share(rows: Float[Tensor, "neurons pixels"]) -> float:
    """Share of the rows, in [0, 1], that are parallel to another one."""
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cosines = (unit @ unit.T).abs().fill_diagonal_(0)
    return float((cosines > SAME).any(1).double().mean())


def lopsided_share(rows: Float[Tensor, "neurons pixels"]) -> float:
    """Share of the rows, in [0, 1], that sum to less than 0 although at most half of their weights (and one) are negative."""
    negative, positive = (rows < 0).sum(1), (rows > 0).sum(1)
    return float(((rows.sum(1) < 0) & (negative <= positive + 1)).double().mean())


@register("defenses", "model_inspection")
@dataclass(frozen=True)
class ModelInspection(Defense):
    """Refuses to train on a model whose first layer looks tampered with; hides nothing from an honest-but-curious server.

    Attributes:
        parallel: share of parallel rows from which on the client refuses; above 1 switches the detector off.
        lopsided: share of lopsided rows from which on the client refuses; above 1 switches the detector off.
    """

    parallel: float = 0.1
    lopsided: float = 0.3

    def __post_init__(self) -> None:
        for name in ("parallel", "lopsided"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}. It is a share of rows; above 1 switches it off.")

    def refuses(self, world: World) -> str | None:
        """Refuse models that it cannot look at: it would let everything pass."""
        schema = world.data.load().schema
        found = front(network(world.architecture, schema, world.training, world.seed), schema.shape)
        return f"{found}. Use the model 'mlp' with ReLU, or drop model_inspection" if isinstance(found, str) else None

    def on_broadcast(self, broadcast: Broadcast, model: nn.Module, shape: tuple[int, ...], context: ClientContext) -> str | None:
        """Name the detector that rang, if one did; no number of it, so that the server learns no more."""
        found = front(model, shape)
        if isinstance(found, str):
            return f"{found}. It cannot be inspected"
        rows, _ = found.on_pixels(broadcast.parameters)
        if parallel_share(rows) >= self.parallel:
            return "rows of the first layer must differ, got parallel ones: an imprint"
        if lopsided_share(rows) >= self.lopsided:
            return "weights of the first layer must be as large above as below 0, got larger ones below: trap weights"
        return None
