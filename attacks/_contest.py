"""The ladder against the learned inverter, in rehearsal: which of the two serves a kind of victim is seen on public records.

Where matching is far from its end (several local steps, sums, deep networks), the mean of all records that fit the update shows more than
the best single fit. The fit does not tell: the mean explains the update worse. An attacker who holds public records need not guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from attacks._learned.mechanisms import chain
from attacks._learned.train import compression
from attacks._rehearsal import psnr_db, rehearsal
from attacks._solving import State, taken
from attacks.update.learning_to_invert import FEWEST, LearningToInvert, kinds
from simulator.adversary import Knowledge, Reconstruction
from simulator.types import Observation

REHEARSALS = 4
"""Uploads of public records, at most, on which the two are compared; as many as victims, if those are fewer."""

LEARNING = 0.2
"""Of the budget, what the inverter gets; the rehearsed uploads are attacked with what a victim gets."""

Climb = Callable[[Sequence[Observation], Sequence[Knowledge], Sequence[torch.Generator]], list[Reconstruction]]


def may_rehearse(state: State) -> bool:
    """Whether public records suffice to learn from some and rehearse on others, for a client that can be imitated."""
    view, knowledge = state.view, state.knowledge
    held = 0 if knowledge.public is None else len(knowledge.public)
    if held < FEWEST + REHEARSALS * knowledge.num_examples or view.upload.buffers or knowledge.history or LearningToInvert in state.able:
        return False
    return LearningToInvert().supports(view, knowledge) is None and not chain(view, knowledge).unknown


def share_of_ladder(victims: int) -> float:
    """Of the budget, what the ladder keeps on each of these victims."""
    return (1 - LEARNING) * victims / (victims + min(REHEARSALS, victims))


def contested(states: Sequence[State], rngs: Sequence[torch.Generator], climb: Climb, seconds: float) -> list[State]:
    """The states, those that are not solved with the inverter's answer where it was better on public records.

    Args:
        climb: the ladder, with the budget that it had for the victims.
        seconds: CPU seconds for each record.
    """
    states = list(states)
    left = [i for i, state in enumerate(states) if not (state.solved or state.whole or state.inside) and may_rehearse(state)]
    views, knowledge = [states[i].view for i in left], [states[i].knowledge for i in left]
    for places in kinds(views, knowledge, [compression(*pair) for pair in zip(views, knowledge, strict=True)]):
        mine = [left[place] for place in places]
        tried, told, truth = rehearsal(views[places[0]], knowledge[places[0]], min(REHEARSALS, len(mine)))
        own = [torch.Generator().manual_seed(number) for number in range(len(tried))]
        climbed = climb(tried, told, own)
        inverter = LearningToInvert(seconds=LEARNING * seconds * told[0].num_examples)
        answers = inverter.many(
            [*tried, *(views[place] for place in places)],
            [*told, *(replace(knowledge[place], public=told[0].public) for place in places)],
            rngs=[*own, *(rngs[i] for i in mine)],
        )
        gains = [
            psnr_db(learned.inputs, batch) - psnr_db(matched.inputs, batch)
            for learned, matched, batch in zip(answers, climbed, truth, strict=False)
        ]
        if sum(gains) > 0:
            for i, answer in zip(mine, answers[len(tried) :], strict=True):
                states[i] = taken(states[i], "learning_to_invert", answer)
    return states
