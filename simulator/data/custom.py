"""A user's own data, by dotted path: ``name = "package.module:Images"``, a torch Dataset, its parameters as settings.

An item is an image, float32 (channel, height, width) in [0, 1], and its class index. An attribute ``classes`` gives the
classes' names; without it they are named by their indices.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from simulator.dataset import DataSet
from simulator.errors import SpecError
from simulator.lookup import adapter
from simulator.models.constructor import construct, settings_class
from simulator.models.initial import drawn_from
from simulator.rng import stream
from simulator.types import Batch, Schema


@adapter("data")
@cache
def from_dataset(cls: Any, path: str) -> type[Any]:
    """Return the data source of the torch Dataset class ``cls``.

    Raises:
        SpecError: ``cls`` is something else.
    """
    if not (isinstance(cls, type) and issubclass(cls, Dataset)):
        raise SpecError(f"data set at {path!r} must be a class derived from torch.utils.data.Dataset, got {cls!r}. Point to the class.")

    loaded: dict[str, DataSet] = {}

    def read(settings: Any) -> DataSet:
        with drawn_from(stream(0, "data", path)):  # a Dataset that augments gives the same images to all
            dataset = construct(cls, settings)
            records = stack(dataset, path)
        channels, height, width = records.inputs.shape[1:]
        schema = Schema((channels, height, width), _class_names(dataset, records.labels, path))
        return DataSet(records, schema, source=f"the user's {path}", license="the user's")

    def load(self: Any) -> DataSet:
        """Read all records in the Dataset's order, and check them."""
        key = repr(self)  # settings may be lists, which have no hash
        if key not in loaded:
            loaded[key] = read(self)
        return loaded[key]

    return settings_class(cls, path, {"load": load})


def stack(dataset: Any, path: str) -> Batch:
    """Read every item of a Dataset into one batch.

    Raises:
        SpecError: no items, or an item that is not an image in [0, 1] with a class index, or is of another shape than the first.
    """
    items = list(dataset) if isinstance(dataset, IterableDataset) else [dataset[i] for i in range(len(dataset))]
    if not items:
        raise SpecError(f"data {path} must have at least 1 record, got 0. Check its settings.")
    images: list[Tensor] = []
    labels: list[int] = []
    for i, item in enumerate(items):
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise SpecError(f"item {i} of {path} must be a pair (image, label), got {type(item).__name__}. Change __getitem__.")
        images.append(_image(item[0], f"image {i} of {path}", images[0].shape if images else None))
        labels.append(_label(item[1], f"label {i} of {path}"))
    return Batch(torch.stack(images), torch.tensor(labels))


def _image(image: Any, what: str, shape: torch.Size | None) -> Tensor:
    if not isinstance(image, Tensor) or image.dtype != torch.float32:
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise SpecError(f"{what} must be a float32 tensor, got {got}. Use torchvision.transforms.ToTensor().")
    if image.ndim != 3:
        raise SpecError(f"{what} must have shape (channel, height, width), got {tuple(image.shape)}. Add or move the channel.")
    if shape is not None and image.shape != shape:
        raise SpecError(f"{what} must have the shape of the first, {tuple(shape)}, got {tuple(image.shape)}. Resize or crop.")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # so written that NaN fails
        raise SpecError(f"{what} must lie in [0, 1], got [{low:.3g}, {high:.3g}]. Do not normalize: the model does; divide bytes by 255.")
    return image.detach()


def _label(label: Any, what: str) -> int:
    whole = label.numel() == 1 and not label.is_floating_point() if isinstance(label, Tensor) else hasattr(label, "__index__")
    if not whole or int(label) < 0:
        raise SpecError(f"{what} must be a class index ≥ 0, got {label!r}. Number the classes from 0.")
    return int(label)


def _class_names(dataset: Any, labels: Tensor, path: str) -> tuple[str, ...]:
    needed = int(labels.max()) + 1
    names = tuple(str(name) for name in getattr(dataset, "classes", range(needed)))
    if len(names) < needed:
        raise SpecError(f"classes of {path} must name all {needed} classes, got {len(names)}. Complete them or remove the attribute.")
    return names
