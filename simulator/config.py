"""TOML to frozen dataclasses and back, strictly: an unknown key, a wrong type or a wrong name is refused with its path."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from simulator import lookup
from simulator.errors import SpecError, did_you_mean
from simulator.registry import Kind

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """Marks a field whose value is a registered dataclass, written in TOML as a name or as a table with ``name``."""

    kind: Kind


def build(cls: type[T], table: Mapping[str, Any], path: str = "") -> T:
    """Make a ``cls`` from a TOML table.

    Raises:
        SpecError: an unknown key, a missing one, a value of another type, or a value that the class refuses.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise SpecError(f"setting {path}{key} must be one of {_title(cls)}'s, got {key!r}. {did_you_mean(key, fields)}")
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SpecError(f"setting {path}{name} must be given for {_title(cls)}, got nothing. Add it to the spec.")
    values = {name: _value(hints[name], value, f"{path}{name}") for name, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise SpecError(f"{path.rstrip('.') or _title(cls)}: {error}") from error


def dump(value: Any) -> Any:
    """The inverse of :func:`build`: plain tables, lists and scalars that TOML and JSON can write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(type(value), "name", "")
        named = {"name": name} if name and not _is_field(value, "name") else {}
        settings = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return named | {name: dump(setting) for name, setting in settings.items() if setting is not None}  # TOML has no null
    if isinstance(value, Mapping):
        return {str(key): dump(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [dump(item) for item in value]
    return value


def standard(value: Any) -> Any:
    """What :func:`dump` gives, as standard JSON can write it and :func:`build` reads it: infinity as ``"inf"``."""
    if isinstance(value, Mapping):
        return {name: standard(item) for name, item in value.items()}
    if isinstance(value, list):
        return [standard(item) for item in value]
    return "inf" if value == float("inf") and isinstance(value, float) else value


def override(table: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """Return ``table`` with one ``a.b=value`` applied; a number in the path indexes a list.

    Raises:
        SpecError: not of the form ``a.b=value``, or the path leads through a scalar or past the end of a list.
    """
    import tomllib

    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise SpecError(f"--set must be of the form a.b=value, got {assignment!r}. Example: --set training.learning_rate=0.05")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set attack=dlg
    assigned: dict[str, Any] = _assign(dict(table), path.strip().split("."), value, path.strip())
    return assigned


def _assign(node: Any, keys: list[str], value: Any, path: str) -> Any:
    head, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise SpecError(f"--set {path}: {head!r} must be an index below {len(node)}. Count from 0.")
        node = list(node)
        node[int(head)] = _assign(node[int(head)], rest, value, path) if rest else value
        return node
    if isinstance(node, str):
        node = {"name": node}  # a plugin written as a bare name
    if not isinstance(node, Mapping):
        raise SpecError(f"--set {path}: {head!r} must lead into a table, got {node!r}. See `fedpeek list` for the settings.")
    node = dict(node)
    node[head] = _assign(node.get(head, {}), rest, value, path) if rest else value
    return node


def build_plugin(kind: Kind, value: Any, path: str) -> Any:
    """Make a registered dataclass from its name, or from a table with ``name`` and its settings."""
    table = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else None
    if table is None or not isinstance(table.get("name"), str):
        valid = did_you_mean("", lookup.offered(kind), f"fedpeek list {kind}")
        raise SpecError(f"setting {path} must be a name or a table with a name, got {value!r}. {valid}")
    cls = lookup.get(kind, table.pop("name"))
    return build(cls, table, f"{path}.")


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        plugin = next((extra for extra in args[1:] if isinstance(extra, Plugin)), None)
        if plugin is None:
            return _value(args[0], value, path)
        if get_origin(args[0]) is tuple:
            _require(isinstance(value, Sequence) and not isinstance(value, str), path, "a list", value)
            return tuple(build_plugin(plugin.kind, item, f"{path}.{i}") for i, item in enumerate(value))
        return build_plugin(plugin.kind, value, path)
    if origin is Literal:
        if value not in args:
            raise SpecError(
                f"setting {path} must be one of {', '.join(map(repr, args))}, got {value!r}. {did_you_mean(str(value), map(str, args))}"
            )
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, path)
    if origin is tuple:
        _require(isinstance(value, Sequence) and not isinstance(value, str), path, "a list", value)
        return tuple(_value(args[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(value, Mapping), path, "a table", value)
        return dict(value)
    if dataclasses.is_dataclass(hint):
        _require(isinstance(value, Mapping), path, "a table", value)
        return build(hint, value, f"{path}.")  # type: ignore[arg-type]
    if hint is float:
        if value == "inf":
            return float("inf")
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), path, "a number", value)
        return float(value)
    if hint is int:
        _require(isinstance(value, int) and not isinstance(value, bool), path, "a whole number", value)
        return value
    if hint in (str, bool):
        _require(isinstance(value, hint), path, "a text" if hint is str else "true or false", value)
        return value
    return frozen(value)


def frozen(value: Any) -> Any:
    """Lists as tuples, so that a world with a user's own settings can be a key."""
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value


def _require(condition: bool, path: str, wanted: str, got: Any) -> None:
    if not condition:
        raise SpecError(f"setting {path} must be {wanted}, got {got!r}. Change it in the spec or with --set {path}=….")


def _title(cls: type[Any]) -> str:
    return str(getattr(cls, "name", "")) or cls.__name__


def _is_field(value: Any, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(value))
