"""Twenty well-known color images each: targets of attacks, too few to train on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from simulator.data.packaged import packaged
from simulator.dataset import DataSet
from simulator.registry import register
from simulator.types import Batch, Schema

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@register("data", "cifar10-sample")
@dataclass(frozen=True)
class CIFAR10Sample:
    """The first 20 test images of CIFAR-10, 32×32 color, lossless."""

    def load(self) -> DataSet:
        """Read the records in the order of the CIFAR-10 test set."""
        return _cifar10_sample()


@register("data", "imagenet-sample")
@dataclass(frozen=True)
class ImageNetSample:
    """20 ImageNet photographs, scaled to fill a square and cut around the center.

    The labels 0 … 18 stand for the 19 ImageNet classes that occur, in ascending order; the class names are ImageNet's indices.

    Attributes:
        size: side of the square in pixels; the photographs have at least 512.
    """

    size: int = 64

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 512:
            raise ValueError(f"size must be between 8 and 512 pixels, got {self.size}. Typical: 64 or 224.")

    def load(self) -> DataSet:
        """Read the records in the order of their file names."""
        return _imagenet_sample(self.size)


@cache
def _cifar10_sample() -> DataSet:
    files = _files("cifar10")
    inputs = torch.stack([_pixels(Image.open(file)) for file in files])
    labels = torch.tensor([_label(file) for file in files])
    return DataSet(
        Batch(inputs, labels),
        Schema((3, 32, 32), CIFAR10_CLASSES),
        source="CIFAR-10 test images 0 to 19 (Krizhevsky, 2009), shipped with foolbox",
        license="foolbox: MIT; CIFAR-10: no license stated, do not redistribute",
    )


@cache
def _imagenet_sample(size: int) -> DataSet:
    files = _files("imagenet")
    photographs = (Image.open(file) for file in files)
    inputs = torch.stack([_pixels(ImageOps.fit(photo, (size, size), Image.Resampling.LANCZOS)) for photo in photographs])
    indices, labels = np.unique([_label(file) for file in files], return_inverse=True)
    return DataSet(
        Batch(inputs, torch.from_numpy(labels)),
        Schema((3, size, size), tuple(str(index) for index in indices.tolist())),
        source="ImageNet (Russakovsky et al., 2015), 20 validation photographs, shipped with foolbox",
        license="foolbox: MIT; ImageNet: no license stated for the photographs, do not redistribute",
    )


def _files(name: str) -> list[Path]:
    # Importing foolbox would import GitPython, which fails on machines without git; the files need none of its code.
    return sorted(packaged("foolbox", "foolbox/data").glob(f"{name}_*"))


def _label(file: Path) -> int:
    """``imagenet_03_990.jpg`` has label 990."""
    return int(file.stem.split("_")[-1])


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
