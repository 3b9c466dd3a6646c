"""Each defense says where it acts, what it does not protect and what breaks it; docs/defenses is what the code says."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from experiments import measurements
from experiments.defense_pages import PAGES, REQUIRED, pages, sections
from simulator import lookup
from tests.experiments.test_report import row


@pytest.mark.parametrize("name", lookup.names("defenses"))
def test_a_defense_documents_hook_source_limits_and_what_breaks_it(name: str) -> None:
    module = inspect.getmodule(lookup.get("defenses", name))
    assert module is not None
    found = sections(module.__doc__ or "")
    assert [heading for heading in REQUIRED if not found.get(heading)] == []
    assert found[""]


def test_pages_are_current() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    assert there == pages(), "run python -m experiments.defense_pages"
    assert set(there) == {"README.md", *(f"{name}.md" for name in lookup.names("defenses"))}


def test_paragraphs_become_sections_and_formulas_stay_as_they_are() -> None:
    doc = """A defense: it does this.

        u = v
        w = x

    Source: Somebody, 2020,
    arXiv:1.
    Deviations:
        - one,
          on two lines;
        - two.
    Hook: ``on_update``.

    The claim, against all.

    - first
    - second

    What it does not protect: what :meth:`Else.it` does.
    Broken by: that.
    """
    found = sections(doc)
    assert found == {
        "": "A defense: it does this.\n\n```text\nu = v\nw = x\n```",
        "Source": "Somebody, 2020, arXiv:1.",
        "Deviations from it": "- one, on two lines;\n- two.",
        "Hook": "`on_update`.",
        "What it claims": "The claim, against all.\n\n- first\n- second",
        "What it does not protect": "What `Else.it` does.",
        "Broken by": "That.",
    }


def test_measurements_stand_on_the_pages_of_the_defenses_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "defenses.json"
    path.write_text(json.dumps([row("none", stack=[], control=True), row("top-k 90 %", stack=["top_k"], accuracy=0.5, seeds=2, epsilon_for="ε = ∞.")]))
    monkeypatch.setattr(measurements, "MEASURED", path)
    found = pages()
    assert "## Measured on our data" in found["top_k.md"]
    assert "| top-k 90 % | inverting_gradients | 32, 2 | 97\u00a0% [84–99.9\u00a0%], 1\u00a0% |" in found["top_k.md"]
    assert "| none |" in found["top_k.md"]
    assert "What each ε says:\n\n- none: No guarantee for this server.\n- top-k 90 %: ε = ∞.\n" in found["top_k.md"]
    assert "## Measured on our data" not in found["clip.md"]
