"""Finds attacks, defenses, data sets and models by name.

Three ways in: a file in the kind's package (found by walking it), an entry point of group ``fedpeek.<kind>``, and a dotted path
``package.module:Class`` in a spec. Attacks may not import this module: it would hand them the data sets.

An entry point is imported when it is asked for by name, so that another package that is broken stops only who uses it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from simulator.errors import SpecError, did_you_mean
from simulator.registry import Kind, register, registered

PACKAGES: dict[Kind, str] = {"attacks": "attacks", "defenses": "defenses", "data": "simulator.data", "models": "simulator.models"}


SINGULAR: dict[Kind, str] = {"attacks": "attack", "defenses": "defense", "data": "data set", "models": "model"}
"""One of a kind, in the words of an error."""


@cache
def _discover(kind: Kind) -> None:
    package = importlib.import_module(PACKAGES[kind])
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


@cache
def _entries(kind: Kind) -> dict[str, tuple[EntryPoint, ...]]:
    """What other packages ship, by name and not yet imported."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=f"fedpeek.{kind}"):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def names(kind: Kind) -> list[str]:
    """All names of a kind, sorted; that of a broken package is among them."""
    _discover(kind)
    return sorted({name for k, name in registered if k == kind} | set(_entries(kind)))


def offered(kind: Kind) -> list[str]:
    """The names that a spec should give: all but those of models that are made of another model."""
    return [name for name in names(kind) if kind != "models" or (kind, name) not in registered or not wraps(registered[kind, name])]


def wraps(model: type[Any]) -> bool:
    """Whether a model is made of another model, which a defense puts around that one."""
    from simulator.config import Plugin  # which builds what is looked up here

    hints = get_type_hints(model, include_extras=True).values()
    return any(isinstance(extra, Plugin) and extra.kind == "models" for hint in hints for extra in getattr(hint, "__metadata__", ()))


def get(kind: Kind, name: str) -> type[Any]:
    """Return the class called ``name``, or the one at the dotted path ``package.module:Class``.

    Raises:
        SpecError: there is none, and the message names the nearest; or two packages ship one, or the one that does cannot be imported.
    """
    _discover(kind)
    for entry in _entries(kind).get(name, ()):
        _load(kind, entry)
    if (kind, name) in registered:
        return registered[(kind, name)]
    if ":" in name:
        return _from_path(kind, name)
    raise SpecError(
        f"{SINGULAR[kind]} name must be registered, got {name!r}. {did_you_mean(name, offered(kind), f'fedpeek list {kind}')} "
        f"For your own {SINGULAR[kind]}: package.module:Class."
    )


def _load(kind: Kind, entry: EntryPoint) -> None:
    """Import and register what another package ships."""
    distribution = entry.dist.name if entry.dist else entry.module
    try:
        cls = entry.load()
    except Exception as error:  # whatever their module raises while it is imported
        raise SpecError(
            f"entry point fedpeek.{kind}:{entry.name} must be importable, got {type(error).__name__}: {error}. "
            f"Uninstall or repair {distribution}."
        ) from error
    taken = registered.get((kind, entry.name))
    if taken is not None and taken is not cls:
        raise SpecError(
            f"name {entry.name!r} in {kind} must be unique, got it from {taken.__module__} and from {entry.value} of {distribution}. "
            f"Uninstall {distribution} or rename its entry point."
        )
    register(kind, entry.name)(cls)


def _from_path(kind: Kind, path: str) -> type[Any]:
    module, _, attribute = path.partition(":")
    try:
        cls: type[Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"{SINGULAR[kind]} path must be importable as package.module:Class, got {path!r} ({error}). Check PYTHONPATH."
        ) from error
    if not (isinstance(cls, type) and is_dataclass(cls)):
        cls = adapt(kind, cls, path)
    if not getattr(cls, "name", ""):
        cls.name = path  # type: ignore[union-attr]
    return cls


_adapters: dict[Kind, Callable[[Any, str], type[Any]]] = {}


def adapter(kind: Kind) -> Callable[[Callable[[Any, str], type[Any]]], Callable[[Any, str], type[Any]]]:
    """Decorator for the function that turns a user's plain class (an nn.Module, a Dataset) into one of ``kind``."""

    def decorate(function: Callable[[Any, str], type[Any]]) -> Callable[[Any, str], type[Any]]:
        _adapters[kind] = function
        return function

    return decorate


def adapt(kind: Kind, cls: Any, path: str) -> type[Any]:
    """Wrap a user's own class as a frozen dataclass of ``kind``.

    Raises:
        SpecError: this kind takes frozen dataclasses only.
    """
    if kind not in _adapters:
        raise SpecError(f"{SINGULAR[kind]} at {path!r} must be a frozen dataclass, got {cls!r}. Decorate it with @dataclass(frozen=True).")
    return _adapters[kind](cls, path)
