"""Deep image prior: the images are what an untrained convolutional network makes, and its weights are optimized.

Source: Ulyanov et al., 2018, arXiv:1711.10925 (the prior); Zhang et al., 2023, ICCV ("Generative Gradient Inversion via
    Over-Parameterized Networks", CI-Net; github.com/czhang024/CI-Net) for gradients: cosine, Adam on signs, fixed random codes.
Deviations: a decoder of four blocks and 32 channels with normalized features for each record, so that records do not mix (published:
    spectral norm and BatchNorm, channels doubled until the weights are four times the pixels, 5000 steps at 0.001); total variation is
    added; the angle and the steps of the learning rate are those of inverting_gradients.
    **The engine has no such network, so that there is no deep_image_prior-paper.** It is not on the ladder of ``strongest``: in trials on
    faces and photographs, which no command repeats, it lost to inverting_gradients on average, though not on the hardest pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks._matching.distances import angle
from attacks._matching.networks import UntrainedNetwork
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import Run, adam
from attacks._matching.priors import Weighted, rough
from attacks._matching.solve import Matching
from attacks._settings import must_settle
from simulator.registry import register


@register("attacks", "deep_image_prior")
@dataclass(frozen=True)
class DeepImagePrior(Matching):
    """Gradient matching over the weights of an untrained decoder.

    Attributes:
        width: channels of the decoder's blocks.
        latent: numbers in the fixed random code of each record.
        steps: iterations.
        learning_rate: of signed Adam, for weights of He's initial scale.
        tv: weight of the total variation at the start, see inverting_gradients.
        tv_final: weight at 7/8 of the run, reached geometrically.
        seconds: CPU time for each victim, at most.
        restarts: random starts for each victim; the lowest objective wins.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    width: int = 32
    latent: int = 64
    steps: int = 1000
    learning_rate: float = 0.003
    tv: float = 0.05
    tv_final: float = 0.02
    seconds: float = 600.0
    restarts: int = 1
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        must_settle(self)

    def setting(self) -> Setting:
        """The angle between gradients of what the decoder makes."""
        return Setting(
            distance=angle,
            variable=UntrainedNetwork(self.width, self.latent),
            priors=(Weighted(rough, self.tv, self.tv_final),) if self.tv else (),
            restarts=self.restarts,
            seconds=self.seconds,
            memory_mb=self.memory_mb,
        )

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """Signed Adam."""
        return adam(objective, start, steps=self.steps, learning_rate=self.learning_rate, signed=True)
