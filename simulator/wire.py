"""Flower messages and our nouns, in both directions; the one place that knows record keys and message types.

A reply is checked against the broadcast before anyone uses it: names, shapes, types, finite values.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Literal

import torch
from flwr.app import ConfigRecord, Message, RecordDict

from simulator.arrays import MALFORMED, array_record, as_bytes, tensor_of, tensors_of, together
from simulator.errors import WireError, did_you_mean
from simulator.events import BUFFERS, PARAMETERS, UPDATE, Arrays
from simulator.network import floating
from simulator.types import Broadcast, LocalTraining, Tensors, Update, Upload

HELLO = "query.hello"
TRAIN = "train.update"
CHANNEL = "train.channel"
"""Message types: who are you; train and upload; one stage of the channel's protocol."""

ROUND, RECIPE, FACTS, STAGE = "round", "recipe", "facts", "stage"


def pack_broadcast(broadcast: Broadcast) -> RecordDict:
    """The broadcast as the content of a message."""
    return RecordDict(
        {
            PARAMETERS: array_record(broadcast.parameters),
            BUFFERS: array_record(broadcast.buffers),
            RECIPE: ConfigRecord({ROUND: broadcast.round, **asdict(broadcast.training)}),
        }
    )


def round_of(message: Message) -> int:
    """The round of a message that carries a broadcast."""
    return int(message.content.config_records[RECIPE][ROUND])  # type: ignore[arg-type]


def same_model(one: RecordDict, other: RecordDict) -> bool:
    """Whether two contents carry the same parameters and buffers, byte by byte."""
    mine, theirs = one.array_records, other.array_records
    pairs = [(mine.get(key) or {}, theirs.get(key) or {}) for key in (PARAMETERS, BUFFERS)]
    return all(left.keys() == right.keys() and all(left[name].data == right[name].data for name in left) for left, right in pairs)


def without_model(content: RecordDict) -> RecordDict:
    """What a content carries beside the model and the recipe."""
    return RecordDict({key: record for key, record in content.items() if key not in (PARAMETERS, BUFFERS, RECIPE)})


def hello_client(content: RecordDict, otherwise: int) -> int:
    """The client number in the answer to a hello, or ``otherwise`` if there is none."""
    try:
        return int(content.config_records["hello"]["client"])  # type: ignore[arg-type]
    except MALFORMED:
        return otherwise


def unpack_broadcast(content: RecordDict) -> Broadcast:
    """The broadcast that a message carries."""
    recipe: dict[str, Any] = dict(content.config_records[RECIPE])
    round = int(recipe.pop(ROUND))
    arrays = content.array_records
    parameters, buffers = (tensors_of(arrays[key]) for key in (PARAMETERS, BUFFERS))
    return Broadcast(round, parameters, buffers, LocalTraining(**recipe))


def pack_upload(upload: Upload) -> RecordDict:
    """A client's upload as the content of its reply; nothing else of the client goes with it."""
    return RecordDict(
        {
            UPDATE: array_record(upload.update.tensors),
            BUFFERS: array_record(upload.buffers),
            FACTS: ConfigRecord({"kind": upload.update.kind, "num-examples": upload.num_examples}),
        }
    )


def unpack_upload(content: RecordDict, client: int, broadcast: Broadcast) -> Upload:
    """The upload in a reply to ``broadcast``.

    Raises:
        WireError: a record is missing, or a tensor has another name, shape or type than the broadcast asks for, or is not finite.
    """
    try:
        facts, arrays = content.config_records[FACTS], content.array_records
        update, buffers = tensors_of(arrays[UPDATE]), tensors_of(arrays[BUFFERS])
        kind, examples = facts["kind"], facts["num-examples"]
    except MALFORMED as error:
        raise WireError(f"reply must carry {UPDATE}, {BUFFERS} and {FACTS}, got {sorted(content)} ({error}). Check the client.") from error
    expected: Literal["gradient", "delta"] = "delta" if broadcast.training.algorithm == "fedavg" else "gradient"
    if kind != expected:
        raise WireError(f"update kind must be {expected}, got {kind!r}. Check the client's algorithm.")
    if not isinstance(examples, int) or examples < 1:
        raise WireError(f"num-examples must be a whole number ≥ 1, got {examples!r}. Check the client.")
    dtype: torch.dtype = getattr(torch, broadcast.training.upload_dtype)
    check_tensors(update, broadcast.parameters, UPDATE, dtype)
    check_tensors(buffers, floating(broadcast.buffers), BUFFERS)
    return Upload(frozenset({client}), Update(expected, update), buffers, examples)


def received_upload(content: RecordDict, client: int) -> tuple[dict[str, Any], Arrays] | None:
    """The upload in a reply as it arrived, unchecked: an event's facts, and its arrays on demand; None if it is no upload.

    The bytes are taken hold of now and cannot change; parsing them is left to whoever writes them down.
    """
    try:
        facts = content.config_records[FACTS]
        arrays = {f"{key}/{name}": array for key in (UPDATE, BUFFERS) for name, array in content.array_records[key].items()}
        found: dict[str, Any] = {"senders": [client], "update": str(facts["kind"]), "num_examples": int(facts["num-examples"])}  # type: ignore[arg-type]
    except MALFORMED:
        return None
    extra = {key: record for key, record in content.items() if key not in (UPDATE, BUFFERS, FACTS)}
    if extra or set(facts) != {"kind", "num-examples"}:  # more crossed than an upload needs: metadata is part of the view
        more, tensors = facts_of_content(RecordDict({**extra, FACTS: facts}))
        return {**found, "beside": more}, lambda: together(arrays, tensors)
    return found, lambda: together(arrays, {})


def check_tensors(got: Tensors, like: Tensors, what: str, dtype: torch.dtype | None = None) -> None:
    """Check names, shapes and finiteness of received tensors against those that were sent, and the type against theirs or ``dtype``.

    Raises:
        WireError: the first difference.
    """
    for name in got:
        if name not in like:
            raise WireError(f"{what} must have the model's names, got {name!r}. {did_you_mean(name, like)}")
    for name, tensor in like.items():
        if name not in got:
            raise WireError(f"{what} must have the model's names, got none for {name!r}. Send every tensor.")
        wanted = (tensor.shape, dtype or tensor.dtype)
        if (got[name].shape, got[name].dtype) != wanted:
            mine, theirs = (f"{tuple(shape)} {str(kind)[6:]}" for shape, kind in (wanted, (got[name].shape, got[name].dtype)))
            raise WireError(f"{what} {name!r} must be {mine}, got {theirs}. Check the client's model.")
        if not torch.isfinite(got[name].abs().max() if got[name].numel() else torch.zeros(())):
            raise WireError(f"{what} {name!r} must be finite, got NaN or infinity. {_cure(got[name])}")


def _cure(tensor: torch.Tensor) -> str:
    """What to do about numbers that are not finite."""
    rate = "Lower the client's learning rate"
    return f"{rate}, or set training.upload_dtype = 'bfloat16': float16 ends at 65504." if tensor.dtype == torch.float16 else f"{rate}."


def pack_stage(stage: str, payload: bytes, broadcast: Broadcast | None = None, **facts: str | int) -> RecordDict:
    """One stage of a channel protocol: opaque bytes, with the broadcast where the client must train."""
    content = pack_broadcast(broadcast) if broadcast is not None else RecordDict()
    content[STAGE] = ConfigRecord({STAGE: stage, "payload": payload, **facts})
    return content


def unpack_stage(content: RecordDict) -> tuple[str, bytes, dict[str, Any]]:
    """The stage, its payload and its further facts.

    Raises:
        WireError: the message carries no stage.
    """
    try:
        facts: dict[str, Any] = dict(content.config_records[STAGE])
        stage, payload = facts.pop(STAGE), facts.pop("payload")
        if not isinstance(stage, str) or not isinstance(payload, bytes):  # bytes(10**12) would be that many zeros
            raise TypeError(f"{type(stage).__name__} and {type(payload).__name__} where a name and bytes belong")
        return stage, payload, facts
    except (KeyError, TypeError) as error:
        raise WireError(
            f"message must carry a protocol stage, got {sorted(content)}. Check that both sides run the same channel."
        ) from error


def content_bytes(message: Message) -> int:
    """:func:`bytes_of` a message; 0 where it is an error."""
    return 0 if message.has_error() else bytes_of(message.content)


def bytes_of(content: RecordDict) -> int:
    """Bytes of the serialized arrays and payloads in a content: what it costs, whatever carries it."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    payloads = sum(len(v) for record in content.config_records.values() for v in record.values() if isinstance(v, bytes))
    return int(arrays + payloads)


def facts_of(message: Message) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Everything in a message that has no noun of its own: scalars as JSON, arrays and byte strings as tensors."""
    if message.has_error():
        return {"error": {"code": message.error.code, "reason": message.error.reason}}, {}
    return facts_of_content(message.content)


def facts_of_content(content: RecordDict) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Everything in a content, whatever it is: what no tensor or JSON can hold is kept as bytes or text. It never fails."""
    facts: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, arrays in content.array_records.items():
        for name, array in arrays.items():
            try:
                tensors[f"{key}/{name}"] = tensor_of(array)
            except MALFORMED:
                tensors[f"{key}/{name}"] = as_bytes(array.data)
                facts.setdefault(key, {})[name] = f"{array.dtype} {array.shape}, as bytes"
    for key, record in [*content.metric_records.items(), *content.config_records.items()]:
        for name, value in record.items():
            if isinstance(value, bytes):
                tensors[f"{key}/{name}"] = as_bytes(value)
            else:
                facts.setdefault(key, {})[name] = _plain(value)
    return facts, {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def _plain(value: Any) -> Any:
    """A setting as standard JSON can hold it: NaN and infinity as text, bytes in hexadecimal."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def reply(content: RecordDict, request: Message) -> Message:
    """Answer ``request`` with ``content``."""
    return Message(content, reply_to=request)
