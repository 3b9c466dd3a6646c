"""Whether answers without information still know their victim: each beside its own truth and beside those of other victims.

An answer to an upload that says nothing of its records is as far from them as from the records of any other victim, however gray or noisy
it is. So the paired difference has its zero there for every attack, where a bar on the gain over a floor leaves room for a leak
as wide as the attack's answers are bad. The same attack on another shuffle could not show what every shuffle tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from experiments.claims.scores import Trial
from experiments.statistics import Interval, bootstrap_mean


def own_victim(trials: Sequence[Trial], *, foreign: bool = False) -> Interval:
    """PSNR in dB to the own truth minus that to other victims', over trials; what answer and truth have on average is taken out.

    Args:
        trials: of one seed, which are to be exchangeable.
        foreign: whether each was shown the upload of the next one, which is then none of the others.

    Raises:
        ValueError: there are fewer than three, or four where they are foreign.
    """
    count = len(trials)
    if count < 3 + foreign:
        raise ValueError(f"trials must be ≥ {3 + foreign}, got {count}. Add victims.")
    scores = torch.tensor([[float(replace(one, truth=other.truth).psnr_db.mean()) for other in trials] for one in trials])
    others = ~torch.eye(count, dtype=torch.bool)
    if foreign:
        others &= ~torch.eye(count, dtype=torch.bool).roll(1, dims=1)
    apart = torch.where(others, scores, 0.0)
    answers, truths = apart.sum(1) / others.sum(1), apart.sum(0) / others.sum(0)
    own = scores.diagonal() - answers - truths + apart.sum() / others.sum()
    return bootstrap_mean(own.tolist(), range(count), rng=np.random.default_rng(0))
