"""What a round costs by formula: the bytes of an upload under an efficient coding, and the memory without which no round can be.

Both are printed beside what was measured. Our wire sends every update as dense float32, whatever a defense left out of it, so that one
tap and one attack interface serve all.
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


def memory_bytes(defenses: Sequence[Defense], numbers: int, world: World, batch: int) -> float:
    """Return the bytes that the server and one client at work must hold at once, activations and what the libraries need left out.

    The server: the model, every upload of the round, and their mean. The client: the model and its gradient, of which there is one for
    each record where each is clipped by itself.

    Args:
        defenses: the stack.
        numbers: parameters and buffers of the model.
        world: the federation.
        batch: records of a local step, of the client that has most.
    """
    dense = float(BYTES_OF_A_NUMBER * numbers)
    own = [defense.upload_bytes(numbers, world) for defense in defenses if defense.channel]  # without one the wire is dense
    arriving = next((size for size in own if size is not None), dense)
    gradients = batch if any(defense.per_example for defense in defenses) else 1
    return world.federation.cohort_size * arriving + (2 + 1 + gradients) * dense
