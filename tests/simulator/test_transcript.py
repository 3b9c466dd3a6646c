"""A transcript that was cut short, altered or reordered is refused, with the round where it breaks."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from simulator.errors import TranscriptError
from simulator.events import upload_event
from simulator.transcript import LINES, Transcript, read
from simulator.types import Update, Upload
from tests.federations import equal, federate, world


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "transcript"
    federate(world(), directory)
    return directory


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def _lines(directory: Path) -> list[bytes]:
    return (directory / LINES).read_bytes().splitlines(keepends=True)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    upload = Upload(frozenset({3}), Update("gradient", {"w": torch.arange(6.0).reshape(2, 3)}), {"mean": torch.ones(2)}, 5)
    writer = Transcript(tmp_path / "t", {"model": "x"})
    writer.append("broadcast", 1, {"training": {}}, {"parameters/w": torch.zeros(2, 3)})
    facts, tensors = upload_event(upload)
    writer.append("upload", 1, facts, tensors)
    writer.close("ok")
    (observation,) = read(tmp_path / "t").observations
    assert observation.upload.senders == upload.senders
    assert observation.upload.num_examples == 5
    assert torch.equal(observation.upload.update.tensors["w"], upload.update.tensors["w"])
    assert torch.equal(observation.upload.buffers["mean"], upload.buffers["mean"])


def test_whole_transcript_is_read_twice_the_same(recorded: Path) -> None:
    assert all(equal(a, b) for a, b in zip(read(recorded).observations, read(recorded).observations, strict=True))


def test_tensors_come_in_the_same_order_in_every_process(recorded: Path) -> None:
    for observation in read(recorded).observations:
        for tensors in (observation.broadcast.parameters, *(upload.update.tensors for upload in observation.uploads)):
            assert list(tensors) == sorted(tensors)


def test_one_cut_short_is_read_up_to_its_last_whole_round_on_demand(copy: Path) -> None:
    lines, whole = _lines(copy), read(copy)
    assert (read(copy, whole=False).missing, whole.missing) == ("", "")
    rounds = [json.loads(line)["round"] for line in lines]
    (copy / LINES).write_bytes(b"".join(lines[: rounds.index(2) + 2])[:-20])
    record = read(copy, whole=False)
    assert equal(record.observations[0], whole.observations[0])
    assert len(record.observations) == 1
    assert "cut short in round 2" in record.missing
    (copy / LINES).write_bytes(b"".join(lines[:-1]))
    assert len(read(copy, whole=False).observations) == 2
    for altered in (b"".join([lines[0], lines[2]]), b"".join(lines[: rounds.index(1) + 2])):
        (copy / LINES).write_bytes(altered)
        with pytest.raises(TranscriptError):
            read(copy, whole=False)


@pytest.mark.parametrize(("keep", "round"), [(-1, 2), (-11, 1), (1, 0)])
def test_missing_tail_is_refused_with_its_round(copy: Path, keep: int, round: int) -> None:
    (copy / LINES).write_bytes(b"".join(_lines(copy)[:keep]))
    with pytest.raises(TranscriptError, match=f"cut short in round {round}"):
        read(copy)


def test_half_a_line_is_refused(copy: Path) -> None:
    (copy / LINES).write_bytes((copy / LINES).read_bytes()[:-20])
    with pytest.raises(TranscriptError, match="broken chain at event .*, round 2"):
        read(copy)


def test_every_single_line_is_protected(copy: Path) -> None:
    lines = _lines(copy)
    for place, line in enumerate(lines):
        event = json.loads(line)
        event["note"] = "altered"
        (copy / LINES).write_bytes(b"".join([*lines[:place], json.dumps(event, sort_keys=True).encode() + b"\n", *lines[place + 1 :]]))
        with pytest.raises(TranscriptError, match=f"broken chain at event {place},"):
            read(copy)


def test_a_line_that_was_altered_and_sealed_again_no_longer_fits_the_next(copy: Path) -> None:
    """Whoever computes the line's own digest anew would have to do so for all that follow."""
    lines = _lines(copy)
    for place, line in enumerate(lines[:-1]):
        event = {name: value for name, value in json.loads(line).items() if name != "digest"} | {"note": "altered"}
        event["digest"] = hashlib.sha256(json.dumps(event, sort_keys=True).encode()).hexdigest()
        (copy / LINES).write_bytes(b"".join([*lines[:place], json.dumps(event, sort_keys=True).encode() + b"\n", *lines[place + 1 :]]))
        with pytest.raises(TranscriptError, match=f"broken chain at event {place + 1},"):
            read(copy)


def test_altered_fact_is_refused_even_if_the_line_is_valid_json(copy: Path) -> None:
    lines = _lines(copy)
    place = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "upload")
    event = json.loads(lines[place])
    event["num_examples"] += 1
    lines[place] = json.dumps(event, sort_keys=True).encode() + b"\n"
    (copy / LINES).write_bytes(b"".join(lines))
    with pytest.raises(TranscriptError, match="broken chain at event .*, round 1"):
        read(copy)


def test_swapped_and_dropped_lines_are_refused(copy: Path) -> None:
    lines = _lines(copy)
    for altered in ([*lines[:3], lines[4], lines[3], *lines[5:]], [*lines[:3], *lines[4:]]):
        (copy / LINES).write_bytes(b"".join(altered))
        with pytest.raises(TranscriptError, match="broken chain at event 3"):
            read(copy)


def test_flipped_bit_in_a_tensor_file_is_refused_with_its_round(copy: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[-1]  # the released model, after round 2
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(bytes(body))
    with pytest.raises(TranscriptError, match="of round 2 must match its digest, got an altered file"):
        read(copy)


def test_missing_tensor_file_is_refused(copy: Path) -> None:
    min(copy.glob("*.safetensors")).unlink()
    with pytest.raises(TranscriptError, match="of round 1 must match its digest, got no file"):
        read(copy)


def test_other_schema_is_refused(tmp_path: Path) -> None:
    writer = Transcript(tmp_path / "t", {"schema": 99})
    writer.close("ok")
    with pytest.raises(TranscriptError, match="schema must be 1, got 99"):
        read(tmp_path / "t")


def test_second_transcript_in_the_same_place_is_refused(recorded: Path) -> None:
    with pytest.raises(TranscriptError, match="must not hold a transcript yet"):
        Transcript(recorded, {})


def test_directory_without_a_transcript_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TranscriptError, match="must be a directory with"):
        read(tmp_path)


def test_files_cannot_point_outside_the_transcript(tmp_path: Path) -> None:
    writer = Transcript(tmp_path / "t", {})
    writer.append("upload", 1, {"senders": [0], "update": "gradient", "num_examples": 1}, {"update/w": torch.ones(1)})
    writer.close("ok")
    (tmp_path / "t" / "000001.safetensors").rename(tmp_path / "000001.safetensors")
    with pytest.raises(TranscriptError, match="got no file"):
        read(tmp_path / "t")


def test_no_pickle_is_written(recorded: Path) -> None:
    assert {path.suffix for path in recorded.iterdir()} == {".jsonl", ".safetensors"}
