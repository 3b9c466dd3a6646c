"""No bias in the first layer: the quotient ∂W/∂b, which is the input of a linear layer, has no denominator any more.

Source: the quotient is that of Phong et al., 2018, IEEE TIFS 13(5), section III; that a bias makes it is said in Geiping et al., 2020,
    arXiv:2003.14053, proposition 3.1, whose rest holds without one.
Deviations: none; there is no paper that proposes this alone.
Hook: ``on_model``.

What it protects: nothing is guaranteed. It hides what the quotient of one row of the first layer's gradient gives away of a batch
(``linear_leak``, ``imprint``).

What it does not protect: the gradient of one record at a linear layer stays the outer product δ·xᵀ: the record up to a factor, and the next
layer has a bias that tells the factor. It stops the quotient of single rows on batches (``linear_leak``, ``imprint``). It
claims nothing (ε = ∞).

Broken by: ``r_gap``. Digits, one record: 20 of 20 on an mlp exact and proven, in 0.07 CPU s each; 3 of 3 on lenet and cnn.
``levenberg_marquardt`` on lenet: 3 of 3. tests/defenses/test_heuristics_solved.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from defenses.refusal import unbuildable
from simulator.defense import Defense
from simulator.models.hygiene import NoFirstBias as Model
from simulator.registry import register
from simulator.world import World


@register("defenses", "no_first_bias")
@dataclass(frozen=True)
class NoFirstBias(Defense):
    """Takes the bias from the first layer; a single record is still its gradient up to scale."""

    def refuses(self, world: World) -> str | None:
        """Refuse models whose first layer has none."""
        return unbuildable(world)

    def on_model(self, family: Any) -> Any:
        """The family without the first bias."""
        return Model(family)
