"""Soteria: the representation that a fully connected layer is given is perturbed in that layer's gradient.

Of the layer's inputs r, the features with the largest |rᵢ|/‖∂rᵢ/∂X‖₂ are taken out: their columns of the weight's gradient become 0.

Source: Sun et al., 2021, arXiv:2012.06043, section 4: the features with the largest ‖rᵢ(∂rᵢ/∂X)⁻¹‖₂ are set to 0, and that norm is
approximated as above.
Deviations: for several records the scores are summed, |rᵢ|/‖∂rᵢ/∂X‖ over records, where the authors' code sums the inverse ones and
adds 0.1 to rᵢ; a feature that is 0 for all records goes last, where the code prunes such features first, although nothing is hidden
by that. Under FedAvg the columns of the delta become 0; features are those at the broadcast parameters, over all records of the
round.
Hook: ``on_update``; looks at the private records again.

What it protects: nothing is guaranteed. It hides the picture from an attacker who matches the whole update as if nothing had been taken
out, and from nobody else.

What it does not protect: every other tensor of the update, which stays as it is to the bit. The columns that are 0 tell the
adversary what was pruned. It makes no differential-privacy claim (ε = ∞), and ends that of what stands before it.
Broken by: not asking the defended tensor. A linear layer with bias before the head gives its input away, x = ∂Wᵀ∂b/‖∂b‖², and
``r_gap`` peels the layers below it one by one. Digits, cnn of width 8 with 64 hidden units, one record, pruned = 0.2, 0.5 and 0.8:
10 of 10 exact and proven at 150 dB in 0.02 CPU s each, to the bit as without the defense
(``pytest -s tests/defenses/test_heuristics_solved.py``). The hidden layer of a batch is factorized by ``hybrid`` as before, exact and
proven with its labels even where nothing of the head's weight is left (``pytest tests/attacks/test_intact.py``).
Where the defended head is the only linear layer, the pruned columns are left out of the match (Balunović et al., 2022,
arXiv:2111.04706). With pruned = 0.1, 0.4 and 0.8 inverting_gradients gets 12.4, 12.7 and 12.6 dB, and 21.4, 21.2 and 21.0 dB without
those columns: as much as without a defense, 21.4 dB; 13.5 dB for the mean picture
(``pytest --slow -s tests/defenses/test_heuristics_matched.py``: photos in 16×16, ConvNet at its initial weights, batches of one, labels
disclosed, mean of 8).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from defenses.client._private import private_of
from defenses.client.top_k import require_share
from simulator.defense import ClientContext, Defense, Role
from simulator.mechanisms.soteria import kept_features, representation, sensitivities, without_features
from simulator.network import network, tensors
from simulator.registry import register
from simulator.types import Update
from simulator.world import World


@register("defenses", "soteria")
@dataclass(frozen=True)
class Soteria(Defense):
    """Takes the most revealing features out of a fully connected layer's gradient (Soteria); no guarantee.

    Attributes:
        pruned: share of the layer's inputs that are taken out.
        layer: the nn.Linear whose weight's gradient is defended; every model of ours ends in ``head``.
    """

    role: ClassVar[Role] = "compression"
    looks_again: ClassVar[bool] = True

    pruned: float = 0.8
    layer: str = "head"

    def __post_init__(self) -> None:
        require_share("pruned", self.pruned, "It is the share of features that are taken out; something must stay.")

    def refuses(self, world: World) -> str | None:
        """Refuse models without that layer."""
        schema = world.data.load().schema
        model = network(world.architecture, schema, world.training, world.seed).eval()
        try:
            representation(model, *tensors(model), torch.zeros(1, *schema.shape), self.layer)
        except ValueError as error:
            return str(error).removesuffix(".")
        return None

    def on_update(self, update: Update, context: ClientContext) -> Update:
        """Score the features on all records of the round, and zero the columns of the highest.

        Raises:
            ValueError: the client's own data are not there.
        """
        private = private_of(context, self.name)
        model, broadcast = private.model, private.broadcast
        scores = sum(
            (
                sensitivities(model, broadcast.parameters, broadcast.buffers, batch.inputs, self.layer)
                for batch in private.batches
                if len(batch)
            ),
            start=torch.zeros(broadcast.parameters[f"{self.layer}.weight"].shape[1]),
        )
        return replace(update, tensors=without_features(update.tensors, self.layer, kept_features(scores, self.pruned)))
