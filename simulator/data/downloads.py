"""The data sets of torchvision: read from disk, downloaded only when the spec says so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch

from simulator.dataset import DataSet
from simulator.errors import SpecError
from simulator.registry import register
from simulator.types import Batch, Schema


@dataclass(frozen=True, kw_only=True)
class Downloaded:
    """The settings that all of torchvision's data sets share.

    Attributes:
        root: folder of the files, in torchvision's layout.
        download: fetch the files when they are absent; needs a network.
        part: of the publisher's two parts; ours into clients, test and public is made from it.
        records: read the first ones only; 0 means all. In memory a pixel takes 4 bytes: all of CIFAR-10 take 614 MB.
    """

    root: str = "data"
    download: bool = False
    part: Literal["train", "test"] = "train"
    records: int = 0

    torchvision_name: ClassVar[str]
    source: ClassVar[str]
    license: ClassVar[str]

    def __post_init__(self) -> None:
        if self.records < 0:
            raise ValueError(f"records must be ≥ 0, got {self.records}. Use 0 for all.")

    def load(self) -> DataSet:
        """Read the records in the publisher's order.

        Raises:
            SpecError: the files are absent or damaged, or their download failed.
        """
        return _read(self)


@register("data", "mnist")
@dataclass(frozen=True, kw_only=True)
class MNIST(Downloaded):
    """All of MNIST: 60,000 and 10,000 handwritten digits, 28×28 gray."""

    torchvision_name = "MNIST"
    source = "MNIST (LeCun et al., 1998), through torchvision"
    license = "see MNIST for its terms"


@register("data", "fashion_mnist")
@dataclass(frozen=True, kw_only=True)
class FashionMNIST(Downloaded):
    """All of Fashion-MNIST: 60,000 and 10,000 pieces of clothing, 28×28 gray."""

    torchvision_name = "FashionMNIST"
    source = "Fashion-MNIST (Xiao et al., 2017), through torchvision"
    license = "MIT"


@register("data", "cifar10")
@dataclass(frozen=True, kw_only=True)
class CIFAR10(Downloaded):
    """All of CIFAR-10: 50,000 and 10,000 photographs, 32×32 color."""

    torchvision_name = "CIFAR10"
    source = "CIFAR-10 (Krizhevsky, 2009), through torchvision"
    license = "no license stated, do not redistribute"


@register("data", "cifar100")
@dataclass(frozen=True, kw_only=True)
class CIFAR100(Downloaded):
    """All of CIFAR-100: 50,000 and 10,000 photographs in 100 classes, 32×32 color."""

    torchvision_name = "CIFAR100"
    source = "CIFAR-100 (Krizhevsky, 2009), through torchvision"
    license = "no license stated, do not redistribute"


@register("data", "svhn")
@dataclass(frozen=True, kw_only=True)
class SVHN(Downloaded):
    """Street View House Numbers: 73,257 and 26,032 digits in photographs, 32×32 color."""

    torchvision_name = "SVHN"
    source = "SVHN (Netzer et al., 2011), through torchvision"
    license = "see its publisher for the terms of use before any but research use"


@cache
def _read(settings: Downloaded) -> DataSet:
    published = _open(settings)
    count = settings.records or len(published)
    inputs = torch.as_tensor(published.data[:count])  # uint8
    if inputs.ndim == 3:  # gray images come without a channel
        inputs = inputs[:, None]
    elif inputs.shape[-1] == 3:  # CIFAR's channels come last, SVHN's first
        inputs = inputs.permute(0, 3, 1, 2)
    labels = torch.as_tensor(published.labels if settings.torchvision_name == "SVHN" else published.targets)[:count].long()
    channels, height, width = inputs.shape[1:]
    names = tuple(getattr(published, "classes", "0123456789"))
    return DataSet(
        Batch((inputs.float() / 255).contiguous(), labels),
        Schema((channels, height, width), names),
        source=settings.source,
        license=settings.license,
    )


def _open(settings: Downloaded) -> Any:
    import torchvision.datasets  # slow to import

    name = settings.torchvision_name
    which: dict[str, Any] = {"split": settings.part} if name == "SVHN" else {"train": settings.part == "train"}
    try:
        return getattr(torchvision.datasets, name)(settings.root, download=settings.download, **which)
    except (RuntimeError, OSError, EOFError, ValueError) as error:  # absent, damaged, or no network: torchvision raises any of these
        wanted = f"{name} must be downloadable into" if settings.download else f"{name} must be in folder"
        absent = isinstance(error, RuntimeError) and not settings.download  # torchvision then advises an argument of its own
        got = "no such files, or altered ones" if absent else error
        raise SpecError(
            f"{wanted} {settings.root!r}, got: {got}. On a machine with a network set data.download = true, or copy the files from one; "
            "offline use mnist5k, digits, faces or synthetic."
        ) from error
