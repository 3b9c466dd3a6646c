"""signSGD: of every coordinate of the update only its sign is uploaded.

    u → sign(u),    or with scale = "mean"    u → ‖u‖₁/d · sign(u), tensor by tensor

Source: Bernstein et al., 2018, arXiv:1802.04434, Algorithm 1; the scaled form is Karimireddy et al., 2019, arXiv:1901.09847,
Algorithm 1 (the compressor of EF-signSGD).
Deviations: the server averages the signs; it takes no majority vote (Bernstein's distributed variant), and clients feed no
compression error back (EF-signSGD's own point).
Hook: ``on_update``.

What it protects: nothing is guaranteed. It hides the magnitudes of all coordinates, and with them a picture's shades more than its
shapes.

What it does not protect: d bits of the update are exact, which is more than what a record holds wherever the model has more
parameters than the record has bits. With scale = "mean" also every tensor's mean magnitude. It makes no differential-privacy claim
(ε = ∞).
Broken by: gradient matching against smoothed signs of the guess, only in part: inverting_gradients gets 4.9 dB, 14.2 dB against
tanh(u/rms(u)), which shows shapes, not shades; 21.4 dB without a defense, 13.5 dB for the mean picture
(``pytest --slow -s tests/defenses/test_heuristics_matched.py``: photos in 16×16, ConvNet at its initial weights, batches of one, labels
disclosed, mean of 8). Learned inverters (Wu et al., 2023) need no derivative. Where the first layer is linear, the signs of a
record's gradient are those of its pixels around the mean.
Where public records are held, ``adaptive_matching`` finds one small record by sampling (the table on this defense's page).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from simulator.defense import ClientContext, Defense, Role
from simulator.mechanisms.sign import scaled_signs, signs
from simulator.registry import register
from simulator.types import Update
from simulator.world import World


@register("defenses", "sign_sgd")
@dataclass(frozen=True)
class SignSGD(Defense):
    """Uploads the signs of the update alone, one bit for each coordinate; no guarantee.

    Attributes:
        scale: what the signs are multiplied by: ``none``, or each tensor's own ``mean`` magnitude.
    """

    role: ClassVar[Role] = "compression"

    scale: Literal["none", "mean"] = "none"

    def __post_init__(self) -> None:
        if self.scale not in ("none", "mean"):
            raise ValueError(f"scale must be 'none' or 'mean', got {self.scale!r}. The default is 'none'.")

    def refuses(self, world: World) -> str | None:
        """Refuse bare signs of a delta: parameters would move by 1, whatever the learning rate."""
        if self.scale == "none" and world.training.algorithm == "fedavg":
            return (
                "scale must be 'mean' for sign_sgd with algorithm = 'fedavg', got 'none': every parameter would move by 1. "
                "Set scale = 'mean'."
            )
        return None

    def upload_bytes(self, numbers: int, world: World) -> float:
        """One bit a number."""
        return numbers / 8

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Take the signs."""
        return replace(update, tensors=(signs if self.scale == "none" else scaled_signs)(update.tensors))
