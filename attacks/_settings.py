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
