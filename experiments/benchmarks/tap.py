"""What the tap and its transcript cost: rounds under them against rounds without, paired in one run.

20 clients, a perceptron with 1e6 parameters, one batch of 32 each. Both sides run the same apps in process, with Flower's serialization;
they differ in the server's Grid alone. Rounds alternate, so that a busy machine slows both. The transcript is written to ``--directory``,
whose disk is part of what is measured.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.tap [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message

from clients.app import app as client_app
from server.app import header
from server.curious import CuriousGrid
from server.strategy import run_rounds
from simulator import config, engine
from simulator.inprocess import InProcessGrid
from simulator.transcript import Transcript
from simulator.world import World

WORLD: dict[str, Any] = {
    "data": "mnist5k",
    "model": {"name": "mlp", "hidden": [1256]},
    "federation": {"clients": 20, "rounds": 10},
    "training": {"batch_size": 32},
}
TARGET = 0.10
"""Share of the round's time that the tap may cost."""


class Untapped(CuriousGrid):
    """The same Grid with its ears closed: what the federation costs by itself."""

    def _sent(self, messages: Iterable[Message]) -> list[Message]:
        return list(messages)

    def _received(self, messages: Iterable[Message]) -> list[Message]:
        return list(messages)


def seconds(world: World, directory: Path | None) -> float:
    """Wall-clock seconds of a round, the mean over a federation; with a directory, under the tap and until all is on disk."""
    grid = InProcessGrid(client_app, world.federation.clients, engine.run_config(world, Path()))
    started = time.perf_counter()
    if directory is None:
        run_rounds(Untapped(grid, None), world)
    else:
        transcript = Transcript(directory, header(world))
        status, facts = run_rounds(CuriousGrid(grid, transcript), world)
        transcript.close(status, facts)
    return (time.perf_counter() - started) / world.federation.rounds


def measure(pairs: int, directory: Path) -> dict[str, Any]:
    """Alternate ``pairs`` rounds of each kind; report medians and the median of the paired ratios."""
    torch.set_num_threads(1)
    world = config.build(World, WORLD)
    parameters = sum(p.numel() for p in world.model.build(world.data.load().schema, torch.Generator()).parameters())
    seconds(world, None)  # imports and caches
    rows = []
    for pair in range(pairs):
        target = directory / f"{pair}"
        order = (None, target) if pair % 2 else (target, None)
        took = {place: seconds(world, place) for place in order}
        shutil.rmtree(target)
        rows.append((took[None], took[target]))
    ratios = sorted(tapped / bare for bare, tapped in rows)
    return {
        "parameters": parameters,
        "clients": world.federation.clients,
        "pairs": pairs,
        "bare_seconds": statistics.median(bare for bare, _ in rows),
        "tapped_seconds": statistics.median(tapped for _, tapped in rows),
        "overhead": statistics.median(ratios) - 1,
        "overhead_quartiles": [ratios[pairs // 4] - 1, ratios[-1 - pairs // 4] - 1],
        "target": TARGET,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--directory", type=Path, default=None, help="where to write transcripts; default: a temporary directory")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        figures = measure(arguments.pairs, directory)
    finally:
        shutil.rmtree(directory)
    print(json.dumps(figures) if arguments.json else "\n".join(f"{name:20} {value}" for name, value in figures.items()))
    sys.exit(figures["overhead"] > TARGET)


if __name__ == "__main__":
    main()
