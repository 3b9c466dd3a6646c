"""The one function that sees both the truth and the threat model: it builds what the adversary is told, and no more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from simulator import config
from simulator.adversary import Knowledge, ThreatModel
from simulator.dataset import Splits
from simulator.defense import Defense, overrides
from simulator.network import network
from simulator.types import Batch, Observation, Upload
from simulator.world import World

ARCHITECTURE_SEED = 0
"""The adversary gets the architecture; the weights that matter come from the broadcast."""


def architecture(world: World, splits: Splits) -> nn.Module:
    """The network that everybody trains; one object for all victims, so that attacks can take them together."""
    return network(world.architecture, splits.schema, world.training, ARCHITECTURE_SEED)


def disclose(
    threat: ThreatModel,
    world: World,
    splits: Splits,
    truth: Batch,
    upload: Upload,
    model: nn.Module,
    *,
    others: Sequence[Observation] = (),
) -> Knowledge:
    """What the adversary knows besides its view.

    Args:
        threat: the rule.
        world: gives the public facts: architecture, recipe, the defenses' mechanisms and settings (Kerckhoffs).
        splits: gives the public records, if the rule grants them.
        truth: the private records behind the upload, in the senders' order; withheld but for what the rule grants.
        upload: gives the number of examples, which the protocol itself shows.
        model: the architecture.
        others: what the server recorded of the other rounds; withheld unless the rule grants all rounds.
    """
    classes = splits.schema.num_classes
    return Knowledge(
        model=model,
        schema=splits.schema,
        training=world.training,
        num_examples=upload.num_examples,
        labels=truth.labels.clone() if threat.labels == "exact" else None,
        label_counts=torch.bincount(truth.labels, minlength=classes) if threat.labels != "none" else None,
        public=splits.public if threat.public_data else None,
        defenses=tuple((defense.name, {**config.dump(defense), **noise_told(defense, world)}) for defense in world.defenses),
        encoded=any(overrides(defense, "on_batch") for defense in world.defenses),
        adversary=threat.adversary,
        history=tuple(sorted(others, key=lambda seen: seen.broadcast.round)) if threat.rounds == "all" else (),
    )


def noise_told(defense: Defense, world: World) -> dict[str, object]:
    """What a client of this world adds to its upload, where it follows from more than the defense's own settings."""
    return {"noise_std": defense.noise_std(world)} if world.channel is not None and defense.noise_std(world) else {}
