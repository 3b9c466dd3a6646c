"""What attacks demand of their own settings."""

from __future__ import annotations

from dataclasses import fields


def must_be_positive(attack: object, *names: str) -> None:
    """Refuse settings that are not > 0; without names, all of them.

    Raises:
        ValueError: one is not.
    """
    for field in fields(attack):  # type: ignore[arg-type]
        if (not names or field.name in names) and not (value := getattr(attack, field.name)) > 0:
            raise ValueError(f"{field.name} must be > 0, got {value}. The default is {field.default:g}.")


def must_settle(attack: object, weight: str = "tv", final: str = "tv_final") -> None:
    """Refuse a weight of total variation that rises during the run, or that falls to 0: it falls geometrically.

    Raises:
        ValueError: one does.
    """
    first, last = getattr(attack, weight), getattr(attack, final)
    if not 0 <= last <= first or (first > 0) != (last > 0):
        raise ValueError(f"{weight} must be ≥ {final} > 0, or both 0, got {first} and {last}. Set both; 0 is no total variation.")
