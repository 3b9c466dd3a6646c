"""What a world's defenses guarantee against the server, and the ceiling that this puts on identification."""

from __future__ import annotations

from clients.private import records_held
from defenses.accounting import Guarantee, guarantee
from defenses.bounds import reconstruction_ceiling
from simulator.world import World


def guarantee_of(world: World, *, delta: float, candidates: int) -> tuple[Guarantee, float]:
    """The guarantee over the whole training, and the most that naming the true one of ``candidates`` can succeed.

    Raises:
        SpecError: δ is not below 1 / number of records.
    """
    found = guarantee(world, records_held=records_held(world), delta=delta)
    return found, reconstruction_ceiling(found.claim, candidates)
