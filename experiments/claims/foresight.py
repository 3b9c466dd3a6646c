"""Whether what identifiability predicts is what an attack then gets: the measurement behind claims about the prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from attacks.identifiability import identify
from experiments.claims.claim import MEASURES
from experiments.claims.measures import AttackMeasure
from experiments.claims.scores import VISIBLE_MSE
from simulator.rng import stream


@dataclass(frozen=True, kw_only=True)
class ForesightMeasure(AttackMeasure):
    """The prediction of every victim, said before the attack, beside what the attack gave.

    A victim counts as right if "all" was predicted and every record came back, or "none" was and not all did. Where the attack stands for a
    proof of concept rather than for the best one, ``visible`` also counts what came back up to a squared error of 10^-2.8 (28 dB).

    Attributes:
        visible: count a record as given back from 28 dB on, not only where it is exact.
    """

    kind: ClassVar[str] = "foresight"

    visible: bool = False

    def names(self) -> Sequence[str]:
        """How often the prediction is right, what it was, and what came of it."""
        return ["predictions_right", "predicted", "given_back"]

    def __call__(self) -> Mapping[str, float]:
        """Predict, then attack."""
        predicted, came = [], []
        for seed in self.seeds:
            victims = self.build(seed)
            found = [identify(of.view, of.knowledge, rng=stream(seed, "identifiability", number)) for number, of in enumerate(victims)]
            predicted += [one.exact == one.records for one in found]
            limit = {"mse": VISIBLE_MSE} if self.visible else {}
            came += [trial.all_back(**limit) for trial in self.run(self.attack, victims, seed)]
        count = len(came)
        return {
            "predictions_right": sum(one == other for one, other in zip(predicted, came, strict=True)) / count,
            "predicted": sum(predicted) / count,
            "given_back": sum(came) / count,
        }


MEASURES[ForesightMeasure.kind] = ForesightMeasure
