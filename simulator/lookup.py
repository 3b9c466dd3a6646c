"""Finds attacks, defenses, data sets and models by name.

Three ways in: a file in the kind's package (found by walking it), an entry point of group ``fedpeek.<kind>``, and a dotted path
``package.module:Class`` in a spec. Attacks may not import this module: it would hand them the data sets.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from simulator.errors import SpecError, did_you_mean
from simulator.registry import Kind, register, registered

PACKAGES: dict[Kind, str] = {"attacks": "attacks", "defenses": "defenses", "data": "simulator.data", "models": "simulator.models"}


@cache
def _discover(kind: Kind) -> None:
    package = importlib.import_module(PACKAGES[kind])
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    for entry in entry_points(group=f"fedpeek.{kind}"):
        if (kind, entry.name) not in registered:
            register(kind, entry.name)(entry.load())


def names(kind: Kind) -> list[str]:
    """All registered names of a kind, sorted."""
    _discover(kind)
    return sorted(name for k, name in registered if k == kind)


def get(kind: Kind, name: str) -> type[Any]:
    """Return the class called ``name``, or the one at the dotted path ``package.module:Class``.

    Raises:
        SpecError: there is none; the message names the nearest.
    """
    _discover(kind)
    if (kind, name) in registered:
        return registered[(kind, name)]
    if ":" in name:
        return _from_path(kind, name)
    raise SpecError(f"{kind} name must be registered, got {name!r}. {did_you_mean(name, names(kind))}")


def _from_path(kind: Kind, path: str) -> type[Any]:
    module, _, attribute = path.partition(":")
    try:
        cls: type[Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{kind} path must be importable as package.module:Class, got {path!r} ({error}). Check PYTHONPATH.") from error
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
        raise SpecError(f"{kind} at {path!r} must be a frozen dataclass, got {cls!r}. Decorate it with @dataclass(frozen=True).")
    return _adapters[kind](cls, path)
