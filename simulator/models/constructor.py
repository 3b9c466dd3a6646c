"""Settings of a class that knows nothing of us: its constructor's keyword parameters, as fields of a frozen dataclass."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_origin, get_type_hints

from simulator.errors import SpecError

BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def settings_class(cls: type[Any], path: str, methods: Mapping[str, Callable[..., Any]]) -> type[Any]:
    """Return a frozen dataclass with one field for each parameter of ``cls``'s constructor, and ``methods``.

    So a spec's settings are checked against the signature, like those of any built-in: unknown keys, types, missing values.
    A parameter without annotation has the type of its default.

    Raises:
        SpecError: a parameter that must be given but cannot be, since the spec has another use for its name.
    """
    hints = _hints(cls)
    fields: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(cls).parameters.items():
        settable = parameter.kind in BY_KEYWORD and name != "name" and name not in methods
        required = parameter.default is inspect.Parameter.empty
        if settable:
            hint = hints.get(name, Any if required or parameter.default is None else type(parameter.default))
            fields.append((name, hint, _field(parameter.default)))
        elif required and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise SpecError(f"parameter {name!r} of {path} must be settable by keyword, got a reserved name. Give it a default.")
    doc = cls.__doc__ or f"{cls.__name__} of {cls.__module__}."
    namespace = {**methods, "name": path, "__doc__": inspect.cleandoc(doc), "__module__": cls.__module__}
    return dataclasses.make_dataclass(cls.__name__, fields, namespace=namespace, frozen=True, kw_only=True)


def construct(cls: type[Any], settings: Any) -> Any:
    """Call the constructor of ``cls`` with the values of a :func:`settings_class` instance.

    Lists are kept as tuples among the settings, which must have a hash; who asks for a list gets one.
    """
    hints, parameters = _hints(cls), inspect.signature(cls).parameters
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in values.items():
        hint = hints.get(name)
        if isinstance(value, tuple) and (list in (hint, get_origin(hint)) or isinstance(parameters[name].default, list)):
            values[name] = list(value)
    return cls(**values)


def _hints(cls: type[Any]) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__)
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return {}


def _field(default: Any) -> Any:
    if default is inspect.Parameter.empty:
        return dataclasses.field()
    if isinstance(default, list):
        return dataclasses.field(default=tuple(default))
    if isinstance(default, (dict, set)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default))
    return dataclasses.field(default=default)
