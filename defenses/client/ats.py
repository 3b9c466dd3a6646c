"""ATS: a client trains on its records after a chain of image transformations that was searched for hiding them from inversion.

Source: Gao et al., 2021, arXiv:2011.12505, sections 4 and 5; the policies are those that the paper publishes for CIFAR-100 and
ResNet-20, their numbers those of the authors' library of 50 transformations.
Deviations: no search here; a policy for other data must be searched for. The authors crop and flip at random before it, as usual in
training on CIFAR; we do not. A transformation's own probability, which the library inherits from AutoAugment, is not used, as in the
authors' code.
Hook: ``on_batch``, anew each time a record is used.

What it protects: nothing is guaranteed. What a transformation moves out of the picture, 15 to 50 % of the pixels by policy, is in no
gradient of that step, and places and shades of the others are not the record's.

What it does not protect: the transformed record, which is what the gradient is of, and most of the picture is in it: the policy
43-18-18 shifts by 15 % and changes contrast, which leaves 85 % of the pixels to be seen; 3-1-7 shifts by 45 and 10 %, which leaves half. It
claims nothing (ε = ∞). The trap of its figures: PSNR against the original record, which is what is scored here, is low for a shifted
picture that anyone would recognize, and is no measure of what leaks.

Broken by: whatever breaks no defense, as Balunović et al., 2022, arXiv:2111.04706, section 5, show for networks early in training.
Digits, mlp, one record for each upload: ``linear_leak`` reads the transformed record off exactly (> 100 dB), which is 8 dB from
the original. ``candidate_identification`` puts the candidates through the policies, 8 or 16 versions each, and names every victim among
100 candidates (the table on this defense's page). tests/defenses/test_heuristics_solved.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from simulator.defense import ClientContext, Defense
from simulator.mechanisms.augment import LIBRARY, apply, policies
from simulator.registry import register
from simulator.types import Batch


@register("defenses", "ats")
@dataclass(frozen=True)
class ATS(Defense):
    """Trains on transformed records (ATS); the transformed record leaks, and most of it is still to be seen.

    Attributes:
        policy: numbers of transformations, applied from left to right, with - between them; + between policies, of which each use of a
            record takes one at random.
    """

    policy: str = "3-1-7+43-18-18"

    def __post_init__(self) -> None:
        numbers = [number for policy in self.policy.split("+") for number in policy.split("-")]
        if not all(number.isdecimal() and int(number) < len(LIBRARY) for number in numbers):
            last = len(LIBRARY) - 1
            raise ValueError(f"policy must be numbers in 0..{last} joined by - and +, got {self.policy!r}. The paper has 3-1-7+43-18-18.")

    @property
    def policies(self) -> tuple[tuple[int, ...], ...]:
        """The transformations of each policy."""
        return policies(self.policy)

    def on_batch(self, batch: Batch, context: ClientContext) -> Batch:
        """Transform each record by a policy of its own."""
        return replace(batch, inputs=torch.stack([self.transform(image, context.rng) for image in batch.inputs]))

    def transform(self, image: Float[Tensor, "channel height width"], rng: torch.Generator) -> Float[Tensor, "channel height width"]:
        """One picture under a policy drawn at random."""
        for number in self.policies[int(torch.randint(len(self.policies), (1,), generator=rng))]:
            image = apply(image, number, rng)
        return image
