"""Flower's arrays and our tensors, in both directions.

NumPy has no bfloat16: such an array declares that type and carries its bits as 16-bit integers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType

from simulator.types import Tensors

T = TypeVar("T")

MALFORMED = (KeyError, ValueError, TypeError, OverflowError)
"""What reading a record raises that is not what it should be."""

MAGIC = b"\x93NUMPY"
"""With which NumPy's format begins; ``numpy.load`` reads others, too, which no array of a message has."""

BFLOAT16 = "bfloat16"
"""The declared type of an array whose 16-bit integers are the bits of bfloat16 numbers."""

VERSION = (1, 0)
"""Of NumPy's format, as it writes all arrays but those with very long headers."""


def array_record(tensors: Tensors) -> ArrayRecord:
    """Tensors as a message carries them."""
    record = ArrayRecord()
    for name, tensor in tensors.items():  # handed a dict, ArrayRecord would make every array twice
        record[name] = _array(tensor.detach().contiguous())
    return record


def tensors_of(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """The inverse of :func:`array_record`; raises ValueError if there is none."""
    return {name: tensor_of(array) for name, array in record.items()}


def _array(tensor: torch.Tensor) -> Array:
    half = tensor.dtype == torch.bfloat16
    numbers = (tensor.view(torch.int16) if half else tensor).numpy()
    data = _stated(numbers.dtype, numbers.shape) + numbers.tobytes()
    return Array(dtype=BFLOAT16 if half else str(numbers.dtype), shape=numbers.shape, stype=SType.NUMPY, data=data)


@lru_cache(maxsize=1024)
def _stated(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header that ``numpy.save`` writes; cached like :func:`_form`, its inverse."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return stream.getvalue()


def tensor_of(array: Array) -> torch.Tensor:
    """One array of such a record as a tensor.

    Raises:
        ValueError: it holds no real numbers as NumPy writes them, or none that torch has.
    """
    return _parsed(lambda: _tensor(_numbers(array), array.dtype))


def _tensor(numbers: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    """Numbers as a tensor of the declared type."""
    if not kept(numbers.dtype):
        raise TypeError(f"numbers of type {numbers.dtype}")
    found = torch.from_numpy(numbers)
    return found.view(torch.bfloat16) if dtype == BFLOAT16 else found


def _parsed(read: Callable[[], T]) -> T:
    """What ``read`` makes of a stranger's bytes: parsers of headers, of archives and of code, and memory, fail in ways of their own.

    Raises:
        ValueError: it raised anything.
    """
    try:
        return read()
    except Exception as error:
        raise ValueError(f"array must be real numbers as NumPy writes them, got {type(error).__name__}: {error}") from error


def kept(dtype: np.dtype[Any]) -> bool:
    """Whether torch and safetensors have such numbers."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8


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
        return _parsed(lambda: _tensor(view.copy(), dtype))
    except ValueError:
        return as_bytes(view.tobytes())


def _numbers(array: Array) -> np.ndarray[Any, Any]:
    """``array.numpy()``, by a shorter way where it is what NumPy writes; where it is not, it raises what that raises."""
    header = _header(array.data)
    try:
        shape, fortran, dtype = _form(header)
        fills = len(array.data) == len(header) + dtype.itemsize * math.prod(shape)
        if array.stype == SType.NUMPY and not fortran and fills:
            return np.frombuffer(array.data, dtype, offset=len(header)).reshape(shape).copy()
    except MALFORMED:
        pass
    if array.stype == SType.NUMPY and not array.data.startswith(MAGIC):
        raise ValueError("data without the magic of NumPy's format")
    return np.asarray(array.numpy())


def _view(array: Array) -> np.ndarray[Any, Any]:
    """The array over the message's own bytes: ``array.numpy()`` without its copy, which would hold up the federation."""
    try:
        found = _parsed(lambda: _window(array))
    except ValueError:
        return np.frombuffer(array.data, np.uint8)
    return found if kept(found.dtype) else np.frombuffer(array.data, np.uint8)


def _window(array: Array) -> np.ndarray[Any, Any]:
    header = _header(array.data)
    if np.lib.format.read_magic(io.BytesIO(header)) != VERSION:
        return np.asarray(array.numpy())
    shape, fortran, dtype = _form(header)
    return np.frombuffer(array.data, dtype, offset=len(header)).reshape(shape, order="F" if fortran else "C")


def _header(data: bytes) -> bytes:
    """What precedes the numbers in :data:`VERSION` of NumPy's format, with its length in bytes 8 and 9."""
    return data[: 10 + int.from_bytes(data[8:10], "little")]


@lru_cache(maxsize=1024)
def _form(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and type that a header states; cached, since all messages of a federation have those of its model.

    Raises:
        ValueError: it is no header of :data:`VERSION`, or of no array.
    """
    stream = io.BytesIO(header)
    if (version := np.lib.format.read_magic(stream)) != VERSION:
        raise ValueError(f"version of NumPy's format must be {VERSION}, got {version}. Parse it with numpy.load.")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if min(shape, default=0) < 0:  # reshape takes a negative length for an unknown one
        raise ValueError(f"shape must be of lengths ≥ 0, got {shape}")
    return shape, fortran, dtype
