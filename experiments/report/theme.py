"""Colours of the page and its plots, light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.report.verdict import Level


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of the page that the plot stands on; hues from Okabe and Ito, told apart by the colour-blind."""

    paper: str
    ink: str
    quiet: str
    rule: str
    grid: str
    colors: Mapping[Level, str]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    quiet="#57606a",
    rule="#8c959f",
    grid="#eaeef2",
    colors={
        "recognizable": "#c2410c",
        "partial": "#d99100",
        "identifiable": "#d99100",
        "labels": "#d99100",
        "faint": "#7a8490",
        "floor": "#0072b2",
        "unmeasured": "#7a8490",
    },
)

DARK = Theme(
    paper="#1a1e24",
    ink="#e8ebee",
    quiet="#a5afba",
    rule="#6b7683",
    grid="#2b3139",
    colors={
        "recognizable": "#ff8a57",
        "partial": "#f0b429",
        "identifiable": "#f0b429",
        "labels": "#f0b429",
        "faint": "#a5afba",
        "floor": "#56b4e9",
        "unmeasured": "#a5afba",
    },
)
