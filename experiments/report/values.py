"""Numbers of ``summary.json`` read tolerantly, and printed in one way everywhere: a missing value is an em dash, infinity is ∞."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MISSING = "—"
INFINITY = "∞"
NBSP = "\u00a0"
MINUS = "−"


def number(value: object) -> float | None:
    """Return a summary's value as a float; ``"inf"`` is infinite, an estimate is its mean, and whatever is no number is None."""
    if isinstance(value, Mapping):
        return number(value.get("mean", value.get("rate")))
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        result = float(INFINITIES.get(value, value) if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(result) else result


INFINITIES = {"∞": "inf", "-∞": "-inf", "−∞": "-inf"}


def lookup(tree: object, *path: str) -> object:
    """Return the value at a path of nested mappings, or None where the path breaks."""
    for key in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def estimate(tree: object, *path: str) -> Estimate:
    """Return the value at a path with its interval; the value is the entry ``mean`` or ``rate``, or the number itself."""
    found = lookup(tree, *path)
    return Estimate(number(found), number(lookup(found, "low")), number(lookup(found, "high")))


def fixed(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """Print a number with a true minus sign; ``sign`` prints the plus as well."""
    if value is None:
        return MISSING
    body = INFINITY if math.isinf(value) else f"{abs(value):.{digits}f}"
    negative = value < 0 and body.strip("0.") != ""
    return (MINUS if negative else "+" if sign else "") + body


def decibel(value: float | None, *, sign: bool = False) -> str:
    """Print decibels with one decimal and the unit."""
    return MISSING if value is None else f"{fixed(value, 1, sign=sign)}{NBSP}dB"


def percent(value: float | None, digits: int | None = None) -> str:
    """Print a fraction as a percentage; without ``digits``, whole percents, and one decimal close to 0 and to 1 where it matters."""
    return MISSING if value is None else f"{_points(value, digits)}{NBSP}%"


def percent_range(low: float | None, high: float | None) -> str:
    """Print an interval of fractions as ``84–100 %``, or nothing where there is none."""
    return "" if low is None or high is None else f"{_points(low)}–{_points(high)}{NBSP}%"


def percent_span(fractions: Sequence[float]) -> str:
    """Print the least and the largest of some fractions, one number where they print alike, nothing of none."""
    if not fractions:
        return ""
    one = percent(min(fractions))
    return one if one == percent(max(fractions)) else percent_range(min(fractions), max(fractions))


def fixed_range(low: float | None, high: float | None, digits: int = 1) -> str:
    """Print an interval as ``9.1 to 10.6``, or nothing where there is none."""
    return "" if low is None or high is None else f"{fixed(low, digits)} to {fixed(high, digits)}"


def significant(value: float | None, digits: int = 3) -> str:
    """Print a number to a few significant digits; powers of ten where plain decimals would be long."""
    if value is None:
        return MISSING
    if math.isinf(value):
        return fixed(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
        return power if mantissa == "1" else f"{mantissa.replace('-', MINUS)}·{power}"
    rounded = float(f"{value:.{digits}g}")
    return (f"{rounded:.0f}" if abs(rounded) >= 10**digits else f"{value:.{digits}g}").replace("-", MINUS)


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def size(value: float | None) -> str:
    """Print a number of bytes with a decimal unit."""
    if value is None or math.isinf(value):
        return MISSING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{significant(value / factor)}{NBSP}{unit}"
    return f"{value:.0f}{NBSP}B"


def duration(value: float | None) -> str:
    """Print seconds with the unit that fits."""
    if value is None or math.isinf(value):
        return MISSING
    if value >= 120:
        return f"{value / 60:.1f}{NBSP}min"
    return f"{value:.1f}{NBSP}s" if value >= 0.995 else f"{significant(value * 1e3, 2)}{NBSP}ms"


def count(number: int, noun: str) -> str:
    """Print a number of things: ``1 arm``, ``2 arms``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def join(words: Sequence[str]) -> str:
    """Return words as an English enumeration."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def _points(value: float, digits: int | None = None) -> str:
    points = 100 * value
    if digits is None:
        near_edge = 0 < points < 9.95 or 99 < points < 100
        digits = 1 if near_edge and f"{points:.1f}"[-1] != "0" else 0
    return fixed(points, digits)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; a part that the summary lacks is None."""

    value: float | None
    low: float | None
    high: float | None
