"""Top-k: of every tensor of the update only the largest coordinates are uploaded.

    uᵢ → uᵢ if |uᵢ| is among the k largest of its tensor, else 0;    k = d − ⌊pruned·d⌋

Source: Aji and Heafield, 2017, arXiv:1704.05021, section 3; Lin et al., 2018, arXiv:1712.01887 (Deep Gradient Compression, DGC),
Algorithm 1, with a threshold for each layer and pruned = 0.999 after a warm-up. As a defense: Zhu, Liu and Han, 2019,
arXiv:1906.08935, section 5.2 ("gradient compression", effective from 20 % on against their attack).
Deviations: what is pruned is not kept for the next round: no residual accumulation, momentum correction or warm-up, as in the
papers that use it as a defense. Thresholds are exact, not sampled, and every tensor keeps at least one coordinate.
Hook: ``on_update``.

What it protects: nothing is guaranteed. It hides the coordinates below the cut, which are not uploaded: at 99.9 % pruned too little is
left for gradient matching to get beyond the mean picture by much (below).

What it does not protect: the coordinates that stay are exact, and which ones stay is told by their being there. It saves bytes
and makes no differential-privacy claim (ε = ∞).
Broken by: gradient matching on the coordinates that were uploaded (as Yue et al., 2023, arXiv:2206.04055, warn). With pruned = 0.9,
0.99 and 0.999 inverting_gradients gets 16.9, 13.8 and 12.2 dB, and 20.3, 17.9 and 14.4 dB when it looks at the support alone; 21.4 dB
without a defense, 13.5 dB for the mean picture (``pytest --slow -s tests/defenses/test_heuristics_matched.py``: photos in 16×16,
ConvNet at its initial weights, batches of one, labels disclosed, mean of 8).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from simulator.defense import ClientContext, Defense, Role
from simulator.mechanisms.top_k import top_k
from simulator.registry import register
from simulator.types import Update
from simulator.world import World


def require_share(name: str, share: float, otherwise: str) -> None:
    """Raise ValueError unless ``share`` is in [0, 1); ``otherwise`` says what to do."""
    if not 0 <= share < 1:
        raise ValueError(f"{name} must be in [0, 1), got {share}. {otherwise}")


def sparse_bytes(numbers: int, pruned: float) -> float:
    """Bytes of the numbers that stay and of where they were: 4 bytes each, or a bit for every number, whatever is less."""
    kept = (1 - pruned) * numbers
    return 4 * kept + min(4 * kept, numbers / 8)


@register("defenses", "top_k")
@dataclass(frozen=True)
class TopK(Defense):
    """Uploads only the largest coordinates of every tensor (gradient compression); no guarantee.

    Attributes:
        pruned: share of each tensor's coordinates that become 0; papers use 0.7 to 0.999.
    """

    role: ClassVar[Role] = "compression"

    pruned: float = 0.9

    def __post_init__(self) -> None:
        require_share("pruned", self.pruned, "It is the share that becomes 0; something must stay.")

    def upload_bytes(self, numbers: int, world: World) -> float:
        """What stays, 4 bytes each, and where it was."""
        return sparse_bytes(numbers, self.pruned)

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Keep the largest coordinates."""
        return replace(update, tensors=top_k(update.tensors, self.pruned))
