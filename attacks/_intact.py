"""Which tensors of an upload the known defenses left as the client computed them: what is exact of those is exact of its records."""

from __future__ import annotations

from attacks._gradient import steps_taken
from attacks._matching.defended import struck
from attacks.modeled import LOSSY
from simulator.adversary import Knowledge
from simulator.types import Observation


def lossy(view: Observation, knowledge: Knowledge) -> tuple[str, ...]:
    """The known defenses of :data:`LOSSY` that acted: what is exact of the whole update is then not exact of the records.

    Outpost leaves steps alone, and the zeros of a single one tell which.
    """
    update = view.upload.update.tensors
    alone = steps_taken(view, knowledge) == 1 and len(view.upload.senders) == 1 and not struck(update, knowledge.num_examples)
    return tuple(name for name, _ in knowledge.defenses if name in LOSSY and not (name == "outpost" and alone))


def intact(view: Observation, knowledge: Knowledge) -> frozenset[str]:
    """Names of the tensors that no known heuristic changed. Soteria takes columns out of one weight and leaves all others as they are."""
    acted, left = lossy(view, knowledge), frozenset(view.upload.update.tensors)
    if any(name != "soteria" for name in acted):
        return frozenset()
    return left - {f"{settings['layer']}.weight" for name, settings in knowledge.defenses if name in acted}


def changed(view: Observation, knowledge: Knowledge, *names: str) -> str | None:
    """The reason why tensors of these names cannot be taken for what the client computed; None if they can."""
    trained = view.upload.update.tensors
    spoiled = [name for name in names if name in trained and name not in intact(view, knowledge)]
    if not spoiled:
        return None
    return f"the gradient of {spoiled[0]} must be what the client computed, got it after {' and '.join(lossy(view, knowledge))}"
