"""A Gaussian kernel of the difference of gradients, tensor by tensor: after SAPAG, of which only the abstract could be read.

Source: Wang et al., 2020, arXiv:2009.06228, **the abstract only**: "a Gaussian kernel based of gradient difference as a distance measure".
    A width taken from each observed tensor, and AdamW: secondary descriptions, not verified.
Deviations: **the published settings are not known, so that there is no sapag-paper**, and results here are not those of the paper. The
    width (the squared norm of the observed tensor), the equal weights of the tensors and the step size are ours; a replication
    (github.com/NielsFuglsang/02460-advanced-machine-learning, src/utils.py) reads it as mean squares over twice the tensor's variance,
    with weights that fall with depth, and L-BFGS. Plain Adam, since pixels must not decay to black. Labels are recovered first.
"""

from __future__ import annotations

from dataclasses import dataclass

from attacks._matching.distances import kernel
from attacks._matching.objective import Candidates, Objective, Setting
from attacks._matching.optimize import Run, adam
from attacks._matching.solve import Matching
from simulator.registry import register


@register("attacks", "sapag")
@dataclass(frozen=True)
class SAPAG(Matching):
    """Gradient matching by a kernel distance and Adam.

    Attributes:
        steps: iterations.
        learning_rate: of Adam, in units of the pixel range [0, 1].
        seconds: CPU time for each victim, at most.
        restarts: random starts for each victim; the lowest objective wins.
        memory_mb: budget for victims and restarts that are attacked at once.
    """

    steps: int = 1000
    learning_rate: float = 0.05
    seconds: float = 600.0
    restarts: int = 1
    memory_mb: int = 1024

    def setting(self) -> Setting:
        """A Gaussian kernel on each tensor."""
        return Setting(distance=kernel, restarts=self.restarts, seconds=self.seconds, memory_mb=self.memory_mb)

    def optimize(self, objective: Objective, start: Candidates) -> Run:
        """Adam."""
        return adam(objective, start, steps=self.steps, learning_rate=self.learning_rate)
