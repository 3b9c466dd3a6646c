"""What the demo must show, checked on its output: python -m tests.smoke DIRECTORY."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def check(out: Path) -> list[str]:
    """The statements of the README about the demo that do not hold in ``out``."""
    rows: dict[str, Any] = {row["defense"]: row for row in json.loads((out / "summary.json").read_text())["rows"]}
    html = (out / "report.html").read_text()
    none, clip, central = rows["none"], rows["clip"], rows["central DP"]
    strong = min((row for name, row in rows.items() if name.startswith("DP-SGD")), key=lambda row: row["epsilon"])
    secure = [row for name, row in rows.items() if name.startswith("secure aggregation")]
    statements = {
        "none: at least 16 victims under 2 seeds": none["victims"] >= 32 and none["seeds"] >= 2,
        "none: identification ≥ 95 %": none["identified"]["rate"] >= 0.95,
        "none: PSNR gain > 8 dB with its interval above 0": none["gain"]["psnr_db"]["mean"] > 8 and none["gain"]["psnr_db"]["low"] > 0,
        "clip is not distinguishable from none": "not_distinguishable" in clip["flags"],
        "central DP is not distinguishable from none": "not_distinguishable" in central["flags"],
        "clip and central DP: ε = ∞ for this server": clip["epsilon"] == central["epsilon"] == "inf",
        "strong DP-SGD: finite ε": math.isfinite(strong["epsilon"]),
        "strong DP-SGD: identification within its ceiling": strong["identified"]["low"] <= strong["ceiling"],
        "secure aggregation: the view is the aggregate": all(row["view"] == "aggregate" for row in secure),
        "all seven arms are there, and nothing failed": len(rows) == 7 and all(set(row["statuses"]) == {"ok"} for row in rows.values()),
        "the report needs no network": "http://" not in html and "https://" not in html,
    }
    return [statement for statement, holds in statements.items() if not holds]


if __name__ == "__main__":
    failed = check(Path(sys.argv[1]))
    print("\n".join(f"does not hold: {statement}" for statement in failed) or "the demo shows what it must")
    sys.exit(bool(failed))
