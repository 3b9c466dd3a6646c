"""What ``fedpeek list`` shows: every name of a kind with its settings, metrics, example specs, the keys of a spec; or one in full."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from simulator import config, lookup
from simulator.errors import SpecError, did_you_mean
from simulator.registry import Kind

Listed = Literal["attacks", "defenses", "data", "models", "metrics", "specs", "settings"]
REQUIRED = "required"

HEADINGS: dict[str, tuple[str, str, str]] = {
    "metrics": ("name", "what it is", "unit"),
    "specs": ("name", "what it is", "run with"),
    "settings": ("name", "default", "what it means"),
}
"""Of the columns of a list; of attacks, defenses, data sets and models :data:`OF_CLASSES`."""
OF_CLASSES = ("name", "what it is", "settings and defaults")


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass: its default as Python writes it, or TOML a key of a spec, and what the documentation says of it."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Entry:
    """One name in full.

    Attributes:
        source: the paper that its module names; empty where it names none.
        note: how it is used, or its unit.
    """

    name: str
    description: str
    source: str = ""
    note: str = ""
    settings: tuple[Setting, ...] = ()


def rows(kind: Listed, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
    """What :data:`HEADINGS` says, for everything of a kind; ``say`` hears of other packages that cannot be used."""
    if kind == "metrics":
        from experiments.metrics import METRICS

        yield from ((metric.name, metric.description, metric.unit) for metric in METRICS.values())
        return
    if kind == "specs":
        from experiments.spec import specs

        for name, path in sorted(specs().items()):
            yield name, _description(path.read_text(encoding="utf-8")), f"fedpeek run {name}; copy {path}"
        return
    if kind == "settings":
        for section, cls in tables().items():
            yield from ((each.name, each.default, each.meaning) for each in keys(cls, section))
        return
    for name, cls in shown(kind, say):
        yield name, first_line(cls), ", ".join(settings(cls))


def entry(kind: Listed, name: str) -> Entry:
    """One name of a kind in full.

    Raises:
        SpecError: there is no such name.
    """
    if kind == "metrics":
        from experiments.metrics import METRICS

        if name not in METRICS:
            raise SpecError(f"metric name must be known, got {name!r}. {did_you_mean(name, METRICS)}")
        metric = METRICS[name]
        return Entry(name, metric.description, note=f"unit: {metric.unit}; {'higher' if metric.higher_is_better else 'lower'} is better")
    if kind == "specs":
        from experiments.spec import find

        path = find(name)
        return Entry(name, _description(path.read_text(encoding="utf-8")), note=f"fedpeek run {name}; copy {path}")
    if kind == "settings":
        return _key(name)
    cls = lookup.get(kind, name)
    explained = meanings(cls)
    defaults = dict(setting.partition("=")[::2] for setting in settings(cls) if "=" in setting)
    fields = tuple(Setting(each.name, defaults.get(each.name, REQUIRED), explained.get(each.name, "")) for each in dataclasses.fields(cls))
    return Entry(name, first_line(cls), source(cls), settings=fields)


def tables() -> dict[str, type[Any]]:
    """The tables of a spec, by the name of their section: what stands above all of them under ""; ``layers`` are like ``arms``."""
    from experiments.arms import Arm
    from experiments.spec import Experiment

    hints = get_type_hints(Experiment)
    sections = {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    return {"": Experiment, **sections, "arms": Arm}


def keys(cls: type[Any], section: str = "") -> tuple[Setting, ...]:
    """The keys of one table of a spec, by the path that ``--set`` takes; in ``arms`` the number of an arm stands between."""
    explained, hints, prefix = meanings(cls), get_type_hints(cls), f"{section}." if section else ""
    return tuple(
        Setting(prefix + each.name, _default(each), _with_choices(explained.get(each.name, ""), hints[each.name]))
        for each in dataclasses.fields(cls)
    )


def _key(name: str) -> Entry:
    """One table of a spec with its keys, or one key.

    Raises:
        SpecError: there is no such table or key.
    """
    found = {each.name: each for section, cls in tables().items() for each in keys(cls, section)}
    if name in tables():
        cls = tables()[name]
        return Entry(name, first_line(cls), settings=keys(cls, name))
    if name not in found:
        raise SpecError(f"setting must be a key of a spec, got {name!r}. {did_you_mean(name, found, 'fedpeek list settings')}")
    return Entry(name, found[name].meaning, note=f"default: {found[name].default}")


def _default(field: dataclasses.Field[Any]) -> str:
    """The default of a key as TOML writes it; a table has none but those of its keys."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return REQUIRED
    return "a table" if dataclasses.is_dataclass(value) else json.dumps(config.dump(value), ensure_ascii=False)


def _with_choices(meaning: str, hint: Any) -> str:
    """What a key means, and the words that it may be where these are a few."""
    choices = [f'"{choice}"' for choice in get_args(hint)] if get_origin(hint) is Literal else []
    return f"{meaning} One of {', '.join(choices)}." if choices else meaning


def shown(kind: Kind, say: Callable[[str], None]) -> Iterator[tuple[str, type[Any]]]:
    """What a user may name: all of a kind but for models made of another model, which defenses put around it."""
    for name in lookup.names(kind):
        try:
            cls = lookup.get(kind, name)
        except SpecError as error:
            say(str(error))
            continue
        if kind != "models" or not lookup.wraps(cls):
            yield name, cls


def first_line(cls: type[Any]) -> str:
    """What the class is, in the first line of its documentation; a pointer to its module means nothing in a table."""
    first, pointer, _ = plain((cls.__doc__ or "").strip().partition("\n")[0]).partition("; see the module")
    return f"{first}." if pointer else first


def source(cls: type[Any]) -> str:
    """The paper that the class's module names, in one line; empty where it names none."""
    module = inspect.getmodule(cls)
    found = re.search(r"^Source: *(.*(?:\n(?!\n|\w[\w ]*:).+)*)", inspect.cleandoc((module and module.__doc__) or ""), flags=re.MULTILINE)
    return plain(found[1]) if found else ""


def settings(cls: type[Any]) -> Iterator[str]:
    """The fields of a dataclass with their defaults."""
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            yield f"{field.name}={field.default!r}"
        else:
            yield f"{field.name} ({REQUIRED})" if field.default_factory is dataclasses.MISSING else f"{field.name}=…"


def meanings(cls: type[Any]) -> dict[str, str]:
    """What the documentation of a class, and of those that it inherits from, says of each field under ``Attributes:``."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        text = inspect.cleandoc(each.__doc__ or "").partition("Attributes:")[2]
        for names, meaning in re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", text, flags=re.MULTILINE):
            found |= {name.strip(): plain(meaning) for name in names.split(",")}
    return found


def plain(text: str) -> str:
    """Documentation as one line, code between single backticks."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")


def _description(toml: str) -> str:
    return str(tomllib.loads(toml).get("description", ""))
