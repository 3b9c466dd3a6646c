"""Which stacks of defenses make sense: the orders and pairs that are refused, each with its reason.

What one defense needs of the world (no BatchNorm, a large enough cohort) it says itself, in :meth:`simulator.defense.Defense.refuses`;
here stands what concerns two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

from simulator.defense import CLIENT_HOOKS, Defense, overrides


def misplaced(defenses: Sequence[Defense]) -> str | None:
    """Why this stack is refused (must be / got / do), or None.

    At most one defense works on per-example gradients, and one is the channel. What acts at a client comes before the channel. On
    the whole update, clipping comes before noise, which is calibrated to it, and compression does not come between the two: the
    noise would fill what was left out, and the bound that it was calibrated to would not be the update's.
    """
    for what, acting in (
        ("per-example defense", [defense.name for defense in defenses if defense.per_example]),
        ("channel", [defense.name for defense in defenses if defense.channel]),
    ):
        if len(acting) > 1:
            return f"defenses must hold at most one {what}, got {acting}. Keep one."
    for first, second in combinations(defenses, 2):
        if first.channel and any(overrides(second, hook) for hook in CLIENT_HOOKS):
            return f"{second.name} must come before the channel, got it after {first.name}. It acts at the client: put it first."
        if first.role == "noise" and second.role == "clip":
            return f"{second.name} must come before noise, got it after {first.name}: nothing would bound what the noise hides. Swap them."
    for place, (before, between) in enumerate(pairwise(defenses)):
        noise = next((later for later in defenses[place + 2 :] if later.role == "noise"), None)
        if before.role == "clip" and between.role == "compression" and noise is not None:
            return (
                f"{between.name} must not come between {before.name} and {noise.name}, got it there. "
                f"Put it after {noise.name}, where it is post-processing, or before {before.name}."
            )
    return None
