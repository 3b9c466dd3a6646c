"""Flower's arrays and our tensors, in both directions.

NumPy has no bfloat16: such an array declares that type and carries its bits as 16-bit integers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from simulator.types import Tensors

MALFORMED = (KeyError, ValueError, TypeError, RuntimeError, OverflowError, EOFError)
"""What reading a record raises that is not what it should be."""

BFLOAT16 = "bfloat16"
"""The declared type of an array whose 16-bit integers are the bits of bfloat16 numbers."""


def array_record(tensors: Tensors) -> ArrayRecord:
    """Tensors as a message carries them."""
    return ArrayRecord({name: _array(tensor.detach().contiguous()) for name, tensor in tensors.items()})


def tensors_of(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The inverse of :func:`array_record`; raises one of :data:`MALFORMED` if there is none."""
    return {name: tensor_of(array) for name, array in record.items()}


def _array(tensor: torch.Tensor) -> Array:
    if tensor.dtype != torch.bfloat16:
        return Array(tensor.numpy())
    bits = Array(tensor.view(torch.int16).numpy())
    return Array(dtype=BFLOAT16, shape=bits.shape, stype=bits.stype, data=bits.data)


def tensor_of(array: Array) -> torch.Tensor:
    """One array of such a record as a tensor."""
    found = torch.from_numpy(array.numpy())
    return found.view(torch.bfloat16) if array.dtype == BFLOAT16 else found


def as_bytes(data: bytes) -> torch.Tensor:
    """What no array is, byte by byte."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def together(arrays: Mapping[str, Array], tensors: Tensors) -> Mapping[str, np.ndarray[Any, Any]] | Tensors:
    """All of one event: NumPy's own over the message's bytes, or tensors as soon as one is bfloat16."""
    views = {name: _view(array) for name, array in arrays.items()}
    if not any(array.dtype == BFLOAT16 for array in arrays.values()):
        return {**views, **{name: tensor.numpy() for name, tensor in tensors.items()}}
    return {**{name: _bits(view, arrays[name].dtype) for name, view in views.items()}, **tensors}


def _bits(view: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """What arrived, as a tensor of the declared type if it can be one, else as bytes."""
    try:
        found = torch.from_numpy(view.copy())
        return found.view(torch.bfloat16) if dtype == BFLOAT16 else found
    except MALFORMED:
        return as_bytes(view.tobytes())


def _view(array: Array) -> np.ndarray[Any, Any]:
    """The array over the message's own bytes: ``array.numpy()`` without its copy, which would hold up the federation."""
    stream = io.BytesIO(array.data)  # shares the bytes
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            return np.asarray(array.numpy())
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        found = np.frombuffer(array.data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    except MALFORMED:
        return np.frombuffer(array.data, np.uint8)
    return found if dtype.kind in "biuf" else np.frombuffer(array.data, np.uint8)
