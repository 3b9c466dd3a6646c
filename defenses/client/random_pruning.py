"""Random pruning: every coordinate of the update is left out with the same probability.

    u → m ⊙ u,    mᵢ ~ Bernoulli(1 − pruned), independent

Source: Konečný et al., 2016, arXiv:1610.05492, section 2 ("random mask", generated afresh in each round and for each client) and
section 3 ("subsampling", scaled so that the mean stays unbiased).
Deviations: the masks are independent coordinates, not a fixed number of them; sizes vary by √(d·pruned·(1 − pruned)).
Hook: ``on_update``.

What it protects: nothing is guaranteed. It hides the coordinates that were left out, which are not in that upload at all; where those are
nearly all, the picture, too, from whoever has no other round and no prior.

What it does not protect: every coordinate that stays is exact, and a client that takes part again with a fresh mask shows others.
It makes no differential-privacy claim (ε = ∞).
Broken by: gradient matching on the coordinates that were uploaded, and by collecting them over rounds. With pruned = 0.9
inverting_gradients gets 8.4 dB, and 18.1 dB when it looks at the support alone (with 0.99 it depends on the mask: 12.5 and 14.4 dB on
two draws, the mean picture is at 13.5); 21.4 dB without a defense, 13.5 dB for the mean picture (``pytest --slow -s
tests/defenses/test_heuristics_matched.py``: photos in 16×16, ConvNet at its initial weights, batches of one, labels disclosed, mean of
8).
Where public records are held, ``adaptive_matching`` finds one small record by sampling (the table on this defense's page).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from defenses.client.top_k import require_share, sparse_bytes
from simulator.defense import ClientContext, Defense, Role
from simulator.mechanisms.random_pruning import drawn_masks, masked, rescaled
from simulator.registry import register
from simulator.types import Update
from simulator.world import World


@register("defenses", "random_pruning")
@dataclass(frozen=True)
class RandomPruning(Defense):
    """Leaves coordinates out at random (random mask); no guarantee.

    Attributes:
        pruned: probability that a coordinate becomes 0.
        masks: drawn afresh in each ``round``, or once for the whole ``training``: each client then keeps the same coordinates.
        rescaled: whether the others are multiplied by 1/(1 − pruned), which makes the mean over clients unbiased.
    """

    role: ClassVar[Role] = "compression"

    pruned: float = 0.9
    masks: Literal["round", "training"] = "round"
    rescaled: bool = False

    def __post_init__(self) -> None:
        require_share("pruned", self.pruned, "It is the probability to become 0; something must stay.")
        if self.masks not in ("round", "training"):
            raise ValueError(f"masks must be 'round' or 'training', got {self.masks!r}. The default is 'round'.")

    def upload_bytes(self, numbers: int, world: World) -> float:
        """What stays, 4 bytes each, and where it was."""
        return sparse_bytes(numbers, self.pruned)

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Draw the masks and apply them.

        Raises:
            ValueError: masks of the whole training without the generator that makes them.
        """
        rng = context.rng if self.masks == "round" else context.lasting
        if rng is None:
            raise ValueError("context.lasting must be a generator with masks = 'training', got None. Use masks = 'round'.")
        tensors = masked(update.tensors, drawn_masks(update.tensors, self.pruned, rng))
        return replace(update, tensors=rescaled(tensors, self.pruned) if self.rescaled else tensors)
