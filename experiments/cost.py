"""What a client's upload costs by formula: the bytes of an efficient coding, beside which those on the wire are printed.

Our wire sends every update as dense float32, whatever a defense left out of it, so that one tap and one attack interface serve all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from simulator.defense import Defense
from simulator.world import World

BYTES_OF_A_NUMBER = 4


def upload_bytes(defenses: Sequence[Defense], numbers: int, world: World) -> float:
    """Return the bytes that one client sends in one round, under the stack in its order.

    Of two compressions the better coding counts, which either allows; noise fills what was left out before it, and a channel codes
    what it is given in its own way.

    Args:
        defenses: the stack.
        numbers: parameters and buffers of the model.
        world: the federation.
    """
    dense = float(BYTES_OF_A_NUMBER * numbers)
    best = dense
    for defense in defenses:
        own = defense.upload_bytes(numbers, world)
        if defense.channel:
            return dense if own is None else own
        if defense.role == "noise" or defense.per_example:
            best = dense
        best = min(best, inf if own is None else own)
    return best
