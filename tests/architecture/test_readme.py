"""README's tables are those of the registry; its commands exist."""

from __future__ import annotations

from experiments.readme import README, updated


def test_tables_are_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert updated(text) == text, "run python -m experiments.readme"
    assert "`linear_leak`" in text
    assert "`secure_aggregation`" in text
