"""Real faces, small and gray."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from simulator.data.packaged import packaged
from simulator.dataset import DataSet
from simulator.registry import register
from simulator.types import Batch, Schema


@register("data", "faces")
@dataclass(frozen=True)
class Faces:
    """100 real faces (class 1) and 100 pieces of background (class 0), 25×25 gray, from Labeled Faces in the Wild.

    There are no identities: fit for "is this face visible again", not for "who is it".
    """

    def load(self) -> DataSet:
        """Read the records: faces first, as shipped."""
        return _faces()


@cache
def _faces() -> DataSet:
    images = np.load(packaged("scikit-image", "skimage/data/lfw_subset.npy"), allow_pickle=False)
    inputs = torch.from_numpy(images).float().clamp(0, 1)[:, None]
    labels = torch.tensor([1] * 100 + [0] * 100)
    return DataSet(
        Batch(inputs, labels),
        Schema((1, 25, 25), ("background", "face")),
        source="Labeled Faces in the Wild (Huang et al., 2007), subset shipped with scikit-image",
        license="scikit-image: BSD-3-Clause; LFW: photographs of real people from news sites, no open license, do not redistribute",
    )
