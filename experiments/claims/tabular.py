"""Tables as data for claims about layers that take any input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from simulator.data.packaged import packaged
from simulator.dataset import DataSet
from simulator.types import Batch, Schema


@dataclass(frozen=True)
class BreastCancer:
    """569 records of 30 measurements each, every column standardized and then all by one factor in [0, 1], as images of one row."""

    name = "breast-cancer"

    def load(self) -> DataSet:
        """Read the records in the order of scikit-learn's ``load_breast_cancer``."""
        return _breast_cancer()


@cache
def _breast_cancer() -> DataSet:
    table = np.loadtxt(packaged("scikit-learn", "sklearn/datasets/data/breast_cancer.csv"), delimiter=",", skiprows=1, dtype=np.float32)
    values, labels = torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1]).long()
    standard = (values - values.mean(0)) / values.std(0)
    scaled = 0.5 + 0.5 * standard / standard.abs().max()
    return DataSet(
        Batch(scaled.view(-1, 1, 1, 30), labels),
        Schema((1, 1, 30), ("malignant", "benign")),
        source="Breast Cancer Wisconsin, diagnostic (Wolberg, Street and Mangasarian, UCI, 1995), shipped with scikit-learn",
        license="scikit-learn: BSD-3-Clause; UCI: CC BY 4.0",
    )
