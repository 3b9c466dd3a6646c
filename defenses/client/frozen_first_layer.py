"""A frozen first layer: the layer that sees the record is never trained, so its gradient is never sent.

Source: the layer that gives records away in closed form is the first (Geiping et al., 2020, arXiv:2003.14053, proposition 3.1; Fowl et
al., 2022, arXiv:2110.13057); fine-tuning with frozen layers is what deployments do.
Deviations: its weights are those of the initial model, not pretrained ones. They travel as buffers do, sent and returned unchanged;
under secure aggregation they are rounded with the rest.
Hook: ``on_model``.

What it protects: nothing is guaranteed. Attacks that read the first layer's own gradient (``linear_leak``) find none in the upload, and
an update has fewer numbers.

What it does not protect: the next layer's input, which its own gradient gives away in the same way, and which is the frozen layer's output:
a fixed function of the record that everybody knows. A layer that never learns may cost accuracy. It claims nothing (ε = ∞).

Broken by: ``r_gap``, which peels the trained layers and then solves z = W·x + b, where W and b are known. Digits, one record: 10 of 10
exact and proven on mlp (151 dB), lenet (146 dB) and a cnn of width 8 with 64 hidden units (134 dB), in 0.04 CPU s each. Where a ReLU
leaves fewer live outputs than pixels, as on most records of that cnn, black pixels and dead outputs are bounds that make up for them.
``levenberg_marquardt`` is exact where the model is smooth. ``linear_leak`` refuses it.
``pytest -s tests/defenses/test_heuristics_solved.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from defenses.refusal import unbuildable
from simulator.defense import Defense
from simulator.models.hygiene import FrozenFirstLayer as Model
from simulator.registry import register
from simulator.world import World


@register("defenses", "frozen_first_layer")
@dataclass(frozen=True)
class FrozenFirstLayer(Defense):
    """Leaves the first layer untrained, so that its gradient is not sent; the later layers' are."""

    def refuses(self, world: World) -> str | None:
        """Refuse models of one layer."""
        return unbuildable(world)

    def on_model(self, family: Any) -> Any:
        """The family with its first layer frozen."""
        return Model(family)
