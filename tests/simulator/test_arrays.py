"""The short ways of writing and reading arrays against NumPy's own and Flower's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from safetensors.numpy import save_file

from simulator.arrays import array_record, tensor_of, together
from simulator.wire import facts_of_content

NUMBERS = {
    "matrix": torch.arange(6.0).reshape(2, 3) / 7,
    "scalar": torch.tensor(1 / 3),
    "none": torch.zeros(0, 4),
    "counter": torch.tensor(2**40),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "truths": torch.tensor([True, False]),
    "half": torch.tensor([0.1, -0.0]).half(),
    "double": torch.tensor([torch.nan, torch.inf, -0.0], dtype=torch.float64),
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_written_is_flowers_own_to_the_byte(name: str) -> None:
    got, wanted = array_record(NUMBERS)[name], Array(NUMBERS[name].contiguous().numpy())
    assert (got.dtype, got.shape, got.stype, got.data) == (wanted.dtype, wanted.shape, wanted.stype, wanted.data)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_read_is_numpys_own_to_the_bit(name: str) -> None:
    array = Array(NUMBERS[name].numpy())  # channels last: not contiguous
    got, wanted = tensor_of(array), array.numpy()
    assert got.numpy().dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert got.numpy().tobytes() == wanted.tobytes()
    before = array.data
    got.zero_()
    assert array.data == before  # what is read is no window on the message


def written(value: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, value, version)
    return stream.getvalue()


WHOLE = written(np.arange(6.0).reshape(2, 3))
STRANGE = {
    "nothing": b"",
    "half a header": WHOLE[:40],
    "no header": b"\x00" * 200,
    "too few numbers": WHOLE[:-3],
    "an archive": b"PK\x03\x04" + WHOLE,
    "a shape that is none": WHOLE.replace(b"(2, 3)", b"(2, x)"),
    "a negative shape": WHOLE.replace(b"(2, 3)", b"(-2,3)"),
    "code": WHOLE.replace(b"(2, 3)", b"exit()"),
    "a huge header": WHOLE[:8] + (60000).to_bytes(2, "little") + WHOLE[10:128] + b" " * 60000,
    "text": written(np.array(["a"])),
    "another byte order": written(np.zeros(2, ">f4")),
    "objects": written(np.zeros(2, "V4")).replace(b"'|V4'", b"'|O' "),
    "a header without an end": WHOLE.replace(b"(2, 3)", b"((2, 3"),
    "a type that is empty": WHOLE.replace(b"'<f8'", b"()   "),
    "a shape beyond all memory": WHOLE.replace(b"(2, 3)", b"(2, 3)".replace(b"2", b"9" * 15)),
    "long doubles": written(np.zeros(2, np.longdouble)),
    "complex": written(np.zeros(2, complex)),
    "wide complex": written(np.zeros(2, np.clongdouble)),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_malformed_is_one_error_for_the_reader_and_bytes_for_the_tap(name: str, tmp_path: Path) -> None:
    array = Array(dtype="float64", shape=(2, 3), stype="numpy.ndarray", data=STRANGE[name])
    for _ in range(2):  # the second time out of the cache
        with pytest.raises(ValueError, match="array must be real numbers as NumPy writes them, got "):
            tensor_of(array)
        found = together({"it": array}, {})
        save_file(found, tmp_path / "event.safetensors")
        assert found["it"].tobytes() == (bytes(8) if name == "another byte order" else STRANGE[name])  # torch lacks it, files do not
    _, tensors = facts_of_content(RecordDict({"unasked": ArrayRecord({"it": array})}))
    assert not tensors if name == "nothing" else bytes(tensors["unasked/it"].numpy()) == STRANGE[name]


@pytest.mark.parametrize(
    "data",
    [WHOLE + b"more", written(np.arange(6.0).reshape(2, 3), (2, 0)), written(np.asfortranarray(np.arange(6.0).reshape(2, 3)))],
    ids=["more than the numbers", "version 2", "Fortran order"],
)
def test_what_is_not_our_own_is_read_by_numpy(data: bytes) -> None:
    array = Array(dtype="float64", shape=(2, 3), stype="numpy.ndarray", data=data)
    assert torch.equal(tensor_of(array), torch.arange(6.0, dtype=torch.float64).reshape(2, 3))


def test_another_serialization_is_refused() -> None:
    with pytest.raises(ValueError, match="Unsupported serialization type"):
        tensor_of(Array(dtype="float64", shape=(2, 3), stype="other", data=WHOLE))
