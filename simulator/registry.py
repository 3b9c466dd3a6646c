"""How an attack, a defense, a data set or a model makes itself known. Looking them up is another module's: ``simulator.lookup``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from simulator.errors import SpecError

Kind = Literal["attacks", "defenses", "data", "models"]

registered: dict[tuple[Kind, str], type[Any]] = {}
"""Every class that registered itself so far."""
T = TypeVar("T")


def register(kind: Kind, name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: make a frozen dataclass known as ``name`` among its kind; its fields are its settings.

    Raises:
        SpecError: the name is taken by another class.
    """

    def decorate(cls: type[T]) -> type[T]:
        taken = registered.get((kind, name))
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise SpecError(f"name {name!r} in {kind} must be unique, got it from {taken.__module__} and {cls.__module__}. Rename one.")
        registered[(kind, name)] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return decorate
