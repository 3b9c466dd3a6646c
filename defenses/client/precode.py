"""PRECODE: a variational bottleneck in front of the last layer, whose noise makes the gradient of a record random.

    h → μ, log σ² → z = μ + σ·ε, ε ~ N(0, 1) → as many features as h has → logits;    loss + β·KL(N(μ, σ²) ‖ N(0, 1))

Source: Scheliga, Mäder and Seeland, 2022, arXiv:2108.04725, section 3; the model itself, and what differs, is in
:mod:`simulator.models.precode`.
Deviations: none in the hook. ε is drawn from the client's own stream, one value for each record, local step and place in the bottleneck.
Hook: ``on_model``.

What it protects: nothing is guaranteed. Behind convolutions it hides a record from whoever simulates the client without its noise, and of
several records in one update the noise cannot be read off, only searched for.

What it does not protect: any fully connected layer before it, the encoder included, whose input is ∂W/∂b whatever follows; and one
record behind any layers, since its update shows the noise. Over several records only the noise's own uncertainty is left. It claims
nothing (ε = ∞).

Broken by: ``linear_leak`` on an mlp, 20 of 20 records of digits exact and proven, as without the defense (Balunović et al., 2022,
arXiv:2111.04706, section 5). On convolutions by ``r_gap``, which peels from the encoder down: the gradient of its bias is what
came back, noise or not. Digits, cnn of width 8 with 64 hidden units, one record, k = 16, 64 and 256: 10 of 10 exact and proven at 151 dB
in 0.03 CPU s each, 150 dB without the defense. Or by reading ε: ∂W = ∂b·xᵀ at the encoder gives h and so μ and σ, at the decoder z, and
ε = (z − μ)/σ. Digits, lenet, one record, 5 victims: ε to 3e-7; ``dlg`` that ignores it 4 to 5 dB, with it in place 88 to 97 dB in
8 CPU s (118 to 125 without the defense). For several records the noise is optimized along or its layers' gradients are left out
(Scheliga et al., 2022, arXiv:2208.04767). tests/defenses/test_heuristics_solved.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from defenses.refusal import unbuildable
from simulator.defense import Defense
from simulator.models.precode import Precode as PrecodeModel
from simulator.models.precode import require_bottleneck
from simulator.registry import register
from simulator.world import World


@register("defenses", "precode")
@dataclass(frozen=True)
class Precode(Defense):
    """Puts a variational bottleneck before the last layer (PRECODE); its noise can be read off the update of one record.

    Attributes:
        k: values in the bottleneck.
        beta: weight of their divergence from N(0, 1) in the loss.
    """

    k: int = 256
    beta: float = 1e-3

    def __post_init__(self) -> None:
        require_bottleneck(self.k, self.beta)

    def refuses(self, world: World) -> str | None:
        """Refuse models that do not end in a linear layer."""
        return unbuildable(world)

    def on_model(self, family: Any) -> Any:
        """The family with the bottleneck in it."""
        return PrecodeModel(family, self.k, self.beta)
