"""Dataclasses as lines of standard JSON, read strictly: whatever is not exactly what such a line holds is refused.

An infinite or undefined number is written as ``"inf"``, ``"-inf"`` or ``"nan"``. An unknown or missing key, or a value of another type,
is an error; only a field that older versions did not write (:data:`SINCE`) may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from functools import cache
from itertools import repeat
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from simulator.errors import FedpeekError

T = TypeVar("T")

SINCE = {"optional": True}
"""Metadata of a field that lines of an older version lack; they are read with its default."""


class ResultError(FedpeekError):
    """A line of results that is not one of ours."""


def plain(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as what standard JSON can write; infinite numbers become text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def table(line: str) -> dict[str, Any]:
    """Return the object that a line holds; raises ResultError if it holds none."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ResultError(f"a result must be one line of JSON, got {line[:60]!r} ({error}). The run may have been cut off.") from error
    if not isinstance(found, dict):
        raise ResultError(f"a result must be a JSON object, got {type(found).__name__}. Remove the line.")
    return found


def record(cls: type[T], value: Any, path: str) -> T:
    """Return the dataclass that an object stands for; raises ResultError, with the path to what does not fit."""
    hints, required = _keys(cls)  # type: ignore[arg-type]
    complete = isinstance(value, dict) and required <= value.keys() <= hints.keys()
    _checked(complete, value, path, f"an object with exactly the keys {', '.join(hints)}")
    try:
        found = {name: (value[name], hint) for name, hint in hints.items() if name in value}
        return cls(**{name: x if type(x) is hint else _decode(hint, x, f"{path}.{name}") for name, (x, hint) in found.items()})
    except ValueError as error:
        raise ResultError(f"{path}: {error}") from error


def _decode(hint: Any, value: Any, path: str) -> Any:
    origin, args = _parts(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return record(hint, value, path)
    if origin in (Union, types.UnionType):
        return None if value is None else _decode(next(arg for arg in args if arg is not type(None)), value, path)
    if origin is Literal:
        return _checked(value in args, value, path, f"one of {', '.join(map(repr, args))}")
    if origin is tuple:
        _checked(isinstance(value, list) and (args[-1] is ... or len(value) == len(args)), value, path, "a list of the right length")
        kinds = repeat(args[0]) if args[-1] is ... else args
        pairs = enumerate(zip(value, kinds, strict=False))
        return tuple(item if type(item) is kind else _decode(kind, item, f"{path}.{i}") for i, (item, kind) in pairs)
    if origin is not None and issubclass(origin, Mapping):
        _checked(isinstance(value, dict), value, path, "an object")
        return {key: _decode(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(_checked(number or value in ("inf", "-inf", "nan"), value, path, "a number"))
    return _checked(isinstance(value, hint) and not (hint is int and isinstance(value, bool)), value, path, f"of type {hint.__name__}")


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


@cache
def _keys(cls: type[Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a record's keys, and the keys that every version wrote."""
    hints = get_type_hints(cls)
    return hints, frozenset(hints) - {item.name for item in dataclasses.fields(cls) if item.metadata == SINCE}


def _checked(condition: bool, value: Any, path: str, wanted: str) -> Any:
    if not condition:
        raise ResultError(f"{path} must be {wanted}, got {str(value)[:80]!r}. Was it written by another version of fedpeek?")
    return value
